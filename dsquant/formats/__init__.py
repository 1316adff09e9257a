"""Output formats: how weights are stored, and read back."""
