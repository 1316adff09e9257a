"""A hook of mkdocs: adds the pages that stand outside docs/, and the help of every command.

README becomes the first page, so that nothing is told twice. Links of the pages are those of the repository, which the
hook turns into the site's; one that leads to a file which the site does not hold, such as a script, becomes plain text.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

import click
from mkdocs.structure.files import File, Files

from dsquant.cli import main

ROOT = Path(__file__).parent.parent
WIDTH = 80
OUTSIDE = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "examples/*", "benchmarks/*.md", "recipes/*.yaml")
LISTED = {"docs/decisions": "Decisions", "benchmarks": "Measurements"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^):#]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Adds what the site shows beside docs/."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = str(path.relative_to(ROOT))
            files.append(File.generated(config, _of_site(name), content=path.read_bytes()))
    files.append(File.generated(config, "commands.md", content=commands()))
    for folder, title in LISTED.items():
        files.append(File.generated(config, f"{_of_site(folder)}/index.md", content=pages_of(ROOT / folder, title)))
    return files


def pages_of(folder: Path, title: str) -> str:
    """Returns a page with a link to each page of a folder, by its heading."""
    found = [(path.name, path.read_text().partition("\n")[0].lstrip("# ")) for path in sorted(folder.glob("*.md"))]
    return f"# {title}\n\n" + "".join(f"* [{heading}]({name})\n" for name, heading in found)


def commands() -> str:
    """Returns a page with the help of dsquant and of its commands, as `--help` prints it."""
    group = click.Context(main, info_name="dsquant", terminal_width=WIDTH, **main.context_settings)
    parts = ["# Every command", _help(group)]
    for name, command in main.commands.items():
        parts += [f"## dsquant {name}", _help(click.Context(command, group, name, terminal_width=WIDTH))]
    return "\n\n".join(parts) + "\n"


def _help(context: click.Context) -> str:
    return f"```text\n{context.get_help()}\n```"


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Turns a page's links into the site's; raises where one leads nowhere."""
    name = page.file.src_uri
    if page.file.generated_by and not (ROOT / name).exists() and name != "index.md":
        return markdown  # of this hook, in the site's own links
    here = "README.md" if name == "index.md" else name if (ROOT / name).exists() else f"docs/{name}"

    def turned(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), link[3]))
        if not (ROOT / target).exists():
            raise ValueError(f"{here}: a link leads to {target}, which does not exist")
        place = f"{_of_site(target)}/index.md" if target in LISTED else _of_site(target)
        if files.get_file_from_path(place) is None:
            return link[2]
        return f"{link[1]}[{link[2]}]({posixpath.relpath(place, posixpath.dirname(name))})"

    return LINK.sub(turned, markdown)


def _of_site(path: str) -> str:
    """Returns where a file of the repository stands in the site."""
    return "index.md" if path == "README.md" else path.removeprefix("docs/")
