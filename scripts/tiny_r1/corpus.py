"""Python sources of permissively licensed packages installed on this machine."""

import hashlib
import random
import re
import sysconfig
from importlib.metadata import Distribution, distributions
from pathlib import Path

PERMISSIVE = re.compile(r"\b(MIT|BSD|Apache|PSF|Python Software Foundation|ISC|HPND|Unlicense|CC0)\b", re.IGNORECASE)
RESTRICTIVE = re.compile(r"\b(GPL|LGPL|AGPL|MPL|Proprietary|EULA|NVIDIA|Commercial)\b", re.IGNORECASE)
HELD_OUT_SHARE = 0.01
LONGEST_FILE = 200_000


def licence_of(distribution: Distribution) -> str:
    """The licence that a package declares, in its metadata's own words."""
    metadata = distribution.metadata
    declared = [metadata.get("License-Expression") or "", (metadata.get("License") or "")[:100]]
    declared += [entry for entry in metadata.get_all("Classifier") or [] if entry.startswith("License")]
    return " | ".join(part for part in declared if part)


def sources() -> dict[str, tuple[str, list[Path]]]:
    """Package -> its licence and its Python files; Python's own library first."""
    standard = Path(sysconfig.get_path("stdlib"))
    inside = [path for path in sorted(standard.rglob("*.py")) if "site-packages" not in path.parts]
    found = {"python": ("PSF", [path for path in inside if "dist-packages" not in path.parts])}
    for distribution in sorted(distributions(), key=lambda one: str(one.metadata["Name"]).lower()):
        licence = licence_of(distribution)
        if not PERMISSIVE.search(licence) or RESTRICTIVE.search(licence):
            continue
        files = [Path(str(distribution.locate_file(file))) for file in distribution.files or []]
        paths = sorted(path for path in files if path.suffix == ".py" and path.is_file())
        if paths:
            found[str(distribution.metadata["Name"]).lower()] = (licence[:60], paths)
    return found


def read(max_chars: int, seed: int) -> tuple[list[str], list[str], dict[str, str]]:
    """Reads files in random order up to a number of characters; a hundredth of them is held out.

    Returns:
        Training texts, held-out texts, and package -> licence.
    """
    packages = sources()
    paths = [path for _, files in packages.values() for path in files]
    random.Random(seed).shuffle(paths)
    seen: set[bytes] = set()
    train: list[str] = []
    held_out: list[str] = []
    total = 0
    for path in paths:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        digest = hashlib.sha256(text.encode()).digest()
        if not 200 < len(text) < LONGEST_FILE or digest in seen:
            continue
        seen.add(digest)
        (held_out if digest[0] < 256 * HELD_OUT_SHARE else train).append(text)
        total += len(text)
        if total > max_chars:
            break
    return train, held_out, {name: licence for name, (licence, _) in packages.items()}
