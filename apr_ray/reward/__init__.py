"""The reward actor: checks trees in batches."""
