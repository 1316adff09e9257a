"""Tasks of lm-evaluation-harness, which models answer while they are in memory."""
