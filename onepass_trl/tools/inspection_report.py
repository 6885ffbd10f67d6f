"""The figures of an inspected row in words, for the terminal and for the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from onepass_trl.tools.estimation import work_of_row
from onepass_trl.tools.flops import AttentionLayers
from onepass_trl.tools.inspection import Branch, Inspection
from onepass_trl.visibility import TILE
from onepass_trl.wording import counted


def name_of(branch: Branch) -> str:
    """Return the name of a branch."""
    if branch.turns == 1:
        return f"branch of turn {branch.last_turn}"
    return f"branch of {branch.turns} turns, the last is turn {branch.last_turn}"


def figures(found: Inspection, layers: Sequence[AttentionLayers] = ()) -> Iterator[str]:
    """Yield the row's figures as lines of text.

    `layers` are those of the model, if it is known: those with a window have separate figures.
    """
    skipped, partial, full = found.tiles
    executed = partial + full
    num_turns, n_pass_pairs = len(found.pass_lengths), found.n_pass_pairs()
    yield (
        f"tokens: one pass {len(found.row):,}, N-pass {found.n_pass_tokens:,} in "
        f"{counted(num_turns, 'pass', 'passes')} = {found.token_ratio:.2f} x"
    )
    yield (
        f"attention pairs: one pass {found.pairs:,}, N-pass {n_pass_pairs:,} = "
        f"{n_pass_pairs / found.pairs:.2f} x (layers without a window)"
    )
    yield (
        f"tiles of {TILE} x {TILE}: {executed:,} executed ({full:,} full, {partial:,} partial), "
        f"{skipped:,} skipped; {found.pairs / TILE**2:,.1f} tiles' worth of pairs are useful, "
        f"{found.pairs / TILE**2 / executed:.0%} of what is executed"
    )
    for layer in layers:
        if layer.window is not None:
            yield _in_window(found, layer.window, layer.num_layers)
    if found.row.images:
        num_images, n_pass_images = len(found.row.images), found.n_pass_images
        yield (
            f"images: one pass encodes {num_images:,}, N-pass {n_pass_images:,} = "
            f"{n_pass_images / num_images:.2f} x"
        )
    trained, copies = int(found.trained[~found.is_copy].sum()), int(found.is_copy.sum())
    yield f"trained tokens: {trained:,}; fork copies: {copies}"


def _in_window(found: Inspection, window: int, num_layers: int) -> str:
    one_pass = work_of_row(found.row, [window], found.begins)
    pairs, n_pass_pairs = one_pass.pairs[window], found.n_pass_pairs(window)
    return (
        f"in the {f'{num_layers} layers' if num_layers > 1 else 'layer'} with a window of "
        f"{window:,}: one pass {pairs:,} pairs, N-pass "
        f"{n_pass_pairs:,} = {n_pass_pairs / pairs:.2f} x; "
        f"{counted(one_pass.executed[window] // TILE**2, 'tile')} executed"
    )


def remarks(found: Inspection) -> Iterator[str]:
    """Yield what is special about the row, as sentences."""
    num_turns = len(found.pass_lengths)
    if num_turns == 1:
        yield "Only one turn is trained, so one pass computes the same as N-pass."
        return
    if found.is_chain:
        yield (
            "The template keeps every turn in later contexts as it was generated, so no "
            "duplication is needed: the row is the last pass, an ordinary causal sequence in "
            "which all turns are trained."
        )
    if found.has_reasoning is False:
        yield (
            "No trained turn has reasoning. One pass still saves "
            f"{1 - 1 / found.token_ratio:.0%} of the tokens that {num_turns} passes would compute."
        )
