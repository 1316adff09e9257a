"""Takes the outlier channels that train_tiny_r1.py gave a model out again and writes it in FP8.

    python scripts/smooth_tiny_r1.py OUT [MODEL]

MODEL is a folder that train_tiny_r1.py wrote, the embedded tiny-r1 if left out. The function stays what it is but for
one more rounding to FP8; benchmarks/quality.py compares methods on it.
"""

import shutil
import sys
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
    main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else TINY_R1)
