"""What an output is: how weights are stored, and read back."""
