"""What one pass saves on a dataset: tokens, attention, operations, rows. No model is run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from onepass_trl.attention.implementations.varlen import chains_of
from onepass_trl.chat.processing import ProcessingClass
from onepass_trl.data import Layout, Overflow, build_tree, linearize, pack
from onepass_trl.data.image_positions import image_blocks
from onepass_trl.passes import IGNORE_INDEX, ImageSpan, Pass
from onepass_trl.preparation.datasets import PACK_BATCH_SIZE
from onepass_trl.preparation.options import PreparationOptions
from onepass_trl.preparation.report import describe_invalid
from onepass_trl.preparation.rows import lay_out, render_record
from onepass_trl.tools.flops import (
    ATTENTION_FORWARDS,
    HEAD_FORWARDS,
    LINEAR_FORWARDS,
    AttentionLayers,
    ModelCost,
)
from onepass_trl.tools.single_rendering import Training, train_on_one_rendering
from onepass_trl.visibility import TILE, causal_visible_end, num_executed_pairs, num_visible_pairs
from onepass_trl.vision import Vision, vision_of
from onepass_trl.wording import counted

if TYPE_CHECKING:
    from datasets import Features

Begins: TypeAlias = Mapping[int | None, NDArray[np.int32]]
"""The `visible_begin` of a row, by the windows of the layers that see its images in both
directions. In others it has none."""
NO_BLOCKS: Begins = MappingProxyType({})


@dataclass
class Work:
    """What one way of training computes for some rows.

    Attributes:
        rows: sequences.
        tokens: their tokens.
        scored: positions whose next token is scored.
        pairs: (query, key) pairs that see each other, by the window of the layer.
        executed: pairs in the tiles of 64 x 64 that contain such a pair, by window.
        images: that a vision tower encodes.
        image_tokens: the tokens of these, of which the tower computes most or all.
    """

    rows: int = 0
    tokens: int = 0
    scored: int = 0
    pairs: Counter[int | None] = field(default_factory=Counter)
    executed: Counter[int | None] = field(default_factory=Counter)
    images: int = 0
    image_tokens: int = 0

    def add(self, other: Work) -> None:
        """Add the counts of `other`."""
        for name in (column.name for column in fields(self)):
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(frozen=True, eq=False)
class Estimate:
    """What one pass and N-pass compute on the same conversations.

    Arrays have shape ``(num_conversations,)``.

    Attributes:
        indices: of the conversations in their dataset.
        one_pass: the rows of the prefix trees.
        n_pass: one row for each turn.
        num_turns: trained turns of each conversation; 0 if none is left.
        row_tokens: tokens of each conversation in one pass.
        n_pass_tokens: its tokens in N-pass.
        longest_path: tokens of the longest turn with its context, before the overflow policy.
        gathered_keys: keys that torch's variable-length kernels gather for the rows of one pass.
        num_split: conversations that `max_length` splits into several rows.
        overflow: what the overflow policy takes away.
        packed_rows: rows after packing; None without `max_length`.
        max_length: limit of a row, None without one.
        has_reasoning: whether any trained turn has reasoning; None if messages aren't known.
        invalid: why no exact pass can be made of other turns or records, each with its record.
        branches: whether a conversation's turns are not a single path, so that tokens occur twice.
        single_rendering: what the ways to train on one rendering would make of the turns, before
            ``max_length``; none where messages aren't known.
        cost: of the model, None if it isn't known.
        scores_every_position: whether the LM head also scores positions without a target, as TRL's
            fused one does on a CPU; on an accelerator it skips them.
    """

    indices: NDArray[np.int64]
    one_pass: Work
    n_pass: Work
    num_turns: NDArray[np.int64]
    row_tokens: NDArray[np.int64]
    n_pass_tokens: NDArray[np.int64]
    longest_path: NDArray[np.int64]
    gathered_keys: int
    num_split: int
    overflow: Overflow
    packed_rows: int | None
    max_length: int | None
    has_reasoning: bool | None
    invalid: list[str]
    branches: NDArray[np.bool_]
    single_rendering: dict[str, Training]
    cost: ModelCost | None
    scores_every_position: bool

    @property
    def token_ratio(self) -> float:
        """Tokens of N-pass over those of one pass."""
        return self.n_pass.tokens / self.one_pass.tokens

    @property
    def executed_over_useful(self) -> float:
        """Pairs in the tiles that one pass executes, over pairs that see each other."""
        windows = self.attention_weights
        return weighted_pairs(self.one_pass.executed, windows) / weighted_pairs(
            self.one_pass.pairs, windows
        )

    @property
    def gathered_keys_per_token(self) -> float:
        """Keys that torch's variable-length kernels gather, over the tokens of one pass."""
        return self.gathered_keys / self.one_pass.tokens

    @property
    def attention_weights(self) -> dict[int | None, int]:
        """Operations of a forward per pair, all layers together, by window."""
        if self.cost is None:
            return {None: 1}
        weights: Counter[int | None] = Counter()
        for layers in self.cost.attention:
            weights[layers.window] += layers.num_layers * layers.flops_per_pair
        return dict(weights)

    def flops(self, work: Work) -> dict[str, float]:
        """Return the operations of forward and backward over ``one_pass`` or ``n_pass``, by part.

        ``linear`` are products with the weights, ``attention`` scores and weighted sums of the
        pairs that see each other, ``head`` products with the LM head. Those of a vision tower and
        of the optimizer are left out.

        Raises:
            ValueError: if the cost of the model isn't known.
        """
        if self.cost is None:
            raise ValueError("the operations of a step depend on the model: pass its cost")
        scored = work.tokens if self.scores_every_position else work.scored
        pairs = weighted_pairs(work.pairs, self.attention_weights)
        return {
            "linear": LINEAR_FORWARDS * self.cost.linear_flops * work.tokens,
            "attention": ATTENTION_FORWARDS * pairs,
            "head": HEAD_FORWARDS * self.cost.head_flops * scored,
        }

    @property
    def flops_ratio(self) -> float:
        """Operations of N-pass over those of one pass: the step-time ratio if all were as fast."""
        n_pass, one_pass = (sum(self.flops(x).values()) for x in (self.n_pass, self.one_pass))
        return n_pass / one_pass


def estimate(
    records: Iterable[tuple[int, Mapping[str, Any]]],
    tokenizer: ProcessingClass,
    options: PreparationOptions,
    cost: ModelCost | None = None,
    *,
    features: Features | None = None,
    no_images: str | None = None,
    scores_every_position: bool = False,
) -> Estimate:
    """Return what one pass and N-pass would compute on the conversations of `records`.

    N-pass is assumed to have one row for each turn, without padding.

    Args:
        records: of a dataset, in any form that `render_record` reads, each after its index.
        tokenizer: a tokenizer or processor with a chat template.
        cost: of the model, see `model_cost`.
        no_images: why the model can't be trained on images, None if it can or isn't known.
        scores_every_position: see `Estimate`.

    Raises:
        ValueError: if there are no records, nothing is left to train, or a record can't be read or
            rendered (the message names it) and the options don't leave it out, or has images that
            the model can't be trained on.
    """
    layers = cost.attention if cost else ()
    counts = [
        _count(index, record, tokenizer, options, features, layers, no_images)
        for index, record in records
    ]
    if not counts:
        raise ValueError("there is no conversation to estimate: the dataset has no rows")
    one_pass, n_pass, lost = Work(), Work(), Overflow()
    single_rendering: dict[str, Training] = {}
    for count in counts:
        one_pass.add(count.one_pass)
        n_pass.add(count.n_pass)
        lost.add(count.overflow)
        for way, training in count.single_rendering.items():
            single_rendering.setdefault(way, Training()).add(training)
    invalid = [problem for count in counts for problem in count.invalid]
    if not any(count.overflow.longest for count in counts):
        raise ValueError(describe_invalid(invalid))
    if one_pass.tokens == 0:
        raise ValueError(
            f"nothing is left to train: {counted(lost.num_passes, 'turn is', 'turns are all')} "
            f"longer than max_length {options.max_length} (the longest has {lost.longest} tokens "
            "with its context). Raise max_length"
        )
    reasoning = [count.has_reasoning for count in counts if count.has_reasoning is not None]
    return Estimate(
        indices=np.array([count.index for count in counts]),
        one_pass=one_pass,
        n_pass=n_pass,
        num_turns=np.array([count.n_pass.rows for count in counts]),
        row_tokens=np.array([count.one_pass.tokens for count in counts]),
        n_pass_tokens=np.array([count.n_pass.tokens for count in counts]),
        longest_path=np.array([count.overflow.longest for count in counts]),
        gathered_keys=sum(count.gathered_keys for count in counts),
        num_split=sum(len(count.lengths) > 1 for count in counts),
        overflow=lost,
        packed_rows=_packed_rows([count.lengths for count in counts], options.max_length),
        max_length=options.max_length,
        has_reasoning=any(reasoning) if reasoning else None,
        invalid=invalid,
        branches=np.array([count.branches for count in counts]),
        single_rendering=single_rendering,
        cost=cost,
        scores_every_position=scores_every_position,
    )


@dataclass(frozen=True)
class _Count:
    """The counts of one conversation; `lengths` are those of its rows."""

    index: int
    one_pass: Work
    n_pass: Work
    lengths: list[int]
    gathered_keys: int
    overflow: Overflow
    has_reasoning: bool | None
    invalid: list[str]
    branches: bool
    single_rendering: dict[str, Training]


def _count(
    index: int,
    record: Mapping[str, Any],
    tokenizer: ProcessingClass,
    options: PreparationOptions,
    features: Features | None,
    layers: Sequence[AttentionLayers],
    no_images: str | None,
) -> _Count:
    try:
        rendered = render_record(
            record, tokenizer, options, features=features, verify=options.verifies(index)
        )
        if no_images and any(pass_.images for pass_ in rendered.passes):
            raise ValueError(f"it has images, but {no_images}")
        passes, layouts, lost = lay_out(rendered.passes, options)
    except ValueError as error:
        raise ValueError(f"row {index} of the dataset: {error}") from error
    one_pass, n_pass = Work(), Work()
    windows = {None, *(kind.window for kind in layers)}
    vision = vision_of(tokenizer)
    for layout in layouts:
        one_pass.add(work_of_row(layout, windows, visible_begins(layout, layers, vision)))
    seeing = [kind.window for kind in layers if kind.sees_blocks]
    for pass_ in passes:
        n_pass.add(work_of_pass(pass_, windows, seeing, vision))
    return _Count(
        index=index,
        one_pass=one_pass,
        n_pass=n_pass,
        lengths=[len(layout) for layout in layouts],
        gathered_keys=sum(chains_of(layout.visible_end[None]).keys.size for layout in layouts),
        overflow=lost,
        has_reasoning=rendered.has_reasoning,
        invalid=[f"row {index}: {problem}" for problem in rendered.invalid],
        branches=len(passes) > 1 and one_pass.tokens > max(map(len, passes)),
        single_rendering=train_on_one_rendering(rendered, tokenizer) if rendered.turns else {},
    )


def visible_begins(row: Layout, layers: Sequence[AttentionLayers], vision: Vision | None) -> Begins:
    """Return the `visible_begin` of a row in the layers that see its images in both directions.

    Args:
        row: the row.
        layers: of the model.
        vision: of the model's processor, for a row with images.
    """
    return _begins(row, [kind.window for kind in layers if kind.sees_blocks], vision)


def _begins(row: Layout, seeing: Sequence[int | None], vision: Vision | None) -> Begins:
    if not seeing or not row.images:
        return {}
    assert vision is not None
    return dict.fromkeys(seeing, image_blocks(row, vision.is_image(row.input_ids)))


def work_of_row(row: Layout, windows: Iterable[int | None], begins: Begins = NO_BLOCKS) -> Work:
    """Return what one pass computes for a row, by the windows of layers."""
    work = Work(
        rows=1,
        tokens=len(row),
        scored=int(np.count_nonzero(row.shift_labels != IGNORE_INDEX)),
        images=len(row.images),
        image_tokens=_image_tokens(row.images),
    )
    for window in windows:
        arguments = row.visible_end, row.position_ids, window, begins.get(window)
        work.pairs[window] = num_visible_pairs(*arguments)
        work.executed[window] = num_executed_pairs(*arguments)
    return work


def work_of_pass(
    pass_: Pass,
    windows: Iterable[int | None],
    seeing: Sequence[int | None],
    vision: Vision | None,
) -> Work:
    """Return what N-pass computes for one pass, if its kernels skip tiles no query sees.

    Args:
        pass_: the pass.
        windows: of layers.
        seeing: the windows of those that see images in both directions.
        vision: of the model's processor, for a pass with images.
    """
    if pass_.images and seeing:
        alone = linearize(build_tree([pass_]))
        return work_of_row(alone, windows, _begins(alone, seeing, vision))
    return work_of_causal_pass(len(pass_), pass_.num_trained, windows, pass_.images)


def work_of_causal_pass(
    num_tokens: int,
    num_trained: int,
    windows: Iterable[int | None],
    images: Sequence[ImageSpan] = (),
) -> Work:
    """Return what N-pass computes for a pass in layers that see it causally."""
    work = Work(
        rows=1,
        tokens=num_tokens,
        scored=num_trained,
        images=len(images),
        image_tokens=_image_tokens(images),
    )
    for window in windows:
        span = num_tokens if window is None else min(window, num_tokens)
        work.pairs[window] = span * (span + 1) // 2 + (num_tokens - span) * span
        if window is None:
            side = -(-num_tokens // TILE)
            work.executed[window] = side * (side + 1) // 2 * TILE**2
        else:
            positions = np.arange(num_tokens, dtype=np.int32)
            ends = causal_visible_end(num_tokens)
            work.executed[window] = num_executed_pairs(ends, positions, window)
    return work


def _image_tokens(images: Sequence[ImageSpan]) -> int:
    return sum(image.end - image.begin for image in images)


def _packed_rows(lengths: Sequence[Sequence[int]], max_length: int | None) -> int | None:
    """Return how many rows packing leaves, for batches as the trainer packs them."""
    if max_length is None:
        return None
    flat = [length for row in lengths for length in row]
    batches = (flat[at : at + PACK_BATCH_SIZE] for at in range(0, len(flat), PACK_BATCH_SIZE))
    return sum(len(pack(batch, max_length)) for batch in batches)


def weighted_pairs(pairs: Mapping[int | None, int], weights: Mapping[int | None, int]) -> int:
    """Return the sum of pairs by window, each weighted by the layers that have it."""
    return sum(weight * pairs[window] for window, weight in weights.items())
