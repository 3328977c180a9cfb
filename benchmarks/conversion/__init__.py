"""Which models of the installed transformers `replace_attention` converts: `python -m benchmarks.conversion`."""
