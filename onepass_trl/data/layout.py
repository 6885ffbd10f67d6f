"""A tree as one flat row of tokens, with what the model and the loss need to know about each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from onepass_trl.data.tree import ROOT, TokenTree
from onepass_trl.passes import IGNORE_INDEX, ImageSource, ImageSpan, Pass


@dataclass(eq=False)
class Layout:
    """One row: the tokens of a tree (or of several, packed) in depth-first order.

    Every array has shape ``(num_tokens,)``.

    Attributes:
        input_ids: int32.
        position_ids: int32, the token's index in its own pass.
        shift_labels: int32, the token that this position must predict, or -100. Targets are
            explicit because the next token of the row need not be the next token of the pass.
        weights: float32, in how many passes that target is trained; 0 where there is none.
        visible_end: int32, see `onepass_trl.visibility`: the end of the subtree that sees this
            token.
        multiplicity: int32, how many passes hold this token; 0 for fork copies. Its sum is what
            N-pass would compute.
        num_turns: how many passes the row trains.
        images: the spans of the row's images, in order.
    """

    input_ids: NDArray[np.int32]
    position_ids: NDArray[np.int32]
    shift_labels: NDArray[np.int32]
    weights: NDArray[np.float32]
    visible_end: NDArray[np.int32]
    multiplicity: NDArray[np.int32]
    num_turns: int
    images: tuple[ImageSpan, ...] = ()

    def __len__(self) -> int:
        return self.input_ids.size

    def columns(self) -> dict[str, Any]:
        """Return the columns of a dataset's row; that of the images is ``image_spans``."""
        spans = [
            {"begin": span.begin, "end": span.end, **vars(span.source)} for span in self.images
        ]
        values = {name: value for name, value in vars(self).items() if name != "images"}
        return {**values, "image_spans": spans}

    @classmethod
    def from_columns(cls, row: Mapping[str, Any]) -> Layout:
        """Return the row that has these columns."""
        values = {name: row[name] for name in (*TOKEN_COLUMNS, "num_turns")}
        spans = [
            ImageSpan(
                int(span["begin"]),
                int(span["end"]),
                ImageSource(span["path"], span["content"]),
            )
            for span in row.get("image_spans", ())
        ]
        return cls(**values, images=tuple(spans))


TOKEN_COLUMNS = (
    "input_ids",
    "position_ids",
    "shift_labels",
    "weights",
    "visible_end",
    "multiplicity",
)


def linearize(tree: TokenTree) -> Layout:
    """Return the row of a tree: depth first, the heaviest child first.

    So the trunk of a conversation becomes contiguous, and each branch sees one contiguous prefix
    and itself.

    A node's last token must predict the first token of every trained child. An index has one
    target, so for each further trained child a copy of that token is placed right before it: same
    position, visible only to itself. Its hidden state equals the original's, and nothing else sees
    it.

    >>> from onepass_trl import Pass, build_tree
    >>> row = linearize(build_tree([Pass([1, 2, 3], [0, 0, 1]), Pass([1, 2, 4, 5], [0, 0, 1, 1])]))
    >>> print(row.input_ids, row.position_ids, row.shift_labels, row.visible_end, sep="\\n")
    [1 2 2 4 5 3]
    [0 1 1 2 3 2]
    [-100    3    4    5 -100 -100]
    [6 2 6 5 5 6]
    """
    length = tree.num_row_tokens()
    sizes = tree.subtree_num_tokens()
    row = Layout(
        input_ids=np.empty(length, dtype=np.int32),
        position_ids=np.empty(length, dtype=np.int32),
        shift_labels=np.full(length, IGNORE_INDEX, dtype=np.int32),
        weights=np.zeros(length, dtype=np.float32),
        visible_end=np.empty(length, dtype=np.int32),
        multiplicity=np.empty(length, dtype=np.int32),
        num_turns=tree.num_passes,
    )
    images: list[ImageSpan] = []
    for index, depth, _, begin, end in node_spans(tree):
        node = tree.nodes[index]
        num_tokens = node.token_ids.size
        body = slice(begin, begin + num_tokens - 1)
        copies = slice(begin + num_tokens - 1, end - 1)

        row.input_ids[body], row.input_ids[copies.start : end] = (
            node.token_ids[:-1],
            node.token_ids[-1],
        )
        row.position_ids[body] = np.arange(depth, depth + num_tokens - 1)
        row.position_ids[copies.start : end] = depth + num_tokens - 1
        row.visible_end[begin:end] = begin + sizes[index]
        row.visible_end[copies] = np.arange(copies.start + 1, copies.stop + 1)
        row.multiplicity[begin:end] = node.multiplicity
        row.multiplicity[copies] = 0
        images.extend(span.shifted(begin) for span in node.images)
    row.images = tuple(images)
    for node, positions in zip(tree.nodes, _target_positions(tree), strict=True):
        is_target = positions >= 0
        row.shift_labels[positions[is_target]] = node.token_ids[is_target]
        row.weights[positions[is_target]] = node.weights[is_target]
    return row


def linearize_with_targets(passes: Sequence[Pass]) -> tuple[Layout, list[NDArray[np.int64]]]:
    """Return the row of the tree of `passes`, and where each pass has its targets in it.

    The positions of a pass have shape ``(num_trained,)``: the row's output at ``positions[t]``
    predicts the pass's trained token number t. Passes that share a target share its position.

    >>> from onepass_trl import Pass
    >>> row, targets = linearize_with_targets([Pass([1, 2, 3], [0, 1, 1]), Pass([1, 4], [0, 1])])
    >>> print(row.input_ids, *targets)
    [1 1 2 3 4] [1 2] [0]
    """
    tree = TokenTree()
    last_nodes = [tree.insert(pass_) for pass_ in passes]
    positions = _target_positions(tree)
    targets = []
    for pass_, path in zip(passes, tree.paths(last_nodes), strict=True):
        along = np.concatenate([positions[index] for index in path])
        targets.append(along[pass_.trained])
    return linearize(tree), targets


class Span(NamedTuple):
    """Where a row has the tokens of a node."""

    node: int
    depth: int
    """Tokens above the node."""
    children: list[int]
    """In the row's order."""
    begin: int
    end: int
    """Exclusive; the copies of the node's last token come right before that one."""


def node_spans(tree: TokenTree) -> Iterator[Span]:
    """Yield the spans of a tree's nodes in the row's order, without the root, which has no tokens.

    >>> from onepass_trl import Pass, build_tree
    >>> tree = build_tree([Pass([1, 2, 3], [0, 0, 1]), Pass([1, 2, 4, 5], [0, 0, 1, 1])])
    >>> [(span.depth, span.begin, span.end) for span in node_spans(tree)]
    [(0, 0, 3), (2, 3, 5), (2, 5, 6)]
    """
    begin = 0
    for index, depth, children in tree.depth_first():
        if index != ROOT:
            end = begin + tree.nodes[index].token_ids.size + tree.num_fork_copies(index)
            yield Span(index, depth, children, begin, end)
            begin = end


def _target_positions(tree: TokenTree) -> list[NDArray[np.int64]]:
    """Return for each node, ``(num_tokens,)``: the index that predicts a token, or -1.

    No index predicts a token that no pass trains.
    """
    positions = [np.full(node.token_ids.size, -1, dtype=np.int64) for node in tree.nodes]
    for index, _, children, begin, end in node_spans(tree):
        is_inner = tree.nodes[index].weights[1:] > 0
        positions[index][1:][is_inner] = begin + np.flatnonzero(is_inner)
        trained = [child for child in children if tree.nodes[child].weights[0]]
        for number, child in enumerate(trained):  # the token itself, then its copies
            positions[child][0] = end - 1 - number
    return positions


def concatenate(rows: Sequence[Layout]) -> Layout:
    """Return one row with `rows` one after another; they don't see each other.

    >>> from onepass_trl import Pass, build_tree
    >>> row = linearize(build_tree([Pass([1, 2], [0, 1])]))
    >>> concatenate([row, row]).visible_end
    array([2, 2, 4, 4], dtype=int32)
    """
    if not rows:
        raise ValueError("a row needs at least one layout, got none")
    starts = np.cumsum([0, *(len(row) for row in rows[:-1])])
    arrays = {name: np.concatenate([getattr(row, name) for row in rows]) for name in TOKEN_COLUMNS}
    arrays["visible_end"] = np.concatenate(
        [row.visible_end + np.int32(start) for row, start in zip(rows, starts, strict=True)]
    )
    images = [
        span.shifted(int(start))
        for row, start in zip(rows, starts, strict=True)
        for span in row.images
    ]
    return Layout(**arrays, num_turns=sum(row.num_turns for row in rows), images=tuple(images))


def trained_ids(row: Layout) -> NDArray[np.int32]:
    """Return the id of each token that a pass trains, -100 for all others, ``(num_tokens,)``.

    They have no shift: a token's id is at its own index, as in ``labels`` of transformers.

    >>> from onepass_trl import Pass, build_tree
    >>> row = linearize(build_tree([Pass([1, 2, 3], [0, 0, 1]), Pass([1, 2, 4, 5], [0, 0, 1, 1])]))
    >>> print(row.input_ids, trained_ids(row), sep="\\n")
    [1 2 2 4 5 3]
    [-100 -100 -100    4    5    3]
    """
    before = np.arange(-1, len(row) - 1, dtype=np.int64)  # the token before each one in its pass
    for index in np.flatnonzero(np.append(-1, row.visible_end[:-1]) <= np.arange(len(row))):
        seen = np.flatnonzero(row.visible_end[:index] > index)
        before[index] = seen[-1] if seen.size else -1
    tokens = np.flatnonzero(row.multiplicity > 0)
    predictors = np.flatnonzero(row.shift_labels != IGNORE_INDEX)
    copied = tokens[np.searchsorted(tokens, predictors)]  # fork copies predict what follows theirs
    # Of the tokens that follow one, each has another id.
    ids = row.input_ids[tokens]
    is_target = np.isin(
        before[tokens] << 32 | ids, copied << 32 | row.shift_labels[predictors].astype(np.int64)
    )
    labels = np.full(len(row), IGNORE_INDEX, dtype=np.int32)
    labels[tokens[is_target]] = ids[is_target]
    return labels


def separate(row: Layout) -> Iterator[Layout]:
    """Yield the trees of a row, each as a separate row: `concatenate` reversed.

    The turns of each are unknown, so ``num_turns`` is 0.

    >>> from onepass_trl import Pass, build_tree
    >>> row = linearize(build_tree([Pass([1, 2], [0, 1])]))
    >>> [tree.visible_end.tolist() for tree in separate(concatenate([row, row]))]
    [[2, 2], [2, 2]]
    """
    begin = 0
    while begin < len(row):
        # The tree's first token may come after copies of it.
        first = begin + int(np.argmax(row.multiplicity[begin:] > 0))
        end = int(row.visible_end[first])
        arrays = {name: getattr(row, name)[begin:end] for name in TOKEN_COLUMNS}
        arrays["visible_end"] = arrays["visible_end"] - np.int32(begin)
        images = [span.shifted(-begin) for span in row.images if begin <= span.begin < end]
        yield Layout(**arrays, num_turns=0, images=tuple(images))
        begin = end


def images_on(row: Layout, path: NDArray[np.int64]) -> tuple[ImageSpan, ...]:
    """Return the spans of a row's images on a path of it, as indices into the path.

    Args:
        path: indices of the row, in order, that have all or nothing of each image.
    """
    on_path = np.isin([span.begin for span in row.images], path)
    spans = [span for span, on in zip(row.images, on_path, strict=True) if on]
    begins = np.searchsorted(path, [span.begin for span in spans]).tolist()
    return tuple(
        span.shifted(begin - span.begin) for span, begin in zip(spans, begins, strict=True)
    )


def target_paths(row: Layout) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yield the paths of a row that end in a target, and which targets each is the first to have.

    A path is the indices of the tokens that its last one sees, ``(path_length,)``: alone in a row,
    they are what a separate pass computes. Its targets, ``(num_targets,)``, are indices into the
    path. Together the paths have each target of the row once.

    >>> from onepass_trl import Pass, build_tree
    >>> row = linearize(build_tree([Pass([1, 2, 3], [0, 0, 1]), Pass([1, 2, 4, 5], [0, 0, 1, 1])]))
    >>> for path, targets in target_paths(row):
    ...     print(path, targets)
    [0 2 3] [1 2]
    [0 1] [1]
    """
    waiting = row.weights > 0
    while waiting.any():
        last = int(np.flatnonzero(waiting)[-1])
        path = np.flatnonzero(row.visible_end[: last + 1] > last)
        targets = np.flatnonzero(waiting[path])
        waiting[path] = False
        yield path, targets
