"""What of real conversations a family renders, and renders right: the figures of the tables.

Three oracles for each turn: its context is what ``apply_chat_template`` gives for inference; the
completion, parsed by transformers, gives the message back; it ends in the family's end-of-turn
token.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from onepass_trl.chat import ChatFormatError, RenderedTurn
from onepass_trl.data import build_tree, linearize
from onepass_trl.preparation.round_trip import check_round_trip
from onepass_trl.training.response_templates import trl_response_template
from tests.chat.families import CASES, Case
from tests.chat.tokenizers import SHARED, make_real_tokenizer
from tests.chat.turns import render_turns

RECORD = Path(__file__).with_name("coverage.json")

FILES = {"maths_chat": 450, "tool_chat": 86, "agent_short": 544, "agent_long": 255}
"""The files of conversations, and how many assistant turns each has."""

# Templates with which prompts longer than LONG_PROMPT characters are compared by tokens too.
TOKENIZED = ("qwen3", "deepseekv3", "gptoss")
LONG_PROMPT = 50_000

# Why a turn can't be rendered, by a part of the error; each is the template's own doing.
REFUSALS = {
    "tool calls, of which the gpt-oss template writes only the first": "parallel calls",
    "both content and thinking": "reasoning and text with a call",
    "single tool-calls at once": "parallel calls",
    "System role not supported": "system messages",
    "roles must alternate": "tool messages",
    "of its tool call": "tool calls",
    "Only user and assistant roles": "tool messages",
    "its content": "text with a call",
    "with which this template closes it": "quotation marks in arguments",
}
# Why a turn isn't parsed back, by a part of the error.
UNKNOWN_PROMPT = "the prompt isn't one that the parser knows"
MISREADINGS = {"could not parse after dialect transforms": "null among the arguments"}


@dataclass
class Coverage:
    """Counts of turns and tokens.

    Attributes:
        num_turns: Assistant turns of the conversations.
        refused: Those that were refused, by reason.
        equal_contexts: Those whose context is inference's.
        round_trips: Those that were parsed back.
        misread: Those that weren't, by reason.
        stopped: Those that end in an end-of-turn token.
        npass_tokens: Tokens of all passes.
        onepass_tokens: Tokens of the rows that hold them.
    """

    num_turns: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    equal_contexts: int = 0
    round_trips: int = 0
    misread: Counter[str] = field(default_factory=Counter)
    stopped: int = 0
    npass_tokens: int = 0
    onepass_tokens: int = 0

    @property
    def rendered(self) -> int:
        """The turns that weren't refused."""
        return self.num_turns - sum(self.refused.values())


def read_conversations(file: str) -> list[dict[str, Any]]:
    """Return the conversations of a file of the shared folder."""
    with open(SHARED / "data" / f"{file}.jsonl", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def cover(
    case: Case, tokenizer: PreTrainedTokenizerBase, conversations: Iterable[Mapping[str, Any]]
) -> Coverage:
    """Render every turn of the conversations and compare it with the three oracles."""
    coverage = Coverage()
    ends = set(tokenizer.convert_tokens_to_ids((case.tokens.ends or case.tokens.eos).split()))
    for conversation in conversations:
        messages = conversation["messages"]
        if not case.reasoning:
            messages = [_without(message, "reasoning_content") for message in messages]
        indices = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        turns = dict(_rendered(case, tokenizer, messages, conversation.get("tools"), coverage))
        coverage.num_turns += len(indices)
        if not turns:
            continue
        prompts = _prompts(case, tokenizer, messages, conversation.get("tools"), indices, turns)
        for (number, turn), prompt in zip(turns.items(), prompts, strict=True):
            item = turn.rendered
            coverage.equal_contexts += turn.context == prompt and (
                # That a text gives its ids doesn't depend on the template, and takes long here.
                (len(prompt) > LONG_PROMPT and case.template not in TOKENIZED)
                or item.token_ids[~item.trained].tolist()
                == tokenizer(prompt, add_special_tokens=False)["input_ids"]
            )
            coverage.stopped += int(item.token_ids[-1]) in ends
            coverage.npass_tokens += len(item)
            try:
                if check_round_trip(turn, tokenizer, trl_response_template):
                    coverage.round_trips += 1
                else:
                    coverage.misread[UNKNOWN_PROMPT] += 1
            except ChatFormatError as error:
                if case.misreading and _has_marks(turn.message):
                    coverage.misread[case.misreading] += 1
                else:
                    where = f"{conversation['id']}, assistant turn {number}: "
                    coverage.misread[_reason(str(error), MISREADINGS, where)] += 1
        tree = build_tree([turn.rendered for turn in turns.values()])
        coverage.onepass_tokens += len(linearize(tree))
    return coverage


def _rendered(
    case: Case,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Any],
    tools: Any,
    coverage: Coverage,
) -> Iterator[tuple[int, RenderedTurn]]:
    """Yield number and rendering of each turn, one by one where some are refused."""
    arguments = {"tools": tools, "chat_template_kwargs": case.kwargs}
    try:
        yield from enumerate(render_turns(messages, tokenizer, **arguments))
        return
    except ChatFormatError:
        pass
    for number in range(sum(message["role"] == "assistant" for message in messages)):
        try:
            [turn] = render_turns(messages, tokenizer, train_on=[number], **arguments)
        except ChatFormatError as error:
            coverage.refused[_reason(str(error), REFUSALS, "")] += 1
        else:
            yield number, turn


def _reason(error: str, reasons: Mapping[str, str], where: str) -> str:
    return next((reason for part, reason in reasons.items() if part in error), where + error)


def _has_marks(message: Mapping[str, Any]) -> bool:
    """Return whether a text has what LFM2.5 writes around arguments, or an argument isn't text."""
    values = [v for c in message.get("tool_calls", ()) for v in c["function"]["arguments"].values()]
    marked = any(
        not isinstance(value, str) or set(value) & set("'\"\\[]{}()\n") for value in values
    )
    return marked or re.search(r",\s*\w+\(", message["content"]) is not None


def _prompts(
    case: Case,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Any],
    tools: Any,
    indices: list[int],
    numbers: Iterable[int],
) -> Iterator[str]:
    """Yield the text that inference feeds before each of the turns."""
    prepared = [as_served(message, case) for message in messages]
    for number in numbers:
        yield tokenizer.apply_chat_template(
            prepared[: indices[number]],
            tools=tools,
            add_generation_prompt=True,
            tokenize=False,
            **case.kwargs,
        )


def as_served(message: Mapping[str, Any], case: Case) -> dict[str, Any]:
    """Return the message as a server gives it to the template.

    DeepSeek's wants JSON text, and some vision models' wants parts.
    """
    served = dict(message)
    if served.get("reasoning_content"):
        served["thinking"] = served["reasoning_content"]
    if case.takes_parts:
        served["content"] = [{"type": "text", "text": served["content"]}]
    if served.get("tool_calls") and case.takes_text_arguments:
        served["tool_calls"] = json.loads(json.dumps(served["tool_calls"]))
        for call in served["tool_calls"]:
            function = call["function"]
            function["arguments"] = json.dumps(function["arguments"], ensure_ascii=False)
    return served


def _without(message: Mapping[str, Any], key: str) -> dict[str, Any]:
    return {k: v for k, v in message.items() if k != key}


def main() -> None:
    """Cover all conversations with the named families, or all, and write the counts."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="names of families; all by default")
    parser.add_argument("--json", type=Path, default=RECORD, help="where the counts are written")
    options = parser.parse_args()
    conversations = list(chain(*map(read_conversations, FILES)))
    record = json.loads(options.json.read_text("utf-8")) if options.json.exists() else {}
    for name in options.families or CASES:
        record[name] = vars(cover(CASES[name], make_real_tokenizer(CASES[name]), conversations))
        print(name, record[name], flush=True)
        ordered = {name: record[name] for name in CASES if name in record}
        options.json.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n", "utf-8")


if __name__ == "__main__":
    main()
