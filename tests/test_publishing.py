"""What would be published: the wheel's page, and what is in the sdist."""

import re
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def metadata(dist: Path) -> Message:
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as file:
        (name,) = (name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(file.read(name))


def test_every_link_of_the_page_is_absolute(metadata: Message) -> None:
    page = str(metadata.get_payload())
    links = re.findall(r"\]\(([^)]+)\)", page)
    assert len(links) > 15
    assert [link for link in links if not re.match(r"https://[\w./-]+(#[\w-]+)?$", link)] == []
    pages = re.findall(r"https://celery-alchemy\.readthedocs\.io/en/latest/([\w/-]+)\.html", page)
    files = re.findall(r"/blob/main/([\w./-]+)", page)
    assert pages
    assert files
    for file in [*(f"docs/{name}.md" for name in pages), *files]:
        assert (ROOT / file).exists(), file


def test_the_metadata_is_whole(metadata: Message) -> None:
    assert {url.split(",")[0] for url in metadata.get_all("Project-URL", [])} == {
        *("Documentation", "Source", "Issues", "Changelog")
    }
    assert metadata["Description-Content-Type"] == "text/markdown"
    pythons = [line for line in metadata.get_all("Classifier", []) if re.search(r":: 3\.\d+$", line)]
    assert pythons == ["Programming Language :: Python :: 3.11"], "as tested in every run"


def test_the_sdist_has_tests_docs_and_examples(dist: Path) -> None:
    (archive,) = dist.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    wanted = {
        "README.md",
        "CHANGELOG.md",
        "SECURITY.md",
        "CONTRIBUTING.md",
        "LICENSE",
        "docs/tutorial.md",
        "docs/conf.py",
    }
    wanted |= {"docs/errors/queuepool-limit.md", "examples/flask_app/shop/tasks.py", "tests/test_publishing.py"}
    assert wanted - names == set()
    assert not [name for name in names if "/_build/" in name or "loadtests/results/" in name]
