"""How Sphinx builds the documentation: `make docs`."""

import re
import tomllib
from importlib.metadata import version as version_of
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SOURCE = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Source"]

project = "celery-alchemy"
copyright = "the celery-alchemy authors"
version = release = version_of("celery-alchemy")

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_click", "sphinx_copybutton"]
exclude_patterns = ["_build"]
default_role = "code"
html_theme = "furo"
html_title = "celery-alchemy"

myst_heading_anchors = 4
myst_enable_extensions = ["tasklist"]
autodoc_typehints = "description"


def link_to_repository(app: Any, page: str, content: list[str]) -> None:
    """Let links to files outside docs/ lead to the repository; on disk they lead to the file."""
    up = "../" * (page.count("/") + 1)
    content[0] = re.sub(rf"\]\({re.escape(up)}(?!\.)([^)]+)\)", rf"]({SOURCE}/blob/main/\1)", content[0])


def mend_first_line(app: Any, what: str, name: str, of: Any, options: Any, lines: list[str]) -> None:
    """Put the first line of an attribute together again: napoleon takes the words before a colon for a type."""
    types = [line for line in lines if line.startswith(":type: ")]
    if what in {"property", "attribute"} and types:
        lines.remove(types[0])
        lines[0] = f"{types[0].removeprefix(':type: ')}: {lines[0]}"


def setup(app: Any) -> None:
    app.connect("autodoc-process-docstring", mend_first_line, priority=900)  # after napoleon
    app.connect("source-read", link_to_repository)
