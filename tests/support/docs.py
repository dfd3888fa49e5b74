"""Running the code on a page below docs/."""

import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent.parent.parent / "docs"


def code_of(page: str, url: str, *, broker: str = "memory://", title: str = "") -> str:
    """Return the Python blocks of a page, or of its section `title`; `url` may have `{}` for the database's name."""
    words = (DOCS / page).read_text(encoding="utf-8")
    if title:
        words = words.partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"^```python\n(.*?)^```", words, flags=re.M | re.S)
    assert blocks, f"no code in {page} {title}"
    code = "\n".join(blocks).replace("redis://localhost", broker)
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
