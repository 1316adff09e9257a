"""How far a job is, and what it made: terminal, notebook, Prometheus."""
