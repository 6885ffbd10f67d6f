"""Results of benchmarks as tables of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from onepass_trl.visibility import TILE
from onepass_trl.wording import counted

_TIMES = ("forward", "backward", "total")


def attention_table(results: Sequence[Mapping[str, Any]]) -> str:
    """Return the results of `measure_attention` as lines of text."""
    first = results[0]
    groups = "" if first["heads"] == first["kv_heads"] else f" ({first['kv_heads']} of keys)"
    lines = [
        "Attention of one layer without a window: "
        f"{counted(first['seq'], 'token')}, {counted(first['heads'], 'head')}{groups} of size "
        f"{first['head_dim']}, {first['dtype']}",
        f"useful pairs: {first['useful_share_of_causal']:.3f} of the causal ones; executed / "
        f"useful: {first['executed_over_useful']:.2f} (tiles of {TILE} x {TILE}, onepass cpu)",
        f"ms, smallest and median of {counted(first['repeats'], 'repeat')}; x: times as long as "
        f"{first['implementation']}",
        "",
        f"{'':16}{'forward':>15}{'backward':>20}{'both':>18}{'x':>13}",
    ]
    for result in results:
        cells = [
            f"{_number(result[f'{name}_min_ms'])} {_number(result[f'{name}_median_ms'])}"
            for name in _TIMES
        ]
        ratio = "-" if result["times_onepass"] is None else f"{result['times_onepass']:.2f}"
        lines.append(f"{result['implementation']:16}{' '.join(cells)}{ratio:>9}")
    notes = [
        f"{result['implementation']}: {result['note']}" for result in results if result["note"]
    ]
    return "\n".join([*lines, *[""][: len(notes)], *notes])


def step_table(result: Mapping[str, Any]) -> str:
    """Return the result of `measure_step` as lines of text."""
    lines = [
        f"Training step on {counted(result['conversations'], 'conversation')}, smallest and median "
        f"of {counted(result['repeats'], 'repeat')}: forward, loss and backward of each row, one "
        "row per batch, and AdamW",
        f"turns: {result['turns']:,}; executed / useful pairs of one pass: "
        f"{result['executed_over_useful']:.2f} (tiles of {TILE} x {TILE}, layers without a window)",
        "",
        f"{'':32}{'tokens':>11}{'seconds, min':>15}{'median':>10}{'tokens / s':>13}{'loss':>10}",
    ]
    names = {"n_pass": "N-pass (TRL's SFTTrainer)", "one_pass": "one pass (OnePassSFTTrainer)"}
    for way, name in names.items():
        tokens, seconds = result[f"{way}_tokens"], result[f"{way}_min_seconds"]
        line = f"{name:32}{tokens:11,}"
        if seconds is not None:
            line += f"{seconds:15.3f}{result[f'{way}_median_seconds']:10.3f}"
            line += f"{tokens / seconds:13,.0f}{result[f'{way}_loss']:10.4f}"
        lines.append(line)
    if result["note"] is not None:
        lines.append(f"not measured: {result['note']}")
    if result["speedup"] is not None:
        lines += [
            "",
            f"One pass is {result['speedup']:.2f} times as fast; N-pass has "
            f"{result['token_ratio']:.2f} times the tokens. The losses of a step differ by at "
            f"most {result['largest_loss_difference']:.1e}, relative to N-pass.",
        ]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    if value is None:
        return f"{'-':>9}"
    return f"{value:9.2f}" if value < 100 else f"{value:9,.0f}"
