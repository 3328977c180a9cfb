"""Streaming kernels for every GPU that Triton compiles for: `face` is the backend, the other modules its kernels."""
