"""Kernels compiled for GPUs that are not there: resources, instructions, and what the model predicts from them."""
