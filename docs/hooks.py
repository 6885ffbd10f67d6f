"""What mkdocs.yml can't say: pages made of files outside docs/, whole docstrings, links.

mkdocs calls the functions whose names begin with ``on_``.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
# Pages of the site that are files elsewhere in the repository.
PAGES = {
    "index.md": "README.md",
    "architecture.md": "ARCHITECTURE.md",
    "contributing.md": "CONTRIBUTING.md",
    "benchmarks.md": "benchmarks/README.md",
}
_NAME = re.compile(
    r"^<!-- api: ([\w.]+) -->$.*?^<!-- end of api: \1 -->$", re.DOTALL | re.MULTILINE
)
_FENCE = re.compile(r"^(`{3,}).*?^\1`*$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
# What a browser would fetch from another host, unlike links that a reader may follow.
_EXTERNAL = re.compile(
    r"<(?:script|img|iframe)\b[^>]*\ssrc=[\"']?(?:https?:)?//[^>]*"
    r"|<link\b(?=[^>]*rel=[\"']?stylesheet)[^>]*\shref=[\"']?(?:https?:)?//[^>]*"
)


def on_files(files: Any, config: Any) -> Any:
    """Add the pages that are files outside docs/."""
    from mkdocs.structure.files import File

    for name, source in PAGES.items():
        files.append(File.generated(config, name, content=(REPOSITORY / source).read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Render docstrings, and resolve links into the repository."""
    name = page.file.src_uri
    markdown = with_docstrings(markdown)
    source = REPOSITORY / PAGES.get(name, f"docs/{name}")
    pieces, end = [], 0
    for fence in _FENCE.finditer(markdown):
        pieces += [with_links(markdown[end : fence.start()], source), fence[0]]
        end = fence.end()
    return "".join([*pieces, with_links(markdown[end:], source)])


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse a page for which a browser would load something from another host."""
    if found := _EXTERNAL.search(output):
        raise ValueError(f"{page.file.src_uri} loads something from elsewhere: {found[0]}")
    return output


def with_docstrings(markdown: str) -> str:
    """Return the text with each entry of docs/api.md replaced by mkdocstrings' directive."""
    return _NAME.sub(r"::: \1", markdown)


def with_links(text: str, source: Path) -> str:
    """Return the text with links to files outside the site turned into their paths."""

    def settle(match: re.Match[str]) -> str:
        image, label, target = match.groups()
        path, _, anchor = target.partition("#")
        if not path or re.match(r"\w+:", path):
            return match[0]
        place = Path(os.path.normpath(source.parent / path))
        if not place.is_relative_to(REPOSITORY) or not place.exists():
            raise ValueError(f"{source.name} links to {target}, which doesn't exist")
        named = place.relative_to(REPOSITORY).as_posix()
        inside = next((page for page, file in PAGES.items() if file == named), None)
        if inside is None and named.startswith("docs/"):
            inside = named.removeprefix("docs/")
        if inside is not None:
            return f"{image}[{label}]({inside}{'#' * bool(anchor)}{anchor})"
        return f"`{named}`" if label.strip("`") == named else f"{label} (`{named}`)"

    return _LINK.sub(settle, text)
