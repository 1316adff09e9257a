"""Measurements: each file here is one command, and each number that the project states has a file here."""
