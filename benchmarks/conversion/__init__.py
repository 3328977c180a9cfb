"""Which models of the installed transformers, and attention classes of timm, `replace_attention` converts:
`python -m benchmarks.conversion`."""

ELSEWHERE = "its attention does not go through transformers' interface"
TIMM = "timm"  # in the place of a folder of transformers
