"""The text of each token of a row, and the message that it belongs to."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onepass_trl.chat.images import ImageContent
from onepass_trl.passes import ImageSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LONGEST_CHARACTER = 4  # bytes in UTF-8, each of which can be a token
_CLOSES = re.compile(r"end|eo[mst]|</|return", re.IGNORECASE)  # in the names of closing tokens


def token_texts(
    token_ids: Iterable[int], tokenizer: PreTrainedTokenizerBase, before: int | None = None
) -> list[str]:
    """Return the text of each token; joined, they are the text of all tokens.

    If several tokens share one character, the last has it and the others have the empty text.

    Args:
        token_ids: consecutive tokens of one pass.
        before: the token before them: some tokenizers drop the space that begins a text.
    """
    ids = [int(token) for token in token_ids]
    texts: list[str] = []
    pending: list[int] = []
    for number, token in enumerate(ids):
        pending.append(token)
        lead = [] if before is None else [before]
        text = _decode(tokenizer, [*lead, *pending])[len(_decode(tokenizer, lead)) :]
        is_last = number == len(ids) - 1
        if text.endswith("\ufffd") and len(pending) < _LONGEST_CHARACTER and not is_last:
            texts.append("")
            continue
        texts.append(text)
        pending, before = [], token
    return texts


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    if not ids:
        return ""
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def visible_text(text: str) -> str:
    """Return the text with control characters as symbols, so that it is safe to show.

    Newlines and tabs are kept. Escape sequences would control a terminal, and controls of the
    writing direction would reorder the text around them.

    >>> visible_text("a\\x1b[31m\\u202eb")
    'a␛[31m⟨202E⟩b'
    """
    return "".join(map(_visible_character, text))


def _visible_character(character: str) -> str:
    if character in "\n\t":
        return character
    code = ord(character)
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return f"⟨{code:04X}⟩"
    return character


def message_starts(
    context: str,
    messages: Sequence[Mapping[str, Any]],
    added: re.Pattern[str] | None,
    ends_of_turn: Iterable[str],
    images: Mapping[ImageSource, str] | None = None,
) -> list[int | None]:
    """Return where in a context each message begins, and at the end where the generated turn does.

    Templates don't say where a message begins, so its content is searched for, and the border is
    set between the added tokens before it. The result is for display only. None marks a message
    that is not found: a template may leave it out or rewrite it.

    Args:
        context: the text before a turn, generation prompt included.
        messages: of the context, in their normal form.
        added: pattern of the added tokens.
        ends_of_turn: texts of the tokens with which a turn ends.
        images: what the context has in the places of images.

    >>> chat = [{"role": "user", "content": "Hi"}]
    >>> message_starts("<s>Hi<e><s>", chat, re.compile("<.>"), ["<e>"])
    [0, 8]
    """
    starts: list[int | None] = []
    end, ends = 0, [text for text in ends_of_turn if text]
    for message in messages:
        begin = None
        for forms in _needles(message, images or {}):
            needle = next((form for form in forms if context.find(form, end) >= 0), None)
            if needle is None:
                continue
            found = context.find(needle, end)
            if begin is None:
                is_first = not any(start is not None for start in starts)
                begin = (
                    _first_border(context[:found], added)
                    if is_first
                    else end + _border(context[end:found], added, ends)
                )
            end = found + len(needle)
        starts.append(begin)
    return [*starts, end + _border(context[end:], added, ends)]


def _needles(
    message: Mapping[str, Any], images: Mapping[ImageSource, str]
) -> Iterator[Sequence[str]]:
    """Yield the texts and images of a rendered message in order, each in several spellings."""
    content = message.get("content")
    for part in content.parts if isinstance(content, ImageContent) else (content or "",):
        if isinstance(part, ImageSource):
            if part in images:  # else the template has left it out of every turn
                yield [images[part]]
        elif text := str(part).strip():
            yield text, *(json.dumps(text, ensure_ascii=ascii)[1:-1] for ascii in (False, True))
    for call in message.get("tool_calls") or ():
        yield [call["function"]["name"]]


def _first_border(gap: str, added: re.Pattern[str] | None) -> int:
    """Return where the first message begins: at the last opening, after the template's own."""
    openings = list(added.finditer(gap)) if added is not None else []
    return max((m.start() for m in openings if m[0] == openings[0][0]), default=0)


def _border(gap: str, added: re.Pattern[str] | None, ends_of_turn: Sequence[str]) -> int:
    """Return where, between the contents of two messages, the second begins."""
    found = list(added.finditer(gap)) if added is not None else []
    border = min((gap.find(text) + len(text) for text in ends_of_turn if text in gap), default=0)
    for match in found:
        if match.start() < border:
            continue
        if border and gap[border : match.start()].strip():
            return border
        if not _CLOSES.search(match[0]):
            return match.start()
        border = match.end()
    return border or len(gap)
