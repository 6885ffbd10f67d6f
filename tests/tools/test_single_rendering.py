"""Counts by hand, with a tokenizer of which every character is a token."""

import pytest
import tokenizers
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from onepass_trl.chat import views
from onepass_trl.chat.template import Template
from onepass_trl.preparation.options import PreparationOptions
from onepass_trl.preparation.rows import render_record
from onepass_trl.tools.estimation import estimate
from onepass_trl.tools.estimation_plot import draw
from onepass_trl.tools.estimation_report import as_json, report
from onepass_trl.tools.single_rendering import (
    ALL_TURNS,
    LAST_TURN,
    REASONING_KEPT,
    Training,
    train_on_one_rendering,
)
from tests.chat.families import CASES


def make_tokenizer(name):
    case = CASES[name]
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.train_from_iterator(
        [],
        tokenizers.trainers.BpeTrainer(
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(), show_progress=False
        ),
    )
    model.add_special_tokens(case.tokens.special.split())
    model.add_tokens([AddedToken(token, normalized=False) for token in case.tokens.plain.split()])
    return PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token=case.tokens.eos, chat_template=case.template_text()
    )


def user(text):
    return {"role": "user", "content": text}


def assistant(reasoning, content, **keys):
    return {"role": "assistant", "reasoning_content": reasoning, "content": content, **keys}


CALL = {"type": "function", "function": {"name": "f", "arguments": {}}}
TOOL = {"role": "tool", "name": "f", "content": "x"}
CHAT = [
    user("a?"),
    assistant("rrr", "A"),
    user("b?"),
    assistant("ssss", "BB"),
    user("c?"),
    {"role": "assistant", "content": "CCC"},
    user("d?"),
    assistant("ttttt", "D"),
]
AGENT = [user("a?"), assistant("rrr", "", tool_calls=[CALL]), TOOL, assistant("ssss", "BB")]
AGENT_ASKED_AGAIN = [*AGENT, user("c?"), assistant("ttttt", "C")]

# Of Qwen3's completions, `<think>`, `</think>`, `<|im_end|>` and four line ends are 7 tokens. A
# turn without reasoning has them too. The call is `<tool_call>`, `</tool_call>`, two line ends and
# `{"name": "f", "arguments": {}}`, 30 characters.
BY_HAND = {
    "chat": (
        CHAT,
        {
            ALL_TURNS: Training(4, faithful=2, unreasoned=2, unreasoned_tokens=3 + 4),
            LAST_TURN: Training(
                4, faithful=1, untrained=3, untrained_tokens=(7 + 3 + 1) + (7 + 4 + 2) + (7 + 3)
            ),
            REASONING_KEPT: Training(
                4, faithful=1, displaced=3, displaced_tokens=(7 + 4 + 2) + (7 + 3) + (7 + 5 + 1)
            ),
        },
    ),
    "agent": (
        AGENT,
        {
            ALL_TURNS: Training(2, faithful=2),
            LAST_TURN: Training(2, faithful=1, untrained=1, untrained_tokens=7 + 3 + 34),
            REASONING_KEPT: Training(2, faithful=2),
        },
    ),
    # The call's reasoning is in the context of the answer after it, and hidden at the end.
    "agent asked again": (
        AGENT_ASKED_AGAIN,
        {
            ALL_TURNS: Training(
                3,
                faithful=1,
                unreasoned=2,
                unreasoned_tokens=3 + 4,
                displaced=1,
                displaced_tokens=7 + 2,
            ),
            LAST_TURN: Training(
                3, faithful=1, untrained=2, untrained_tokens=(7 + 3 + 34) + (7 + 4 + 2)
            ),
            REASONING_KEPT: Training(3, faithful=2, displaced=1, displaced_tokens=7 + 5 + 1),
        },
    ),
}


@pytest.fixture(scope="module")
def qwen3():
    return make_tokenizer("Qwen3")


@pytest.mark.parametrize("name", BY_HAND)
def test_conversations_are_counted_as_by_hand(name, qwen3):
    messages, expected = BY_HAND[name]
    record = render_record({"messages": messages}, qwen3)
    assert train_on_one_rendering(record, qwen3) == expected


def test_a_template_may_hide_all_reasoning(qwen3):
    """DeepSeek's cuts it from the last message too."""
    tokenizer = make_tokenizer("DeepSeek-R1-distill")
    found = train_on_one_rendering(render_record({"messages": CHAT}, tokenizer), tokenizer)
    hidden = {"unreasoned": 3, "unreasoned_tokens": 3 + 4 + 5}
    assert found[ALL_TURNS] == Training(4, faithful=1, **hidden)
    assert found[LAST_TURN].unreasoned == 1
    assert found[LAST_TURN].untrained == 3


def test_a_conversation_that_the_template_refuses_is_not_trained():
    tokenizer = make_tokenizer("gpt-oss")
    call = assistant("ssss", "with content", tool_calls=[CALL])
    options = PreparationOptions(invalid_turns="drop")
    record = render_record(
        {"messages": [*CHAT[:2], user("b?"), call, TOOL, assistant("u", "C")]}, tokenizer, options
    )
    assert len(record.turns) == 1
    for made in train_on_one_rendering(record, tokenizer).values():
        assert made == Training(1, untrained=1, untrained_tokens=record.passes[0].num_trained)


def test_a_switch_of_the_template_counts():
    tokenizer = make_tokenizer("Qwen3.6")
    record = {"messages": CHAT}
    options = PreparationOptions(chat_template_kwargs={"preserve_thinking": True})
    hidden, shown = (
        train_on_one_rendering(render_record(record, tokenizer, given), tokenizer)[ALL_TURNS]
        for given in (None, options)
    )
    assert (hidden.unreasoned, shown.unreasoned) == (2, 0)
    assert shown.faithful == 4


def test_an_estimate_adds_them_up(qwen3):
    records = [{"messages": messages} for messages, _ in BY_HAND.values()]
    found = estimate(enumerate(records), qwen3, PreparationOptions())
    assert found.single_rendering[ALL_TURNS] == Training(
        9, faithful=5, unreasoned=4, unreasoned_tokens=14, displaced=1, displaced_tokens=9
    )
    lines = list(report(found))
    at = next(at for at, line in enumerate(lines) if "would train 9 turns" in line)
    assert lines[at + 2].split() == ["all", "turns", "5", "-", "4", "(14)", "1", "(9)"]
    assert lines[at + 5].split() == ["one", "pass", "9", "-", "-", "-"]
    assert as_json(found)["single_rendering"][LAST_TURN]["untrained"] == 6


def test_the_figure_shows_how_each_turn_is_trained(qwen3):
    pytest.importorskip("matplotlib")
    records = [{"messages": messages} for messages, _ in BY_HAND.values()]
    figure = draw(estimate(enumerate(records), qwen3, PreparationOptions()), "chats")
    ways = figure.axes[0]
    ends = [bar.get_x() + bar.get_width() for bar in ways.containers[-1]]
    assert ends == [9, 9, 9, 9]
    widths = [[bar.get_width() for bar in part] for part in ways.containers]
    assert widths == [[5, 3, 5, 9], [0, 6, 0, 0], [4, 0, 0, 0], [0, 0, 4, 0]]


@pytest.mark.parametrize("name", ["Qwen3", "DeepSeek-V3", "gpt-oss"])
def test_a_long_chat_is_read_in_near_linear_time(name, monkeypatch):
    tokenizer = make_tokenizer(name)
    chat = [m for i in range(80) for m in (user(f"{i}?"), assistant(f"r{i}", f"A{i}"))]
    record = render_record({"messages": chat}, tokenizer)
    render, lengths = Template._render, []

    def counted(template, messages, prompt):
        lengths.append(len(messages))
        return render(template, messages, prompt)

    monkeypatch.setattr(Template, "_render", counted)
    shared = train_on_one_rendering(record, tokenizer)
    num_shared = sum(lengths)
    lengths.clear()
    monkeypatch.setattr(views, "MIN_LENGTH", len(chat))
    assert train_on_one_rendering(record, tokenizer) == shared
    assert num_shared < sum(lengths) / 2
