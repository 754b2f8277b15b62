"""What the pages say is there: links, files, commands, rooms; and what they show was run."""

import re
from pathlib import Path

import pytest

from csrm.__main__ import GROUPS
from tests.docs.pages import PAGES, ROOT, prose, python_blocks, read_page
from tests.test_packaging import LAW

RUN = {
    "README.md": ["Quick start", "Use the scores"],
    "docs/read-scores.md": [
        *("Reading scores", "PySpark", "deltalake", "pandas", "DuckDB", "Polars"),
        *("As a view", "As a query of DuckDB"),
        "Which score is good enough?",
        *("Why does a product have its score?", "With Spark", "Without Spark"),
        *("Was a row rolled back?", "Score in your own Spark program"),
    ],
    "docs/tutorial.md": ["4. Change a product, and score again"],
}
"""Page to the headings whose Python test_examples.py, test_tutorial.py, tests/consumers/test_readers.py,
tests/spark/test_catalogs.py or tests/jobs/test_rollback.py runs."""


def test_every_block_of_python_is_run_by_a_test() -> None:
    assert {page: list(blocks) for page in PAGES if (blocks := python_blocks(page))} == RUN


def anchors(page: str) -> set[str]:
    """Anchors of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (ROOT / page).parent / name if name else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target.resolve().relative_to(ROOT).as_posix())):
            broken.append(link)
    assert not broken


def places(name: str) -> list[Path]:
    """Files of a name that may have stars, from the root or from `csrm/`."""
    return [*ROOT.glob(name), *(ROOT / "csrm").glob(name)]


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])
def test_every_file_that_is_named_exists(page: str) -> None:
    text = read_page(page)
    roots = re.findall(r"(?<![\w./])((?:csrm|jobs|export|conf|docs|tests)/[\w./*-]*\w)", text)
    files = re.findall(r"`([\w*-]+/[\w./*-]*\.(?:py|md|yaml|conf|sh))[`:]", text)
    assert [name for name in sorted({*roots, *files}) if not places(name)] == []


@pytest.mark.parametrize("page", PAGES)
def test_every_test_that_is_named_exists(page: str) -> None:
    missing = []
    for path, name in re.findall(r"`([\w./]+\.py)::(\w+)`", read_page(page)):
        found = [file for file in (ROOT / path, ROOT / "tests" / "faults" / path) if file.exists()]
        if not found or f"def {name}(" not in found[0].read_text(encoding="utf-8"):
            missing.append(f"{path}::{name}")
    assert missing == []


@pytest.mark.parametrize("page", PAGES)
def test_every_command_that_is_named_exists(page: str) -> None:
    named = set(re.findall(r"(?:^|`)csrm ([a-z][a-z-]*)", read_page(page), re.MULTILINE))
    assert named <= {name for commands in GROUPS.values() for name in commands}


def test_the_readme_is_short() -> None:
    assert len(read_page("README.md").splitlines()) <= 200


def test_the_index_lists_every_page() -> None:
    linked = set(re.findall(r"\]\(([\w.-]+\.md)\)", read_page("docs/index.md")))
    assert linked == {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}


def test_the_index_lists_every_example() -> None:
    linked = set(re.findall(r"\]\(examples/([\w.-]+)\)", read_page("docs/index.md")))
    assert linked == {path.name for path in (ROOT / "docs" / "examples").iterdir() if path.is_file()}


def folders_with_code(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if list(path.glob("*.py"))}


def test_the_architecture_has_the_rooms_of_the_law() -> None:
    section = read_page("docs/architecture.md").partition("## Rooms\n")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)/` \| [^|]* \| ([^|]*) \|", section, re.MULTILINE)
    allowed = {room: "any" if rooms is None else ", ".join(rooms) or "none" for room, rooms in LAW.items()}
    assert dict(rows) == allowed


def test_the_architecture_names_every_room_of_training() -> None:
    drawing = read_page("docs/architecture.md").partition("```")[2].partition("```")[0]
    assert {f"{name}/" for name in folders_with_code(ROOT / "csrm" / "training")} <= set(drawing.split())
