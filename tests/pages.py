"""README.md, docs/ and other pages as what they hold: blocks of code, commands, links, paths."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
PAGES = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "ARCHITECTURE.md")),
    REPOSITORY / "benchmarks" / "README.md",
    *sorted((REPOSITORY / "docs").glob("*.md")),
]
# The first words of the commands that a page may have. An indented block whose line begins with
# another word is a formula or a picture.
PROGRAMS = ("make", "onepass-trl", "pip", "python", "accelerate", "torchrun")
NOT_RUN = re.compile(r"^<!-- not run: (\S.*) -->$", re.MULTILINE)
_TOP = "docs|examples|tests|benchmarks|csrc|onepass_trl"


@dataclass
class Block:
    """A fenced block, or an indented one, whose language is "".

    Attributes:
        page: its file.
        line: number of its first line of text, from 1.
        language: the word after the opening fence.
        text: what it holds.
        not_run: why it isn't run, where a comment before it says so.
    """

    page: Path
    line: int
    language: str
    text: str
    not_run: str | None = None

    def __str__(self) -> str:
        return f"{self.page.relative_to(REPOSITORY)}:{self.line}"


def blocks_of(page: Path) -> list[Block]:
    """Return the blocks of a page, in order."""
    blocks: list[Block] = []
    fence, marked, before = None, None, ""
    for number, line in enumerate(page.read_text("utf-8").splitlines(), start=1):
        if fence is not None:
            if line.strip() == fence:
                fence = None
            else:
                blocks[-1].text += line + "\n"
        elif opened := re.match(r"\s*(`{3,})(\w*)", line):
            fence = opened[1]
            blocks.append(Block(page, number + 1, opened[2], "", marked))
        elif line.startswith("    ") and not before.strip():
            blocks.append(Block(page, number, "", line[4:] + "\n"))
        elif line.startswith("    ") and before.startswith("    ") and blocks:
            blocks[-1].text += line[4:] + "\n"
        if line.strip():
            found = NOT_RUN.fullmatch(line.strip())
            marked = found[1] if found else None
        before = line
    return blocks


def commands_of(page: Path) -> Iterator[tuple[str, str]]:
    """Yield (place, command) of a page: lines of ``sh`` fences, and indented lines that are one."""
    for block in blocks_of(page):
        if block.language not in ("sh", "") or block.not_run:
            continue
        joined = block.text.replace("\\\n", " ")
        for offset, line in enumerate(joined.splitlines()):
            command = re.sub(r"(?:^|\s+)#.*", "", line).strip()
            command = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", command).removeprefix(".venv/bin/")
            if command and (block.language == "sh" or command.split()[0] in PROGRAMS):
                yield f"{page.relative_to(REPOSITORY)}:{block.line + offset}", command


def prose_of(page: Path) -> str:
    """Return the text of a page less its fenced blocks."""
    return re.sub(r"^(`{3,}).*?^\1`*$", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def anchors_of(page: Path) -> set[str]:
    """Return the anchors that GitHub gives to the headings of a page."""
    anchors: set[str] = set()
    for heading in re.findall(r"^#+ (.*)$", prose_of(page), flags=re.MULTILINE):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip().lower())
        slug = re.sub(r"[^\w\- ]", "", text).replace(" ", "-")
        numbered = (f"{slug}-{number}" for number in itertools.count(1))
        anchors.add(next(name for name in itertools.chain([slug], numbered) if name not in anchors))
    return anchors


def links_of(page: Path) -> list[str]:
    """Return the targets of the links and images of a page that aren't addresses on the web."""
    found = re.findall(r"\[[^\]]*\]\(([^)\s]+)\)", prose_of(page))
    return [target for target in found if not re.match(r"\w+:", target)]


def paths_of(page: Path) -> list[str]:
    """Return the paths of the repository that a page names in backticks."""
    spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", prose_of(page))
    words = [word.rstrip(".,;:") for span in spans for word in span.split()]
    words = [word for word in words if not word.endswith(".so")]  # built
    if page.name == "ARCHITECTURE.md":  # names them from the package, or from where it speaks of
        return [
            word
            for word in words
            if re.fullmatch(r"(?:[\w.-]+/)+[\w.-]*\.(?:py|h|cpp|cu|json|md)", word)
        ]
    return [word for word in words if re.fullmatch(rf"(?:{_TOP})/[\w./*-]*", word)]


def with_part(page: str, name: str, text: str) -> str:
    """Return a page with `text` between ``<!-- name -->`` and ``<!-- end of name -->``."""
    begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
    page, count = re.subn(
        f"{begin}.*?{end}", lambda _: f"{begin}\n{text}\n{end}", page, flags=re.DOTALL
    )
    assert count == 1, f"the page has no place for {name}"
    return page
