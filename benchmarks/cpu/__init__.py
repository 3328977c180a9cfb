"""The side-by-side benchmark of `python -m benchmarks`, and microbenchmarks of single functions."""
