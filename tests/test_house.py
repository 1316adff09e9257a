"""The folder tree is what README says it is."""

import ast
import re
from collections import Counter
from functools import cache
from pathlib import Path

import dsquant

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dsquant"


def test_readmes_tree_is_the_packages() -> None:
    tree = re.findall(r"^dsquant/(\S+)", (ROOT / "README.md").read_text(), re.MULTILINE)
    package = [path for path in (ROOT / "dsquant").iterdir() if path.name not in ("__pycache__", "assets", "py.typed")]
    names = {f"{path.name}/" if path.is_dir() else path.name for path in package}
    assert set(tree) == names - {"__init__.py"}


def test_the_top_of_the_package_holds_few_modules() -> None:
    assert len(list((ROOT / "dsquant").glob("*.py"))) <= 12


def test_a_modules_name_stands_for_one_module_in_the_whole_package() -> None:
    stems = Counter(path.stem for path in PACKAGE.rglob("*.py") if path.stem != "__init__")
    assert [stem for stem, times in stems.items() if times > 1] == []


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
    functions = {"apply_patch", "awq", "delta", "evaluate", "generate", "gguf", "inspect", "plan", "run", "verify"}
    assert set(dsquant.__all__) == errors | functions
    assert all(callable(getattr(dsquant, name)) for name in dsquant.__all__)
    assert set(dir(dsquant)) == {*dsquant.__all__, "__version__"}


def test_the_tests_folders_are_the_packages() -> None:
    folders = {path.name for path in (ROOT / "tests").iterdir() if any(path.glob("*.py"))}
    assert folders - {"support"} <= {path.name for path in PACKAGE.iterdir() if path.is_dir()}


def test_what_test_modules_share_is_in_support() -> None:
    modules = {path: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    assert [path.name for path, text in modules.items() if re.search(r"^(from|import) test_", text, re.MULTILINE)] == []


@cache
def functions() -> list[tuple[str, ast.FunctionDef]]:
    return [
        (f"{path.relative_to(PACKAGE)}: {node.name}", node)
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    ]


def test_no_function_has_more_than_fifty_lines_and_no_file_more_than_350() -> None:
    assert [name for name, node in functions() if (node.end_lineno or 0) - node.lineno >= 50] == []
    files = sorted(PACKAGE.rglob("*.py"))
    assert [str(path) for path in files if len(path.read_text().splitlines()) > 350] == []


def test_few_functions_have_six_parameters_or_more() -> None:
    counts = [len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs) for _, node in functions()]
    assert sum(count >= 6 for count in counts) <= 60
