"""The policy: a Llama from a config, checkpoints in Hugging Face form, and the map between their names and an engine's."""
