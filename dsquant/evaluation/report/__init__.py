"""How an evaluation is shown: report.json, report.md, report.html, and in a notebook."""
