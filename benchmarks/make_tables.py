"""Writes the tables of benchmarks/README.md from the newest result of each benchmark.

    python benchmarks/make_tables.py

Each table is between ``<!-- name -->`` and ``<!-- end -->``; everything else is unchanged.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from onepass_trl.wording import counted

HERE = Path(__file__).parent
CURVES = ("loss_curves",)  # a line per step: for make_plots.py only


def newest_results() -> dict[str, list[dict[str, Any]]]:
    """Return the newest run of each benchmark with a table on each machine, by its name."""
    runs = [json.loads(path.read_text()) for path in sorted((HERE / "results").glob("*.json"))]
    runs.sort(key=lambda run: run["date"])
    newest: dict[str, dict[str, dict[str, Any]]] = {}
    for run in runs:
        if run["name"] not in CURVES:
            newest.setdefault(run["name"], {})[device_of(run)] = run
    return {name: list(by_device.values()) for name, by_device in newest.items()}


def device_of(run: dict[str, Any]) -> str:
    machine = run["machine"]
    if machine.get("accelerator"):
        return machine["accelerator"]
    return f"{machine['cpu']} ({machine['isa']}), {counted(machine['threads'], 'thread')}"


def format_cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def format_table(run: dict[str, Any]) -> str:
    """Return the results as a Markdown table, preceded by what they were measured on."""
    results, versions = run["results"], run["versions"]
    lines = [
        f"`{run['command']}`  ",
        f"{device_of(run)}, torch {versions['torch']}, commit {run['commit']}, {run['date']}",
    ]
    if len(results) == 1:  # a single result reads better downwards
        lines += ["", "| figure | value |", "|---|---|"]
        lines += [f"| {column} | {format_cell(value)} |" for column, value in results[0].items()]
        return "\n".join(lines)
    same = [
        column
        for column in results[0]
        if all(result[column] == results[0][column] for result in results)
    ]
    if same:
        lines[-1] += "  "
        facts = [f"{column} {format_cell(results[0][column])}" for column in same]
        lines.append(", ".join(fact for fact in facts if not fact.endswith(" ")))
    columns = [column for column in results[0] if column not in (*same, "note")]
    lines += ["", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += [
        "| " + " | ".join(format_cell(result[c]) for c in columns) + " |" for result in results
    ]
    notes = [f"{result[columns[0]]}: {result['note']}" for result in results if result.get("note")]
    return "\n".join([*lines, *[""] * bool(notes), *notes])


def main() -> None:
    page = HERE / "README.md"
    text = page.read_text(encoding="utf-8")
    for name, runs in newest_results().items():
        tables = "\n\n".join(map(format_table, runs))
        text, count = re.subn(
            rf"(<!-- {name} -->\n).*?(<!-- end -->)",
            lambda match, tables=tables: f"{match[1]}\n{tables}\n\n{match[2]}",
            text,
            flags=re.DOTALL,
        )
        if count != 1:
            raise SystemExit(f"benchmarks/README.md has no place for {name!r}: add <!-- {name} -->")
    page.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
