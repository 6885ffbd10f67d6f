"""What mkdocs.yml can't say: pages made of files outside docs/, help of the command, links.

mkdocs calls the functions whose names begin with ``on_``.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import re
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parents[1]
# Pages of the site that are files elsewhere in the repository.
PAGES = {
    "architecture.md": "ARCHITECTURE.md",
    "contributing.md": "CONTRIBUTING.md",
    "benchmarks.md": "benchmarks/README.md",
}
_FENCE = re.compile(r"^(`{3,}).*?^\1`*$", re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)\s]+)\)")
# What a browser would fetch from another host, as against links that a reader may follow.
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
    """Fill in what the verbs print for --help, and settle links into the repository."""
    name = page.file.src_uri
    markdown = with_help(markdown)
    source = REPOSITORY / PAGES.get(name, f"docs/{name}")
    pieces, end = [], 0
    for fence in _FENCE.finditer(markdown):
        pieces += [with_links(markdown[end : fence.start()], source), fence[0]]
        end = fence.end()
    return "".join([*pieces, with_links(markdown[end:], source)])


def on_post_page(output: str, page: Any, **_: Any) -> str:
    """Refuse a page that a browser would complete from another host."""
    if found := _EXTERNAL.search(output):
        raise ValueError(f"{page.file.src_uri} loads something from elsewhere: {found[0]}")
    return output


def with_help(markdown: str) -> str:
    """Return the text with `<!-- help: verb -->` replaced by what the verb prints for --help.

    `<!-- help: others -->` stands for a section of each verb that the text doesn't name.
    """
    from onepass_trl.cli import VERBS

    named = re.findall(r"^<!-- help: (\w+) -->$", markdown, flags=re.MULTILINE)
    others = [verb for verb in VERBS if verb not in named]
    sections = [
        f"## {verb}\n\n{_sentence(VERBS[verb])}\n\n<!-- help: {verb} -->" for verb in others
    ]
    markdown = markdown.replace("<!-- help: others -->", "\n\n".join(sections))
    return re.sub(
        r"^<!-- help: (\w+) -->$", lambda match: _help_block(match[1]), markdown, flags=re.MULTILINE
    )


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:] + "."


def _help_block(verb: str) -> str:
    lines = [f'??? note "onepass-trl {verb} --help"', "", "    ```text"]
    lines += [f"    {line}".rstrip() for line in help_of(verb).splitlines()]
    return "\n".join([*lines, "    ```"])


def help_of(verb: str) -> str:
    """Return what ``onepass-trl verb --help`` prints, 88 columns wide."""
    output = io.StringIO()
    columns, os.environ["COLUMNS"] = os.environ.get("COLUMNS"), "90"
    try:
        main = importlib.import_module(f"onepass_trl.cli.{verb}").main
        with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
            main(["--help"])
    finally:
        os.environ.pop("COLUMNS")
        if columns is not None:
            os.environ["COLUMNS"] = columns
    return output.getvalue()


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
