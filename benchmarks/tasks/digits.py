"""scikit-learn's handwritten digits: 8 x 8 pixels, one token a pixel."""

from __future__ import annotations

import torch
from torch import Tensor

SEED = 0


def load() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training pixels [N,64,1] in [0,1] and labels [N], then the same for the quarter held out for the test."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(pixels / 16.0, labels, test_size=0.25, stratify=labels, random_state=SEED)
    x, x_test, y, y_test = (torch.from_numpy(part) for part in parts)
    return x.float().unsqueeze(-1), y.long(), x_test.float().unsqueeze(-1), y_test.long()
