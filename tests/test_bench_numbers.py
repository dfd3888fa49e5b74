"""Every number between marks in README and docs is what the committed results say."""

from pathlib import Path

import pytest

from celery_alchemy.loadtests.bench.results import NoRunError
from celery_alchemy.loadtests.reports import numbers

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "loadtests" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(autouse=True)
def checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (ROOT / numbers.RESULTS).is_dir():
        pytest.skip("the results are in the checkout only")
    monkeypatch.chdir(ROOT)


def copied(path: Path, tmp_path: Path) -> Path:
    copy = tmp_path / path.name
    copy.write_bytes(path.read_bytes())
    return copy


def test_the_documents_say_what_the_results_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    marked = [path for path in DOCUMENTS if numbers.MARKED.search(path.read_text())]
    assert ROOT / "docs" / "measured.md" in marked
    assert numbers.main(*(str(copied(path, tmp_path)) for path in marked)) == 0, capsys.readouterr().out


def test_a_number_that_differs_is_named_and_mended(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    copy = copied(ROOT / "docs" / "measured.md", tmp_path)
    right = copy.read_text()
    (first, *_) = numbers.MARKED.finditer(right)
    copy.write_text(right.replace(first[0], f"{first[1]}1{first[3]}"))
    assert numbers.main(str(copy)) == 1
    said = capsys.readouterr().out
    assert f"{copy} has:\n{first[1]}1{first[3]}\nthe results say:\n{first[0]}" in said
    assert copy.read_text() == right
    assert numbers.main(str(copy)) == 0


def test_a_mark_that_no_result_answers_is_no_success(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for words, error in (("speed 2026-11-25", KeyError), ("tasks 1999-01-01", NoRunError)):
        page.write_text(f"<!-- = {words} -->1<!-- / -->")
        with pytest.raises(error):
            numbers.main(str(page))


def test_the_script_is_short() -> None:
    assert len(Path(numbers.__file__).read_text().splitlines()) <= 60
