"""Rollout workers and their pool."""
