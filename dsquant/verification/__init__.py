"""Whether an output is what its job wrote, and stands for its source: bytes, contents, values."""
