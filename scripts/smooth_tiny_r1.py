"""Takes the outlier channels that train_tiny_r1.py gave a model out again and writes it in FP8.

    python scripts/smooth_tiny_r1.py OUT [MODEL]

MODEL is a folder that train_tiny_r1.py wrote, the embedded tiny-r1 if left out. The function stays what it is but for
one more rounding to FP8; benchmarks/quality.py compares methods on it.
"""

import argparse
import shutil
from pathlib import Path

from tiny_r1 import export

TINY_R1 = Path(__file__).resolve().parent.parent / "dsquant" / "assets" / "tiny-r1"
SEED = 0


def main(target: Path, source: Path) -> None:
    """Reads, undoes `add_outliers`, writes."""
    weights = export.add_outliers(export.load(source), SEED, remove=True)
    export.save(weights, target, export.load_config(source))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source / name, target / name)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("model", type=Path, nargs="?", default=TINY_R1)
    given = parser.parse_args()
    main(given.out, given.model)
