"""Trackers: MLflow, the console, none; and progress bars for long work."""
