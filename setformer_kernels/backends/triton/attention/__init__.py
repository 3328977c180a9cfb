"""Attention for every T: keys transported onto references, queries reading them."""
