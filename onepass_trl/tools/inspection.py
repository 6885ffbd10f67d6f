"""How one conversation is cut: its tree as trunk and branches, its row, and what one pass saves."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from onepass_trl.chat.processing import ProcessingClass, tokenizer_of
from onepass_trl.chat.rendering import RenderedTurn
from onepass_trl.data.layout import Layout, linearize, node_spans
from onepass_trl.data.tree import ROOT, TokenTree
from onepass_trl.passes import ImageSource, Pass
from onepass_trl.preparation.options import PreparationOptions
from onepass_trl.preparation.rows import render_record
from onepass_trl.tools.estimation import Begins, visible_begins, work_of_causal_pass
from onepass_trl.tools.flops import AttentionLayers
from onepass_trl.tools.transcript import message_starts, token_texts
from onepass_trl.visibility import count_tiles, num_visible_pairs
from onepass_trl.vision import vision_of
from onepass_trl.wording import counted

if TYPE_CHECKING:
    from datasets import Features
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Segment:
    """A run of a row's tokens of one message, which the same passes see, all trained or none.

    An image is a segment of its own.

    Attributes:
        begin: first token in the row.
        end: exclusive.
        first_position: position id of the first token.
        last_position: position id of the last token.
        role: of the message; ``"context"`` or ``"completion"`` where the message isn't known.
        message: index of the message, or -1.
        trained: whether its tokens are targets of the loss.
        multiplicity: how many passes hold it.
        num_copies: fork copies among its tokens.
        image: number of the image that the tokens are, or -1.
    """

    begin: int
    end: int
    first_position: int
    last_position: int
    role: str
    message: int
    trained: bool
    multiplicity: int
    num_copies: int
    image: int

    @property
    def num_tokens(self) -> int:
        """The number of its tokens without fork copies."""
        return self.end - self.begin - self.num_copies

    @property
    def size(self) -> str:
        """The number and the positions of its tokens, in words."""
        return f"{counted(self.num_tokens, 'token')} at {self.first_position}..{self.last_position}"


@dataclass
class Branch:
    """Consecutive segments, and after each the branches that leave there.

    Attributes:
        turns: how many trained turns go through it.
        last_turn: number of the last of these among the conversation's turns, from 0.
        items: its segments and branches, in reading order.
    """

    turns: int
    last_turn: int
    items: list[Segment | Branch] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Inspection:
    """One conversation's row, explained.

    Attributes:
        row: the row.
        texts: of its tokens, ``num_tokens`` of them.
        trained: ``(num_tokens,)`` bool, whether a token is a target of the loss in any pass.
        is_copy: ``(num_tokens,)`` bool, whether a token is a fork copy.
        trunk: the tree; the trunk is the path of the last pass, up to what that pass generates.
        pass_lengths: number of tokens of each pass.
        images: those of the passes, each once, in the order of the conversation.
        begins: the row's blocks, in the layers that see them in both directions.
        has_reasoning: whether a trained turn has reasoning; None if messages aren't known.
    """

    row: Layout
    texts: list[str]
    trained: NDArray[np.bool_]
    is_copy: NDArray[np.bool_]
    trunk: Branch
    pass_lengths: list[int]
    images: list[ImageSource]
    begins: Begins
    has_reasoning: bool | None

    @property
    def n_pass_tokens(self) -> int:
        """Tokens that N-pass computes."""
        return sum(self.pass_lengths)

    @property
    def token_ratio(self) -> float:
        """Tokens of N-pass over those of one pass."""
        return self.n_pass_tokens / len(self.row)

    @property
    def n_pass_images(self) -> int:
        """Images that N-pass encodes; one pass encodes those of its row."""
        return sum(int(self.row.multiplicity[span.begin]) for span in self.row.images)

    @property
    def pairs(self) -> int:
        """Pairs of query and key that one pass needs, without a window."""
        return num_visible_pairs(self.row.visible_end, visible_begin=self.begins.get(None))

    def n_pass_pairs(self, window: int | None = None) -> int:
        """Return how many pairs of query and key N-pass needs in layers with this window."""
        causal = sum(work_of_causal_pass(n, 0, [window]).pairs[window] for n in self.pass_lengths)
        if window not in self.begins:
            return causal
        in_blocks = np.arange(len(self.row)) - self.begins[window]
        return causal + int(self.row.multiplicity @ in_blocks)

    @cached_property
    def tiles(self) -> tuple[int, int, int]:
        """Tiles of 64 x 64 without a window: skipped, partial and full, see `count_tiles`."""
        return count_tiles(self.row.visible_end, visible_begin=self.begins.get(None))

    @property
    def is_chain(self) -> bool:
        """Whether each pass begins with the whole previous one, so that nothing occurs twice."""
        return len(self.row) == max(self.pass_lengths)


def inspect_record(
    record: Mapping[str, Any],
    tokenizer: ProcessingClass,
    options: PreparationOptions | None = None,
    *,
    features: Features | None = None,
    layers: Sequence[AttentionLayers] = (),
) -> Inspection:
    """Return what becomes of a dataset's record; other arguments and errors are those of
    `onepass_trl.preparation.rows.render_record`.

    `layers` are those of the model, if it is known: they say which see images in both directions.
    """
    found = render_record(record, tokenizer, options, features=features)
    return inspect_passes(
        found.passes, tokenizer, found.turns, numbers=found.numbers, layers=layers
    )


def inspect_passes(
    passes: Sequence[Pass],
    tokenizer: ProcessingClass,
    turns: Sequence[RenderedTurn] = (),
    *,
    numbers: Sequence[int] | None = None,
    layers: Sequence[AttentionLayers] = (),
) -> Inspection:
    """Return how passes are merged and laid out.

    Args:
        passes: of one conversation, at least one.
        tokenizer: a tokenizer or processor; gives the text of tokens.
        turns: what the passes were rendered from, if known: gives segments their roles.
        numbers: which turns of the conversation the passes are, in ascending order; all by default.
        layers: of the model, if it is known.
    """
    tree = TokenTree()
    ends = [tree.insert(pass_) for pass_ in passes]
    images = list(dict.fromkeys(span.source for pass_ in passes for span in pass_.images))
    view = _View(tree, tokenizer_of(tokenizer), images)
    paths = tree.paths(ends)
    if turns:
        view.find_messages(turns, paths)
    messages = turns[-1].messages if turns else []
    reasoning = any(turn.message.get("reasoning_content") for turn in turns) if turns else None
    return Inspection(
        row=view.row,
        texts=view.texts,
        trained=view.trained,
        is_copy=view.is_copy,
        trunk=view.outline(
            dict(zip(range(len(paths)) if numbers is None else numbers, paths, strict=True)),
            [str(message["role"]) for message in messages],
        ),
        pass_lengths=[len(pass_) for pass_ in passes],
        images=images,
        begins=visible_begins(view.row, layers, vision_of(tokenizer)),
        has_reasoning=reasoning,
    )


class _View:
    """A tree with its row, and what each token of the row is."""

    def __init__(
        self, tree: TokenTree, tokenizer: PreTrainedTokenizerBase, images: Sequence[ImageSource]
    ) -> None:
        self.tree, self.tokenizer, self.row = tree, tokenizer, linearize(tree)
        num_tokens = len(self.row)
        self.texts = [""] * num_tokens
        self.trained = np.zeros(num_tokens, dtype=np.bool_)
        self.is_copy = self.row.multiplicity == 0
        self.message = np.full(num_tokens, -1, dtype=np.int64)
        self.spans = {span.node: span for span in node_spans(tree)}
        for index, span in self.spans.items():
            node, tokens = tree.nodes[index], slice(span.begin, span.end)
            copies = span.end - span.begin - node.token_ids.size
            before = int(self.row.input_ids[span.begin - 1]) if span.begin else None
            texts = token_texts(node.token_ids, tokenizer, before)
            self.texts[tokens] = [*texts[:-1], *texts[-1:] * (copies + 1)]
            trained = node.weights > 0
            self.trained[tokens] = [*trained[:-1], *trained[-1:].repeat(copies + 1)]
        # An image's first token has its name as text, the others none.
        self.numbers = {image: number for number, image in enumerate(images)}
        self.names = {image: f"[image {number}]" for image, number in self.numbers.items()}
        self.image = np.full(num_tokens, -1, dtype=np.int64)  # index among the row's
        for index, image in enumerate(self.row.images):
            self.image[image.begin : image.end] = index
            texts = [self.names[image.source], *[""] * (image.end - image.begin - 1)]
            self.texts[image.begin : image.end] = texts

    def tokens(self, index: int) -> NDArray[np.int64]:
        """Return the row indices of a node's tokens, fork copies included."""
        return np.arange(self.spans[index].begin, self.spans[index].end)

    def find_messages(self, turns: Sequence[RenderedTurn], paths: Sequence[list[int]]) -> None:
        """Set the message of each token."""
        names = {token.content for token in self.tokenizer.added_tokens_decoder.values()}
        added = (
            re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
            if names
            else None
        )
        tokens = [np.concatenate([self.tokens(index) for index in path]) for path in paths]
        tokens = [where[~self.is_copy[where]] for where in tokens]
        ends = {self.texts[where[-1]] for where in tokens}
        # Last pass first: a shared token is labelled from its longest context.
        for turn, where in zip(reversed(turns), reversed(tokens), strict=True):
            in_context = where[: len(where) - turn.rendered.num_trained]
            texts = [self.texts[token] for token in in_context.tolist()]
            starts = message_starts("".join(texts), turn.messages[:-1], added, ends, self.names)
            known = [(start, number) for number, start in enumerate(starts) if start is not None]
            offsets = np.cumsum([0, *map(len, texts)])[:-1]
            at = np.searchsorted([start for start, _ in known], offsets, side="right") - 1
            found = np.array([number for _, number in known])[np.maximum(at, 0)]
            if at.size and known[0][0] > 0:
                found[at < 0] = -1  # what the template writes before the first message
            new = self.message[in_context] < 0
            self.message[in_context[new]] = found[new]
            self.message[where[len(in_context) :]] = turn.index
        for copy in np.flatnonzero(self.is_copy)[::-1]:
            self.message[copy] = self.message[copy + 1]

    def segments(self, index: int, roles: Sequence[str]) -> list[Segment]:
        """Return the segments of a node."""
        *_, begin, end = self.spans[index]
        keys = np.stack([x[begin:end] for x in (self.message, self.trained, self.image)])
        cuts = begin + 1 + np.flatnonzero((keys[:, 1:] != keys[:, :-1]).any(axis=0))
        borders = [begin, *cuts.tolist(), end]
        return [self._segment(index, *border, roles) for border in pairwise(borders)]

    def _segment(self, index: int, begin: int, end: int, roles: Sequence[str]) -> Segment:
        message, trained = int(self.message[begin]), bool(self.trained[begin])
        image = int(self.image[begin])
        if message >= 0:
            role = roles[message]
        elif roles:
            role = "template"
        else:
            role = "completion" if trained else "context"
        return Segment(
            begin=begin,
            end=end,
            first_position=int(self.row.position_ids[begin]),
            last_position=int(self.row.position_ids[end - 1]),
            role=role,
            message=message,
            trained=trained,
            multiplicity=self.tree.nodes[index].multiplicity,
            num_copies=int(self.is_copy[begin:end].sum()),
            image=-1 if image < 0 else self.numbers[self.row.images[image].source],
        )

    def outline(self, paths: Mapping[int, list[int]], roles: Sequence[str]) -> Branch:
        """Return the tree as nested branches, each along the path of its last pass.

        Args:
            paths: the nodes of each pass, by the number of its turn, in ascending order.
            roles: of the messages.
        """
        last_turn = {index: turn for turn, path in paths.items() for index in path}
        last_turn[ROOT] = max(paths)

        def branch_of(index: int, following: list[int]) -> Branch:
            branch = Branch(self.tree.nodes[index].multiplicity, last_turn[index])
            while following:
                last = max(following, key=lambda node: last_turn[node])
                branch.items += [branch_of(node, [node]) for node in following if node != last]
                branch.items += self.segments(last, roles)
                following = self.spans[last].children
            return branch

        first = [span.node for span in self.spans.values() if span.depth == 0]
        trunk = branch_of(ROOT, first)
        # What the last turn generates is its branch, as for every earlier turn.
        tail = len(trunk.items)
        while tail and _is_generated_once(trunk.items[tail - 1]):
            tail -= 1
        if tail < len(trunk.items):
            trunk.items[tail:] = [Branch(1, trunk.last_turn, trunk.items[tail:])]
        return trunk


def _is_generated_once(item: Segment | Branch) -> bool:
    return isinstance(item, Segment) and item.trained and item.multiplicity == 1
