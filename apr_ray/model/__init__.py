"""The policy: a Llama from a config, checkpoints in Hugging Face form."""
