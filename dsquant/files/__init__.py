"""Writes files completely or not at all, and reads files that others have written."""
