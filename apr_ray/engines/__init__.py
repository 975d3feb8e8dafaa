"""Inference engines behind `core.engine.Engine`; each is imported when it is asked for."""
