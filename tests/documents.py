"""The documents as tests see them: what stands between fences, and what runs of it."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from markdown_it import MarkdownIt

ROOT = Path(__file__).parent.parent
PATHS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
DOCUMENTS = [path.relative_to(ROOT).as_posix() for path in PATHS]


class Block(NamedTuple):
    """A block of code."""

    document: str
    line: int  # of its first fence, from 1
    language: str  # the words behind the fence; of an indented block "", which has none
    text: str
    closed: bool  # whether there is a second fence

    def __str__(self) -> str:
        return f"{self.document}:{self.line}"


def blocks(document: str, language: str | None = None) -> list[Block]:
    """All of a document's, or those in a language."""
    text = (ROOT / document).read_text()
    found = []
    for token in MarkdownIt().parse(text):
        if token.type in ("fence", "code_block") and token.map:
            closed = text.splitlines()[token.map[1] - 1].strip() == token.markup
            found.append(Block(document, token.map[0] + 1, token.info.strip(), token.content, closed))
    return [block for block in found if language in (None, block.language)]


def commands(block: Block) -> list[str]:
    """A line for each, without the comments."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [line for line in (re.sub(r"\s+#.*|\s+$", "", line) for line in lines) if line]


def run_script(document: str, script: str, directory: str) -> None:
    """On a rank; in a directory of its own."""
    before = os.getcwd()
    os.chdir(directory)
    try:
        exec(compile(script, document, "exec"), {"__name__": "__main__"})
    finally:
        os.chdir(before)


def numbers(pattern: str, text: str) -> list[float]:
    """Those that the pattern's group finds in what is printed."""
    return [float(number) for number in re.findall(pattern, text)]
