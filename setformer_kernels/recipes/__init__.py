"""Training recipes on the standard data formats: `python -m setformer_kernels.recipes`."""
