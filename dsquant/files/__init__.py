"""Files that are whole or absent, and files that others have written."""
