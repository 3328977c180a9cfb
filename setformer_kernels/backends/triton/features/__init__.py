"""Nyström features and the whitening of their landmarks."""
