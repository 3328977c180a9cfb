"""Which models of the installed transformers `replace_attention` converts: `python -m benchmarks.conversion`."""

ELSEWHERE = "its attention does not go through transformers' interface"
