"""Evaluating a policy on a task through a pool; figures and the report."""
