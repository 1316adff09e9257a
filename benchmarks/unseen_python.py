"""Makes the text that benchmarks/quality.py measures on: Python that none of the models here was trained on.

    python benchmarks/unseen_python.py unseen-python.txt

pip downloads wheels of permissively licensed packages, of fixed versions and named in neither model's list of training
packages; their files are put into the order of their hashes, so that both halves of the text hold some of each. The
same bytes each time: the script ends with their SHA-256.
"""

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGES = (
    "celery==5.5.3",
    "dask==2025.7.0",
    "django==5.2.5",
    "flask==3.1.1",
    "scrapy==2.13.3",
    "starlette==0.47.2",
    "trio==0.30.0",
    "twisted==25.5.0",
)
CHARACTERS = 3_000_000
FILE_BYTES = range(1_000, 100_000)


def main(target: Path) -> None:
    """Downloads, orders, joins, writes."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:", "-d", folder]
        subprocess.run([*pip, *PACKAGES], check=True)
        files = [content for wheel in Path(folder).glob("*.whl") for content in python_files(wheel)]
    files.sort(key=lambda content: hashlib.sha256(content).digest())
    text = "\n".join(content.decode() for content in files)[:CHARACTERS]
    target.write_text(text, encoding="utf-8")
    print(f"{len(text)} characters, SHA-256 {hashlib.sha256(text.encode()).hexdigest()}")


def python_files(wheel: Path) -> set[bytes]:
    """The Python files of a wheel that are neither tiny nor tables."""
    with zipfile.ZipFile(wheel) as archive:
        names = [one.filename for one in archive.infolist() if one.file_size in FILE_BYTES]
        return {archive.read(name) for name in names if name.endswith(".py")}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
