"""How an extra of this package is installed, from where the package itself came."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, distribution
from urllib.parse import unquote, urlsplit

NAME = "celery-alchemy"


def install(extra: str) -> str:
    """Return the command that installs `extra`: from the checkout or the wheel that celery-alchemy was installed from,
    or else from the index."""
    try:
        origin = distribution(NAME).read_text("direct_url.json")  # written by pip and uv: PEP 610
    except PackageNotFoundError:
        origin = None
    return f"pip install '{_place(json.loads(origin) if origin else {})}[{extra}]'"


def _place(origin: dict[str, str]) -> str:
    url = urlsplit(origin.get("url", ""))
    return unquote(url.path) if url.scheme == "file" else NAME
