"""The loops, each on one screen, and what they share: run directory, clock, session."""
