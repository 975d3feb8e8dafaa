"""Weights from the learner group to the rollout pool, versioned."""
