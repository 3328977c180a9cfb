"""Attention under a mask that depends on the query, in tiles of queries and keys."""
