"""Where heads lie in the parts of a module, for those that give heads to several ranks.

A module's `of_heads` maps the name of each child that heads go through to one of the numbers below.
"""

from __future__ import annotations

ROWS = 1  # the first dimension of every parameter is heads, one after another; 2, 3: as many times, for k|v and q|k|v
COLUMNS = 0  # a linear layer that reads heads, one after another
SHARED = -1  # every head goes through the same
