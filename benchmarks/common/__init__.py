"""What every benchmark stands on: cases, implementations, clocks, the machine, rows of results, targets."""
