"""Takes the outlier channels of the embedded tiny-r1 out again and writes the model in FP8.

    python scripts/smooth_tiny_r1.py OUT

The function stays what it is but for one more rounding to FP8; benchmarks/quality.py compares methods on it.
"""

import shutil
import sys
from pathlib import Path

from tiny_r1 import export

TINY_R1 = Path(__file__).resolve().parent.parent / "dsquant" / "assets" / "tiny-r1"
SEED = 0


def main(target: Path) -> None:
    """Reads, undoes `add_outliers`, writes."""
    export.save(export.add_outliers(export.load(TINY_R1), SEED, remove=True), target)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY_R1 / name, target / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
