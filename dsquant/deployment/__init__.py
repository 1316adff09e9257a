"""What a model becomes in every format, what that runs on and how fast: worked out before a weight is read."""
