"""The pages of the documentation, and the blocks of Python in them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]

PAGES = sorted(path.relative_to(ROOT).as_posix() for path in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def read_page(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def prose(page: str) -> str:
    """A page without its blocks of code."""
    return re.sub(r"^```.*?^```", "", read_page(page), flags=re.DOTALL | re.MULTILINE)


def python_blocks(page: str) -> dict[str, str]:
    """Heading to the block of Python below it; no heading has two."""
    heading, blocks = "", {}
    for title, block in re.findall(r"^#+ ([^\n]*)$|^```python\n(.*?)^```", read_page(page), re.DOTALL | re.MULTILINE):
        if title:
            heading = title
        else:
            assert heading not in blocks, f"{page}: two blocks of Python under {heading!r}; give each a heading"
            blocks[heading] = block
    return blocks
