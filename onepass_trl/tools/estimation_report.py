"""An estimate in words and as JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

from onepass_trl.attention.implementations.varlen import MAX_KEYS_PER_TOKEN
from onepass_trl.preparation.report import describe_invalid
from onepass_trl.tools.estimation import Estimate, Work, weighted_pairs
from onepass_trl.tools.single_rendering import Training
from onepass_trl.wording import counted

if TYPE_CHECKING:
    from onepass_trl.tools.step_time import StepTime

PARTS = {"linear": "linear", "attention": "attention", "head": "LM head"}  # of `Estimate.flops`
_BAR = 30  # characters of the longest bar
_BINS = 12  # lines of the histogram, at most
_LONGEST = 3  # conversations named


def report(found: Estimate, *, times: tuple[StepTime, StepTime] | None = None) -> Iterator[str]:
    """Yield an estimate as lines of text; `times` are those of one pass and N-pass, if measured."""
    yield f"{'':24}{'one pass':>20}{'N-pass':>20}{'ratio':>9}"
    one, n = found.one_pass, found.n_pass
    yield _line("tokens", one.tokens, n.tokens)
    yield _line("rows, before packing", one.rows, n.rows)
    weights = found.attention_weights
    pairs = [weighted_pairs(work.pairs, weights) / sum(weights.values()) for work in (one, n)]
    yield _line("attention pairs a layer", *map(round, pairs))
    if n.images:
        yield _line("images encoded", one.images, n.images)
        yield _line("image tokens", one.image_tokens, n.image_tokens)
    if found.cost is not None:
        flops = [found.flops(work) for work in (one, n)]
        for part, name in PARTS.items():
            yield _line(f"operations, {name}", *(way[part] for way in flops))
        yield _line("operations, all", *(sum(way.values()) for way in flops))
    if times is not None:
        seconds = [time.seconds(work) for time, work in zip(times, (one, n), strict=True)]
        yield _line("seconds on this device", *seconds)
    yield ""
    yield from _prediction(found, times)
    yield (
        f"The tiles that one pass executes have {found.executed_over_useful:.2f} times the pairs "
        "that see each other."
    )
    keys = found.gathered_keys_per_token
    choice = "FlexAttention" if keys > MAX_KEYS_PER_TOKEN else "them"
    yield (
        f"torch's variable-length kernels (attention_impl='varlen') gather {keys:.2f} keys per "
        f"token: where no CUDA kernel of this package is validated, 'auto' takes {choice}."
    )
    yield from _rows(found)
    yield from _remarks(found)
    if found.invalid:
        yield f"Training with invalid_turns=error would stop: {describe_invalid(found.invalid)}"
    if found.has_reasoning:
        yield ""
        yield from single_rendering(found.single_rendering)
    yield ""
    yield from histogram(found.num_turns.tolist())


def single_rendering(ways: Mapping[str, Training]) -> Iterator[str]:
    """Yield what ways of training make of turns as lines of text, one pass last."""
    turns = next(iter(ways.values())).turns
    yield f"How one rendering of each conversation would train {counted(turns, 'turn')} (tokens):"
    columns = ("as at inference", "not at all", "without reasoning", "in another context")
    yield " " * 16 + "".join(f"{column:>24}" for column in columns)
    for way, made in {**ways, "one pass": Training(turns, faithful=turns)}.items():
        counts = (
            (made.untrained, made.untrained_tokens),
            (made.unreasoned, made.unreasoned_tokens),
            (made.displaced, made.displaced_tokens),
        )
        cells = [f"{number:,} ({tokens:,})" if number else "-" for number, tokens in counts]
        cells.insert(0, f"{made.faithful:,}")
        yield f"{way:16}" + "".join(f"{cell:>24}" for cell in cells)


def _line(name: str, one_pass: float, n_pass: float) -> str:
    ratio = f"{n_pass / one_pass:.2f}" if one_pass else "-"
    return f"{name:24}{_number(one_pass):>20}{_number(n_pass):>20}{ratio:>9}"


def _number(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3g}" if value < 1e4 else f"{value:.3e}"


def _prediction(found: Estimate, times: tuple[StepTime, StepTime] | None) -> Iterator[str]:
    if times is not None:
        one, n = times[0].seconds(found.one_pass), times[1].seconds(found.n_pass)
        # As many rows as coefficients are always fitted exactly.
        num_coefficients = 4 if found.n_pass.images else 3
        errors = [time.largest_error for time in times if time.num_rows > num_coefficients]
        fitted = f" (fitted to within {max(errors):.0%})" if errors else ""
        yield (
            f"Predicted: N-pass takes {n / one:.2f} times as long, from "
            f"{counted(times[0].num_rows, 'row')} and {counted(times[1].num_rows, 'turn')} of up "
            f"to {max(time.longest for time in times):,} tokens that ran on this device{fitted}."
        )
    if found.cost is None:
        yield (
            "The model's folder has no configuration, so its operations aren't known: no step-time "
            "ratio is predicted."
        )
        return
    every_position = "every position, as TRL's does on a CPU"
    scored = every_position if found.scores_every_position else "targets only"
    verb = "By operations alone" if times is not None else "Predicted by operations"
    yield (
        f"{verb}: N-pass takes {found.flops_ratio:.2f} times as long, if all operations are "
        f"equally fast ({found.cost.name}, {_size(found.cost.num_parameters)} parameters; without "
        f"activation checkpointing; an LM head that scores {scored})."
    )
    if found.n_pass.images:
        yield "The operations of the vision tower are left out: it encodes the images given above."


def _size(number: int) -> str:
    return f"{number / 1e9:.3g}B" if number >= 1e9 else f"{number / 1e6:.3g}M"


def _rows(found: Estimate) -> Iterator[str]:
    longest = np.argsort(-found.longest_path, kind="stable")[:_LONGEST]
    named = ", ".join(f"{found.longest_path[at]:,} (row {found.indices[at]})" for at in longest)
    yield f"Longest turns with their contexts, in tokens: {named}."
    if found.max_length is None:
        yield (
            "No --max_length: every conversation is one row, of at most "
            f"{found.row_tokens.max():,} tokens."
        )
        return
    lost = found.overflow
    if lost.num_passes:
        yield (
            f"Overflow: {counted(lost.num_passes, 'turn is', 'turns are')} longer than max_length "
            f"{found.max_length:,}; "
            f"{counted(lost.num_lost_tokens, 'trained token is', 'trained tokens are')} lost, "
            f"{counted(lost.num_lost_turns, 'turn')} whole, "
            f"{counted((found.num_turns == 0).sum(), 'conversation')} whole. max_length "
            f"{lost.longest:,} keeps them all."
        )
    else:
        yield f"No turn is longer than max_length {found.max_length:,}."
    if found.num_split:
        split = counted(found.num_split, "conversation is", "conversations are")
        yield f"{split} split into several rows; nothing is lost."
    assert found.packed_rows is not None
    room = found.packed_rows * found.max_length
    yield (
        f"Packing: {counted(found.one_pass.rows, 'row becomes', 'rows become')} "
        f"{found.packed_rows:,}, {found.one_pass.tokens / room:.1%} full ("
        f"{counted(room - found.one_pass.tokens, 'token')} of padding if rows were padded to "
        "max_length)."
    )


def _remarks(found: Estimate) -> Iterator[str]:
    if found.num_turns.max() <= 1:
        yield "No conversation has two trained turns, so one pass computes the same as N-pass."
        return
    num_branching = int(found.branches.sum())
    if num_branching == 0:
        yield (
            "No token occurs twice: on these conversations the template keeps every turn in later "
            "contexts as it was generated, so no duplication is needed. Each row is an ordinary "
            "causal sequence in which all its turns are trained."
        )
    else:
        tokens = [x[found.branches].sum() for x in (found.n_pass_tokens, found.row_tokens)]
        verb = "branches" if num_branching == 1 else "branch"
        yield (
            f"{num_branching:,} of {counted(len(found.branches), 'conversation')} {verb}: turns "
            f"occur twice there, and N-pass computes {tokens[0] / tokens[1]:.2f} times the tokens."
        )
    if found.has_reasoning is False:
        yield (
            "No trained turn has reasoning. One pass still saves "
            f"{1 - 1 / found.token_ratio:.0%} of the tokens."
        )


def histogram(num_turns: list[int]) -> Iterator[str]:
    """Yield a histogram of turns as lines of text.

    >>> print(*histogram([3, 3, 1]), sep="\\n")
    trained turns  conversations
                1  ███████████████ 1
                3  ██████████████████████████████ 2
    """
    yield "trained turns  conversations"
    bins = turn_bins(num_turns)
    largest = max(bins.values())
    for name, count in bins.items():
        yield f"{name:>13}  {'█' * max(round(_BAR * count / largest), 1)} {count:,}"


def turn_bins(num_turns: list[int]) -> dict[str, int]:
    """Return how many conversations have each number of turns, in ranges if there are many.

    >>> turn_bins([3, 3, 1])
    {'1': 1, '3': 2}
    """
    counts = Counter(num_turns)
    if len(counts) <= _BINS:
        return {str(number): counts[number] for number in sorted(counts)}
    edges = np.unique(np.geomspace(1, max(counts) + 1, _BINS + 1).round().astype(int))
    edges[0] = min(min(counts), 1)
    bins = {}
    for begin, end in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        number = sum(count for turns, count in counts.items() if begin <= turns < end)
        if number:
            bins[str(begin) if end == begin + 1 else f"{begin}-{end - 1}"] = number
    return bins


def as_json(found: Estimate, *, times: tuple[StepTime, StepTime] | None = None) -> dict[str, Any]:
    """Return all figures of an estimate, as `json` writes them."""
    one, n = found.one_pass, found.n_pass
    value: dict[str, Any] = {
        "conversations": len(found.num_turns),
        "max_length": found.max_length,
        "one_pass": _work_json(one),
        "n_pass": _work_json(n),
        "token_ratio": found.token_ratio,
        "executed_over_useful": found.executed_over_useful,
        "gathered_keys_per_token": found.gathered_keys_per_token,
        "packed_rows": found.packed_rows,
        "split_conversations": found.num_split,
        "overflow": asdict(found.overflow),
        "has_reasoning": found.has_reasoning,
        "invalid": found.invalid,
        "branching_conversations": int(found.branches.sum()),
        "turns": turn_bins(found.num_turns.tolist()),
        "single_rendering": {way: asdict(made) for way, made in found.single_rendering.items()},
    }
    if found.cost is not None:
        value["model"] = asdict(found.cost)
        value["flops"] = {"one_pass": found.flops(one), "n_pass": found.flops(n)}
        value["scores_every_position"] = found.scores_every_position
        value["flops_ratio"] = found.flops_ratio
    if times is not None:
        seconds = [time.seconds(work) for time, work in zip(times, (one, n), strict=True)]
        value["seconds"] = {"one_pass": seconds[0], "n_pass": seconds[1]}
        value["time_ratio"] = seconds[1] / seconds[0]
        value["fit_error"] = max(time.largest_error for time in times)
    return value


def _work_json(work: Work) -> dict[str, Any]:
    return {
        "rows": work.rows,
        "tokens": work.tokens,
        "scored": work.scored,
        "images": work.images,
        "image_tokens": work.image_tokens,
        "pairs": {_window_name(window): number for window, number in work.pairs.items()},
        "executed_pairs": {
            _window_name(window): number for window, number in work.executed.items()
        },
    }


def _window_name(window: int | None) -> str:
    return "full" if window is None else str(window)
