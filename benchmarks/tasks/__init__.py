"""Data, models and training steps that the quality benchmark and the demo share."""
