"""Writes GGUF files that llama.cpp loads, straight from a checkpoint."""
