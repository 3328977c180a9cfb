"""Causal attention for T ≤ 1, a scan over chunks of the length."""
