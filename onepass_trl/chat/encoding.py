"""Token ids of many renderings of one conversation, in time near-linear in the conversation."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from onepass_trl.chat.errors import ChatFormatError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = NDArray[np.int32]


class AddedTokens:
    """What this package needs to know about a tokenizer's added tokens.

    Attributes:
        special: Pattern that matches a special added token (``special=True``), or None if there is
            none.
        boundary: Pattern that matches an added token at which texts can be split and encoded piece
            by piece without a change in the ids, or None if this tokenizer has to encode each text
            as a whole.
        margin: Length of the longest such token, in characters.
        prepends: True if the tokenizer encodes a text differently at the start of its input than
            after other text: most SentencePiece models put a space before it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        tokens = list(tokenizer.added_tokens_decoder.values())
        self.special = _any_of([token.content for token in tokens if token.special])
        # Raw tokens are found before the text is normalized, so they cut it first. One that
        # absorbs neighbouring whitespace or requires word borders depends on the text around it:
        # then nothing is split.
        raw = [token for token in tokens if not token.normalized]
        plain = not any(token.lstrip or token.rstrip or token.single_word for token in raw)
        names = [token.content for token in raw] if plain and tokenizer.is_fast else []
        self.boundary = _any_of(names)
        self.margin = max(map(len, names), default=0)
        if self.boundary is not None and not self._composes(tokenizer, names):
            self.boundary = None
        alone, after_newline = encode_alone(tokenizer, ["a", "\na"])
        end = after_newline[after_newline.size - alone.size :]
        self.prepends = not np.array_equal(end, alone)

    def _composes(self, tokenizer: PreTrainedTokenizerBase, names: list[str]) -> bool:
        """Return whether pieces give the ids of the whole, tested with every boundary token.

        They don't if the tokenizer treats the first piece of a text differently: it prepends a
        space, truncates, or splits special tokens.
        """
        around = ["", "\n", " a", "b ", "\n\n c", "Über", "é", "{", "  ", "1"]
        text = "x" + "".join(
            name + around[number % len(around)]
            for name in names
            for number in range(len(around) if len(names) <= 64 else 1)
        )
        [whole], [composed] = encode_alone(tokenizer, [text]), encode_views(tokenizer, self, [text])
        return np.array_equal(whole, composed)


def _any_of(names: list[str]) -> re.Pattern[str] | None:
    """Return a pattern of the names, longest first, as the tokenizer prefers them."""
    if not names:
        return None
    return re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))


_ADDED_TOKENS: WeakKeyDictionary[PreTrainedTokenizerBase, tuple[int, AddedTokens]] = (
    WeakKeyDictionary()
)


def added_tokens(tokenizer: PreTrainedTokenizerBase) -> AddedTokens:
    """Return the tokenizer's added tokens, found once for each tokenizer and vocabulary size."""
    known = _ADDED_TOKENS.get(tokenizer)
    if known is None or known[0] != len(tokenizer):
        known = (len(tokenizer), AddedTokens(tokenizer))
        _ADDED_TOKENS[tokenizer] = known
    return known[1]


def encode_alone(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[Ids]:
    """Return the ids of each text by itself, ``(num_tokens,)`` int32, without added tokens."""
    if not texts:
        return []
    batch = tokenizer(list(texts), add_special_tokens=False)["input_ids"]
    return [np.asarray(ids, dtype=np.int32) for ids in batch]


def encode_after(tokenizer: PreTrainedTokenizerBase, context: str, completion: str) -> Ids:
    """Return the ids of a completion as a continuation of its context.

    For tokenizers that encode a text differently at the start of their input
    (`AddedTokens.prepends`): the two are encoded together, or the completion after a newline if
    their border is inside a token.

    Raises:
        ChatFormatError: if the border is inside a token either way.
    """
    for before in (context, "\n"):
        whole, first = encode_alone(tokenizer, [before + completion, before])
        if np.array_equal(whole[: first.size], first):
            return whole[first.size :]
    raise ChatFormatError(
        f"the tokenizer puts what ends the context ({context[-20:]!r}) and what begins the "
        f"completion ({completion[:20]!r}) into one token, and can't encode the completion by "
        "itself, since it begins a text with a space. Use a tokenizer that doesn't"
    )


def encode_views(
    tokenizer: PreTrainedTokenizerBase, added: AddedTokens, views: Sequence[str]
) -> Iterator[Ids]:
    """Yield what :func:`encode_alone` returns, fast for successive texts that share long prefixes.

    Added tokens are hard boundaries for a tokenizer: it encodes the text between two of them
    separately. So the ids up to the last boundary that a view shares with the previous one are
    reused, and every distinct piece of the rest is encoded once.
    """
    if added.boundary is None:
        yield from encode_alone(tokenizer, views)
        return
    splits = list(_split(views, added.boundary, added.margin))
    pieces = list(dict.fromkeys(piece for _, new in splits for piece in new))
    ids_of = dict(zip(pieces, encode_alone(tokenizer, pieces), strict=True))
    encoded = np.empty(0, dtype=np.int32)
    ends = [0]  # in the ids of the last view, before its first piece and after each piece
    for num_kept, new in splits:
        del ends[num_kept + 1 :]
        parts = [ids_of[piece] for piece in new]
        encoded = np.concatenate([encoded[: ends[-1]], *parts])
        for part in parts:
            ends.append(ends[-1] + part.size)
        yield encoded


def _split(
    views: Sequence[str], boundary: re.Pattern[str], margin: int
) -> Iterator[tuple[int, list[str]]]:
    """Yield how many pieces of the previous view each view begins with, and its other pieces.

    >>> list(_split(["a|b", "a|bc|"], re.compile("[|]"), 1))
    [(0, ['a', '|', 'b']), (2, ['bc', '|'])]
    """
    last = ""
    cuts = [(0, 0)]  # characters and pieces up to each boundary of the last view
    for view in views:
        # Whether a token matches can depend on up to `margin` characters after its start.
        shared = shared_prefix(last, view) - margin + 1
        del cuts[max(1, bisect_right(cuts, shared, key=itemgetter(0))) :]
        begin, num_kept = cuts[-1]
        pieces = []
        for match in boundary.finditer(view, begin):
            if match.start() > begin:
                pieces.append(view[begin : match.start()])
            pieces.append(match.group())
            begin = match.end()
            cuts.append((begin, num_kept + len(pieces)))
        if begin < len(view):
            pieces.append(view[begin:])
        yield num_kept, pieces
        last = view


def shared_prefix(a: str, b: str) -> int:
    """Return the length of the longest common prefix of two texts.

    >>> shared_prefix("abcd", "abxd")
    2
    """
    low, high = 0, min(len(a), len(b))
    if a[:high] == b[:high]:
        return high
    while high - low > 1:  # a[:low] == b[:low] and a[:high] != b[:high]
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
