"""Backends: one module each, same face; `unsupported_reasons` says what a backend cannot run, and why."""
