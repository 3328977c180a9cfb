"""Device functions that several ops share."""
