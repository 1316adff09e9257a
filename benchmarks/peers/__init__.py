"""Other quantizers on the same model and tokens, and an evaluator that shares no code with dsquant."""
