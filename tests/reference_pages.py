"""The flags in docs/commands.md and the names in docs/api.md, from the parsers and the sources.

python -m tests.reference_pages    # writes both, 10 seconds

Only this package's own flags are listed, not TRL's, and signatures are written as in the sources.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import re
from collections.abc import Callable, Iterator
from itertools import zip_longest
from pathlib import Path
from typing import Any
from unittest import mock

from tests.pages import REPOSITORY, with_part

COMMANDS_PAGE = REPOSITORY / "docs" / "commands.md"
API_PAGE = REPOSITORY / "docs" / "api.md"
_WIDTH = 88  # of a signature in one line


class _Asked(Exception):
    """A parser was asked for its help."""


def parser_of(verb: str) -> argparse.ArgumentParser:
    """Return the parser that ``onepass-trl verb --help`` asks."""

    def stop(parser: argparse.ArgumentParser, file: Any = None) -> None:
        raise _Asked(parser)

    main = importlib.import_module(f"onepass_trl.cli.{verb}").main
    with mock.patch.object(argparse.ArgumentParser, "print_help", stop):
        try:
            main(["--help"])
        except _Asked as asked:
            parser: argparse.ArgumentParser = asked.args[0]
            return parser
    raise AssertionError(f"{verb} --help prints no help")


def inherited_flags(verb: str) -> set[str]:
    """Return the flags that a verb has from what it extends, by their destinations.

    They are TRL's and transformers' in `sft`, and those of `sft` in `setsft`.
    """
    if verb not in ("sft", "setsft"):
        return set()
    from trl import SFTConfig

    from onepass_trl.cli import sft
    from onepass_trl.training import OnePassSFTConfig

    parser = sft.parser_of(SFTConfig if verb == "sft" else OnePassSFTConfig, verb)
    return {action.dest for action in parser._actions}


def flags_table(verb: str) -> str:
    """Return the flags of a verb as a table, less those that it inherits."""
    parser = parser_of(verb)
    inherited = inherited_flags(verb)
    rows = []
    for action in parser._actions:
        if action.dest in {"help", *inherited} or action.help == argparse.SUPPRESS:
            continue
        text = (action.help or "") % {**vars(action), "prog": parser.prog}
        rows.append(f"| {_flag(action)} | {_default(action)} | {_escaped(text.rstrip('.'))} |")
    if not rows:
        return "It has no flags."
    return "\n".join(["| flag | default | |", "|---|---|---|", *rows])


def _flag(action: argparse.Action) -> str:
    """Return the spellings of a flag, the last with its values as ``--help`` shows them."""
    spellings = [
        name
        for name in action.option_strings
        if not any(name != other and name == _dashed(other) for other in action.option_strings)
    ]
    if not spellings:
        return f"`{action.metavar or action.dest}`"
    value = str(action.metavar or "")
    if action.choices is not None:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    if action.nargs in ("+", "*"):
        value += " .."
    return ", ".join(f"`{name}`" for name in [*spellings[:-1], f"{spellings[-1]} {value}".rstrip()])


def _dashed(flag: str) -> str:
    return "--" + flag[2:].replace("_", "-")


def _default(action: argparse.Action) -> str:
    if action.required:
        return "required"
    if action.default is None or action.default is False or action.default == argparse.SUPPRESS:
        return ""
    return f"`{action.default}`"


def _escaped(text: str) -> str:
    """Return a help text as Markdown: it may hold code in backticks, and no other markup."""
    pieces = text.replace("|", r"\|").split("`")
    pieces[::2] = [piece.replace("<", "&lt;").replace("*", r"\*") for piece in pieces[::2]]
    return "`".join(pieces)


def api_entry(path: str) -> str:
    """Return heading, signature and first line of what is defined at this dotted path."""
    module, _, name = path.rpartition(".")
    source = f"{module.replace('.', '/')}.py"
    tree = ast.parse((REPOSITORY / source).read_text("utf-8"))
    [node] = [
        node
        for node in tree.body
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name == name
    ]
    first, *_ = (ast.get_docstring(node) or "").split("\n\n")
    if isinstance(node, ast.ClassDef):
        bases = getattr(importlib.import_module(module), name).__mro__[1:]
        lines = _class(node, {known for base in bases for known in vars(base)})
    else:
        lines = _function(node)
    signature = "\n".join(lines)
    return (
        f"\n### [`{public_path(path)}`](../{source})\n\n"
        f"{' '.join(first.split())}\n\n```pyi\n{signature}\n```\n"
    )


def public_path(path: str) -> str:
    """Return the shortest dotted path from which a name may be imported."""
    module, _, name = path.rpartition(".")
    thing = getattr(importlib.import_module(module), name)
    parts = module.split(".")
    for length in range(1, len(parts)):
        package = importlib.import_module(".".join(parts[:length]))
        if name in getattr(package, "__all__", ()) and getattr(package, name) is thing:
            return f"{package.__name__}.{name}"
    return path


def _class(node: ast.ClassDef, inherited: set[str]) -> Iterator[str]:
    """Yield the lines of a class: its attributes or ``__init__``, and the methods that it adds."""
    yield from _decorators(node)
    bases = ", ".join(map(_source, node.bases))
    head = f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    body: list[str] = []
    methods = {item.name: item for item in node.body if isinstance(item, ast.FunctionDef)}
    if "__init__" not in methods:
        body += [
            f"    {_source(item.target)}: {_source(item.annotation)}{_value(item)}"
            for item in node.body
            if isinstance(item, ast.AnnAssign) and not _source(item.target).startswith("_")
            if not (_source(item.annotation).startswith("ClassVar") and item.target.id in inherited)
        ]
    for name, method in methods.items():
        if name == "__init__":
            body += _function(method, "    ")
        elif not (name.startswith("_") or name in inherited):
            body += [*_decorators(method, "    "), *_function(method, "    ")]
    yield from [head, *body] if body else [f"{head} ..."]


def _decorators(node: ast.ClassDef | ast.FunctionDef, indent: str = "") -> Iterator[str]:
    yield from (f"{indent}@{_source(decorator)}" for decorator in node.decorator_list)


def _value(item: ast.AnnAssign) -> str:
    """Return what is assigned to an attribute; of a dataclass's field or option, its default."""
    value = item.value
    if isinstance(value, ast.Call) and _source(value.func) == "field":
        defaults = [word.value for word in value.keywords if word.arg == "default"]
        value = defaults[0] if defaults else ast.Constant(...)
    elif isinstance(value, ast.Call) and _source(value.func) == "option":
        value = value.args[0]
    return f" = {_source(value)}" if value is not None else ""


def _function(node: ast.FunctionDef, indent: str = "") -> Iterator[str]:
    """Yield the lines of a signature: one, or one for each parameter where that is too long."""
    parameters = list(_parameters(node.args))
    returns = f" -> {_source(node.returns)}" if node.returns is not None else ""
    line = f"{indent}def {node.name}({', '.join(parameters)}){returns}: ..."
    if len(line) <= _WIDTH:
        yield line
        return
    yield f"{indent}def {node.name}("
    yield from (f"{indent}    {parameter}," for parameter in parameters)
    yield f"{indent}){returns}: ..."


def _parameters(arguments: ast.arguments) -> Iterator[str]:
    positional = [*arguments.posonlyargs, *arguments.args]
    backwards = zip_longest(reversed(positional), reversed(arguments.defaults))
    for number, (argument, default) in enumerate(reversed(list(backwards)), start=1):
        yield _parameter(argument, default)
        if number == len(arguments.posonlyargs):
            yield "/"
    if arguments.vararg is not None:
        yield f"*{_source(arguments.vararg)}"
    elif arguments.kwonlyargs:
        yield "*"
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield _parameter(argument, default)
    if arguments.kwarg is not None:
        yield f"**{_source(arguments.kwarg)}"


def _source(node: ast.AST) -> str:
    """Return the node as source, with strings in double quotes where that needs no escapes."""
    return re.sub(r"""'([^'"]*)'""", r'"\1"', ast.unparse(node))


def _parameter(argument: ast.arg, default: ast.expr | None) -> str:
    equals = " = " if argument.annotation is not None else "="
    return _source(argument) + (f"{equals}{_source(default)}" if default else "")


PAGES: dict[Path, tuple[str, Callable[[str], str]]] = {
    COMMANDS_PAGE: ("flags", flags_table),
    API_PAGE: ("api", api_entry),
}


def named_in(page: str, kind: str) -> list[str]:
    """Return the names of the generated parts of a page: ``<!-- kind: name -->``."""
    return re.findall(rf"^<!-- {kind}: ([\w.]+) -->$", page, flags=re.MULTILINE)


def page_with_parts(path: Path, text: str) -> str:
    """Return the text of one of `PAGES` with its parts as they are now."""
    kind, make = PAGES[path]
    for name in named_in(text, kind):
        text = with_part(text, f"{kind}: {name}", make(name))
    return text


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(page_with_parts(path, path.read_text("utf-8")), "utf-8")
