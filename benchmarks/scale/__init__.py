"""One sequence over many ranks: a run on this machine's processors, and a model of what networks make of it."""
