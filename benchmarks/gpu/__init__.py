"""`python -m benchmarks.gpu`: tests, smoke runs and measurements on a machine with a GPU."""
