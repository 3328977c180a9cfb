"""The demo: what swapping softmax attention for SeT attention does to accuracy, time and memory, on real input."""
