"""Where a turn ends: what templates write after it is no part of it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from onepass_trl.chat.encoding import shared_prefix
from onepass_trl.chat.errors import TurnError


@dataclass(frozen=True)
class Ending:
    """How turns of a kind end.

    Attributes:
        token: The special token that ends them, ``""`` if there is none.
        extra: What the template writes after a conversation's last turn and in no later context,
            such as the header of an answer that nobody asked for. It isn't generated.
    """

    token: str
    extra: str

    def cut(self, completion: str) -> str:
        """Return the completion without what isn't generated.

        Raises:
            TurnError: if it doesn't end as turns of this kind do.
        """
        cut = completion.removesuffix(self.extra)
        if not completion.endswith(self.extra) or not cut.rstrip().endswith(self.token):
            raise TurnError(
                f"it ends in {completion[-40:]!r}, and turns like it in "
                f"{self.token + self.extra!r}: where it ends can't be told. Use a template that "
                "ends every turn alike"
            )
        return cut


def find_ending(
    last: str, followed: str, special: re.Pattern[str] | None, eos: str | None, context: str
) -> Ending:
    """Return how turns end, from what the template writes after them.

    Args:
        last: What follows the turn's own text if the conversation ends with it.
        followed: What follows it if another message comes.
        special: Finds special tokens.
        eos: The tokenizer's end token, at which generation stops.
        context: What inference feeds before the turn.

    Raises:
        TurnError: if the template writes the next answer's header after every conversation, and
            none of the tokens before it is known to end a turn.

    >>> special = re.compile("<end>|<user>|<bot>")
    >>> find_ending("<end><bot>", "<end><user>Thanks", special, "<end>", "<user>Hi<end><bot>")
    Ending(token='<end>', extra='<bot>')
    """
    shared = shared_prefix(last, followed)
    found = list(special.finditer(last)) if special else []
    ends = [match for match in found if match.end() <= shared]
    if not ends:  # the last turn ends in a token of its own, as gpt-oss's does
        return Ending(found[-1].group() if found else "", "")
    stop = next((match for match in ends if match.group() == eos), None)
    end = stop or ends[-1]
    extra = last[end.end() :]
    if not extra.strip():
        return Ending(end.group(), "")
    if stop is None and context.endswith(extra):
        raise TurnError(
            f"the template writes {extra!r} after every message, so it can't be told whether "
            f"{end.group()!r} ends the turn or begins the next one; set tokenizer.eos_token to the "
            "token that ends a turn"
        )
    return Ending(end.group(), extra)
