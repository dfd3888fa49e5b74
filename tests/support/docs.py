"""Running the code on a page below docs/."""

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent.parent / "docs"


def fences(words: str) -> list[tuple[str, str]]:
    """Return language and text of each fenced block, but of those that a comment before them says are not run."""
    words = re.sub(r"^<!-- not run: [^>]+ -->\n```.*?^```$", "", words, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"^```([^\n]*)\n(.*?)^```$", words, flags=re.MULTILINE | re.DOTALL)


def blocks(words: str, language: str) -> list[str]:
    """Return the fenced blocks that say this language; "" for those that say none."""
    return [block for said, block in fences(words) if said == language]


def page_of(title: str) -> str:
    """Return the name of the page that has a section with this title."""
    (found,) = (
        path.name for path in sorted(DOCS.glob("*.md")) if f"\n## {title}\n" in path.read_text(encoding="utf-8")
    )
    return found


def code_of(page: str, url: str, *, broker: str = "memory://", title: str = "") -> str:
    """Return the Python blocks of a page, or of its section `title`; `url` may have `{}` for the database's name."""
    words = (DOCS / page).read_text(encoding="utf-8")
    if title:
        words = words.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    code = "\n".join(blocks(words, "python"))
    assert code, f"no code in {page} {title}"
    code = code.replace("redis://localhost", broker)
    return re.sub(r"postgresql\+psycopg://localhost/(\w+)", lambda found: url.replace("{}", found[1]), code)


def run_page(page: str, folder: Path, *, title: str = "") -> dict[str, Any]:
    """Run the code of a page, or of its section `title`, on SQLite files in `folder`; return what it defined.

    Its tasks are its own: Celery gives every new app of a process the tasks of all others.
    """
    found: dict[str, Any] = {"__name__": "shop"}
    code = code_of(page, f"sqlite:///{folder}/{{}}.sqlite3", title=title)
    code = code.replace("@app.task(", "@app.task(shared=False, ")
    exec(compile(code, page, "exec", dont_inherit=True), found)
    return found
