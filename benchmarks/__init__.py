"""Measurements: each file here is one command, and each number that the project states has a file here."""

import dsquant  # noqa: F401 (before PyTorch, which reads what it sets: as a user's job runs)
