"""Shows the progress and results of jobs: terminal, notebook, Prometheus."""
