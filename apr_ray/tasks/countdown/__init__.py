"""Countdown: combine every given number exactly once with + - * / to reach the target."""
