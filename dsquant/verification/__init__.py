"""Verifies that an output is what its job wrote, and matches its source: bytes, contents, values."""
