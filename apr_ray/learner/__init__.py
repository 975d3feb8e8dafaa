"""DeepSpeed learner actors as one group: SFT and GRPO steps, weights, checkpoints."""
