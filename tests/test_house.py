"""The folder tree is what README says it is."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_readmes_tree_is_the_packages() -> None:
    tree = re.findall(r"^dsquant/(\S+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    package = [path for path in (ROOT / "dsquant").iterdir() if path.name not in ("__pycache__", "assets", "py.typed")]
    names = {f"{path.name}/" if path.is_dir() else path.name for path in package}
    assert set(tree) == names - {"__init__.py"}


def test_the_top_of_the_package_holds_few_modules() -> None:
    assert len(list((ROOT / "dsquant").glob("*.py"))) <= 12
