"""Reads checkpoints: safetensors indexes, lazy weights, FP8 and packed layouts, the hub."""
