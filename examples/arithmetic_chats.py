"""Conversations in which every answer takes several steps, and a small Qwen3 to hold them.

    user       3 +4 *2 +6
    assistant  <think> 3 +4 =0 *2 =0 +6 =6 </think> now 6
    user       again
    assistant  <think> 6 +4 =3 *2 =6 +6 =5 </think> now 5

The arithmetic is modulo seven. A turn goes on from the answer before it; "again" asks for the
latest operations once more. So small a model can't tell an answer without the steps, but learns the
steps easily. As with Qwen3's own chat template, later turns don't see earlier reasoning.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import tokenizers
from small_model import make_tiny_model
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

Message = dict[str, str]  # `role`, `content` and, of an assistant that reasons, `reasoning_content`
Conversation = list[Message]  # the user's and the assistant's messages in turn

BASE = 7
SUMS = [f"+{number}" for number in range(1, BASE)]
PRODUCTS = [f"*{number}" for number in range(2, BASE)]
DIFFERENCES = [f"-{number}" for number in range(1, BASE)]
NUM_OPERATIONS = range(3, 6)  # of a request
NUM_TURNS = range(1, 6)  # of a conversation
SHARE_OF_AGAIN = 0.3  # of the requests after the first
MAX_NEW_TOKENS = 2 * NUM_OPERATIONS[-1] + 6  # a little more than the longest answer has

# Does for these messages what Qwen3's does: only a last message is rendered with its reasoning.
# TRL's `assistant_only_loss` trains what is between `generation` and `endgeneration`.
CHAT_TEMPLATE = """
{%- for message in messages %}
  {{- '<|im_start|> ' + message.role + ' ' }}
  {%- if message.role == 'user' %}
    {{- message.content + ' <|im_end|> ' }}
  {%- else %}
    {%- generation %}
    {%- if message.reasoning_content and (loop.last or preserve_thinking) %}
      {{- '<think> ' + message.reasoning_content + ' </think> ' }}
    {%- endif %}
    {{- message.content + ' <|im_end|> ' }}
    {%- endgeneration %}
  {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|> assistant ' }}{% endif %}
"""


def apply(operation: str, number: int) -> int:
    """Return the number after an operation.

    >>> apply("-5", 3)
    5
    """
    sign, operand = operation[0], int(operation[1:])
    return {"+": number + operand, "-": number - operand, "*": number * operand}[sign] % BASE


def solve(messages: Conversation) -> Message | None:
    """Return the right answer to the last message; None if the answer before it names no number.

    >>> solve([{"role": "user", "content": "3 +4 *2"}])["reasoning_content"]
    '3 +4 =0 *2 =0'
    """
    (start, *operations), *requests = (message["content"].split() for message in messages[::2])
    for request in requests:
        operations = operations if request == ["again"] else request
    if requests:
        named = re.fullmatch(r"now (\d)", messages[-2]["content"])
        if named is None:
            return None
        start = named[1]
    words, number = [start], int(start)
    for operation in operations:
        number = apply(operation, number)
        words += [operation, f"={number}"]
    return {
        "role": "assistant",
        "reasoning_content": " ".join(words),
        "content": f"now {number}",
    }


def make_conversation(
    rng: np.random.Generator, operations: Sequence[str], num_turns: int
) -> Conversation:
    """Return a conversation on these operations in which every answer is right."""
    messages: Conversation = []
    for turn in range(num_turns):
        words = [] if turn else [str(rng.integers(BASE))]
        if turn and rng.random() < SHARE_OF_AGAIN:
            words.append("again")
        else:
            words += list(rng.choice(operations, rng.choice(NUM_OPERATIONS), replace=False))
        messages.append({"role": "user", "content": " ".join(words)})
        answer = solve(messages)
        assert answer is not None
        messages.append(answer)
    return messages


class Judgement(NamedTuple):
    """What is true of an answer.

    Attributes:
        thinks: it has reasoning.
        well_formed: the reasoning goes through the operations asked for, in their order.
        right: the content is right.
    """

    thinks: bool
    well_formed: bool
    right: bool


def judge(answer: Message, expected: Message | None) -> Judgement:
    """Return what is true of an answer, given the right one, or None if nothing would be right.

    >>> right = {"reasoning_content": "3 +4 =0 *2 =0", "content": "now 0"}
    >>> judge({"reasoning_content": "3 +4 =1 *2 =2", "content": "now 2"}, right)
    Judgement(thinks=True, well_formed=True, right=False)
    """
    reasoning = answer.get("reasoning_content", "")
    if expected is None:
        return Judgement(bool(reasoning), well_formed=False, right=False)
    texts = reasoning, expected["reasoning_content"]
    form, expected_form = (re.sub(r"=\d", "=", text) for text in texts)
    return Judgement(
        thinks=bool(reasoning),
        well_formed=form == expected_form,
        right=answer["content"] == expected["content"],
    )


def read_answer(text: str) -> Message:
    """Return what the model generated as the message that a server makes of it."""
    if not text.startswith("<think>"):
        return {"role": "assistant", "content": text}
    reasoning, _, content = text.removeprefix("<think>").partition("</think>")
    return {
        "role": "assistant",
        "reasoning_content": reasoning.strip(),
        "content": content.strip(),
    }


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of words with the chat template."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    numbers = [form.format(number) for form in ("{}", "={}") for number in range(BASE)]
    words = ["user", "assistant", "now", "again", *numbers, *SUMS, *PRODUCTS, *DIFFERENCES]
    vocabulary = {word: number for number, word in enumerate([*special, *words])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, special[0]))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(["<think>", "</think>"])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """Return a small Qwen3 with random weights."""
    rope = {"rope_type": "default", "rope_theta": 1000.0}
    return make_tiny_model(tokenizer, seed, max_position_embeddings=512, rope_parameters=rope)
