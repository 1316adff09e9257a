"""The folder tree is what README says it is."""

import re
from pathlib import Path

import dsquant

ROOT = Path(__file__).parent.parent


def test_readmes_tree_is_the_packages() -> None:
    tree = re.findall(r"^dsquant/(\S+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    package = [path for path in (ROOT / "dsquant").iterdir() if path.name not in ("__pycache__", "assets", "py.typed")]
    names = {f"{path.name}/" if path.is_dir() else path.name for path in package}
    assert set(tree) == names - {"__init__.py"}


def test_the_top_of_the_package_holds_few_modules() -> None:
    assert len(list((ROOT / "dsquant").glob("*.py"))) <= 12


def test_what_the_package_offers_changes_on_purpose_alone() -> None:
    errors = {
        "DsquantError",
        "GateError",
        "InconclusiveError",
        "InputError",
        "Interrupted",
        "PackageError",
        "UsageError",
    }
    functions = {"apply_patch", "awq", "delta", "evaluate", "gguf", "inspect", "plan", "run", "verify"}
    assert set(dsquant.__all__) == errors | functions
    assert all(callable(getattr(dsquant, name)) for name in dsquant.__all__)
    assert set(dir(dsquant)) == {*dsquant.__all__, "__version__"}
