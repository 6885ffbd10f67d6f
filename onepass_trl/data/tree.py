"""The prefix tree of a set of passes: it has what several passes share once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onepass_trl.passes import ImageSource, ImageSpan, Pass

ROOT = 0


@dataclass(eq=False)
class Node:
    """A run of tokens that the same passes go through.

    Attributes:
        token_ids: ``(num_tokens,)`` int32; empty for the root only.
        keys: ``(num_tokens,)`` int32 or int64, what passes must have in common to share a token:
            its id, and for a token of an image the image too.
        weights: ``(num_tokens,)`` int32, in how many passes each token is trained.
        multiplicity: how many passes go through this node.
        images: the spans of the node's images, which are never divided between nodes.
        children: index of each child node by the key of its first token.
    """

    token_ids: NDArray[np.int32]
    keys: NDArray[np.int32] | NDArray[np.int64]
    weights: NDArray[np.int32]
    multiplicity: int
    images: tuple[ImageSpan, ...] = ()
    children: dict[int, int] = field(default_factory=dict)


class TokenTree:
    """A prefix tree of passes.

    ``nodes[0]`` is the root: it holds no token and precedes the first token of every pass, so
    passes that share nothing are its children. Grow a tree with `insert`, or build it whole with
    `build_tree`.
    """

    def __init__(self) -> None:
        empty = np.empty(0, dtype=np.int32)
        self.nodes = [Node(empty, empty, empty, 0)]
        self.num_passes = 0
        self._images: dict[ImageSource, int] = {}  # numbered from 1

    def insert(self, pass_: Pass) -> int:
        """Merge one pass into the tree and return the index of the node in which it ends.

        The index stays valid when later passes split that node.
        """
        nodes, ids, trained = self.nodes, pass_.token_ids, pass_.trained
        keys = self._keys(pass_)
        self.num_passes += 1
        nodes[ROOT].multiplicity += 1
        index, offset = ROOT, 0
        while offset < ids.size:
            child = nodes[index].children.get(int(keys[offset]))
            if child is None:
                weights = trained[offset:].astype(np.int32)
                images = tuple(s.shifted(-offset) for s in pass_.images if s.begin >= offset)
                nodes.append(Node(ids[offset:], keys[offset:], weights, 1, images))
                nodes[index].children[int(keys[offset])] = len(nodes) - 1
                return len(nodes) - 1
            shared = _common_prefix_length(nodes[child].keys, keys[offset:])
            if shared < nodes[child].token_ids.size:
                child = self._split(index, child, shared)
            nodes[child].weights += trained[offset : offset + shared]
            nodes[child].multiplicity += 1
            index, offset = child, offset + shared
        return index

    def _keys(self, pass_: Pass) -> NDArray[np.int32] | NDArray[np.int64]:
        """Return the keys of a pass's tokens, see `Node`."""
        if not pass_.images:
            return pass_.token_ids
        keys = pass_.token_ids.astype(np.int64)
        for span in pass_.images:
            number = self._images.setdefault(span.source, len(self._images) + 1)
            keys[span.begin : span.end] += number << 32  # above the bits of an id
        return keys

    def _split(self, parent: int, index: int, length: int) -> int:
        """Move a node's first `length` tokens into a new node above it; return the new index."""
        node = self.nodes[index]
        upper = Node(
            node.token_ids[:length],
            node.keys[:length],
            node.weights[:length].copy(),
            node.multiplicity,
            tuple(span for span in node.images if span.begin < length),
        )
        assert all(span.end <= length for span in upper.images), "one image has two lengths"
        node.images = tuple(s.shifted(-length) for s in node.images if s.begin >= length)
        node.token_ids, node.keys = node.token_ids[length:], node.keys[length:]
        node.weights = node.weights[length:].copy()
        upper.children[int(node.keys[0])] = index
        self.nodes.append(upper)
        self.nodes[parent].children[int(upper.keys[0])] = len(self.nodes) - 1
        return len(self.nodes) - 1

    def paths(self, ends: Sequence[int]) -> list[list[int]]:
        """Return the nodes of each path from the first below the root to one of `ends`."""
        parents = {
            child: index
            for index, node in enumerate(self.nodes)
            for child in node.children.values()
        }
        paths = []
        for index in ends:
            path = [index]
            while parents[path[-1]] != ROOT:
                path.append(parents[path[-1]])
            paths.append(path[::-1])
        return paths

    def num_fork_copies(self, index: int) -> int:
        """Return how often a node's last token is copied: once per trained child but the first."""
        node = self.nodes[index]
        if len(node.children) < 2:
            return 0
        num_targets = sum(bool(self.nodes[child].weights[0]) for child in node.children.values())
        return max(num_targets - 1, 0)

    def num_row_tokens(self) -> int:
        """Return the length of the tree's layout: its tokens and fork copies."""
        return sum(
            node.token_ids.size + self.num_fork_copies(i) for i, node in enumerate(self.nodes)
        )

    def subtree_num_tokens(self) -> list[int]:
        """Return the number of row tokens of each node's subtree."""
        order = [ROOT]
        for index in order:  # grows while it is read: parents before children
            order.extend(self.nodes[index].children.values())
        sizes = [node.token_ids.size + self.num_fork_copies(i) for i, node in enumerate(self.nodes)]
        for index in reversed(order):
            sizes[index] += sum(sizes[child] for child in self.nodes[index].children.values())
        return sizes

    def depth_first(self) -> Iterator[tuple[int, int, list[int]]]:
        """Yield (node index, tokens above it, its ordered children), the heaviest child first.

        The heaviest child is the one whose subtree has the most tokens; ties keep the order of
        insertion.
        """
        sizes = self.subtree_num_tokens()
        stack = [(ROOT, 0)]
        while stack:
            index, depth = stack.pop()
            node = self.nodes[index]
            children = sorted(node.children.values(), key=lambda child: -sizes[child])
            yield index, depth, children
            stack.extend((child, depth + node.token_ids.size) for child in reversed(children))


def build_tree(passes: Sequence[Pass]) -> TokenTree:
    """Return the prefix tree of `passes`.

    Raises:
        ValueError: if there are no passes.

    >>> tree = build_tree([Pass([1, 2, 3], [0, 0, 1]), Pass([1, 2, 4, 5], [0, 0, 0, 1])])
    >>> [node.token_ids.tolist() for node in tree.nodes]
    [[], [3], [1, 2], [4, 5]]
    """
    if not passes:
        raise ValueError("a tree needs at least one pass, got none")
    tree = TokenTree()
    for pass_ in passes:
        tree.insert(pass_)
    return tree


def _common_prefix_length(a: NDArray[np.integer[Any]], b: NDArray[np.integer[Any]]) -> int:
    length = min(a.size, b.size)
    differs = a[:length] != b[:length]
    return int(differs.argmax()) if differs.any() else length
