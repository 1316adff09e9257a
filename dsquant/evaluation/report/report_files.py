"""Writes the three reports."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from dsquant.errors import InputError
from dsquant.evaluation.report.markdown import markdown
from dsquant.evaluation.report.page import page
from dsquant.files.disk import write_atomically

if TYPE_CHECKING:
    from dsquant.evaluation.results import Evaluation

JSON_FILE, MARKDOWN_FILE, PAGE_FILE = "report.json", "report.md", "report.html"


def write_reports(evaluation: "Evaluation", folder: Path) -> list[Path]:
    """Writes report.json, report.md and report.html into a folder, which is created; returns their paths.

    Files of these names are replaced. Raises InputError where the folder cannot be written to.
    """
    texts = {
        JSON_FILE: json.dumps(evaluation.as_json(), indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        MARKDOWN_FILE: markdown(evaluation),
        PAGE_FILE: page(evaluation),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_atomically(folder / name, text.encode(errors="backslashreplace"))  # paths may not be valid text
    except OSError as error:
        raise InputError(f"{folder}: the reports cannot be written there: {error}") from error
    return [folder / name for name in texts]
