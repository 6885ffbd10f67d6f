"""The forking token is where the thinking opener was, in training as in inference."""

import json

import pytest
from transformers import AutoTokenizer

from onepass_trl.chat import ChatFormatError
from onepass_trl.chat.encoding import encode_alone
from onepass_trl.chat.template import Template
from onepass_trl.preparation.options import PreparationOptions
from onepass_trl.setsft import forking_prompts
from onepass_trl.setsft.rendering import ForkingTokens, render_traces
from onepass_trl.setsft.tokens import _add_to_tokenizer, forking_tokens
from tests.chat.tokenizers import SHARED, SHARED_REASON
from tests.chat.turns import render_turns
from tests.setsft.sets import random_set
from tests.setsft.trainers import fresh_tokenizer

OPENERS = {
    "qwen3": "<think>",
    "deepseekv3": "<think>",
    "gptoss": "<|channel|>analysis<|message|>",
}
REAL = {"qwen3": "qwen3", "deepseek-r1": "deepseekv3", "gpt-oss": "gptoss"}
TOOL = {
    "type": "function",
    "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}},
}
K = 4


def with_tokens(tokenizer, opener=None):
    _add_to_tokenizer(tokenizer, forking_tokens(K))
    return tokenizer, ForkingTokens.of(tokenizer, K, thinking_opener=opener)


def traces_of(record, tokenizer, tokens, *, verify=False):
    return render_traces(record, tokenizer, tokens, PreparationOptions(), verify=verify)


def check_traces(record, tokenizer, tokens, opener):
    """Each trace is the turn with a forking token for the opener, after inference's prompt."""
    traces = traces_of(record, tokenizer, tokens)
    prompts = forking_prompts(record["prompt"], tokenizer, K, tools=record.get("tools"))
    texts = forking_prompts(
        record["prompt"], tokenizer, K, tools=record.get("tools"), tokenize=False
    )
    assert len(traces) == len(record["completions"])
    for number, (trace, completion) in enumerate(zip(traces, record["completions"], strict=True)):
        [turn] = render_turns(
            [*record["prompt"], completion], tokenizer, tools=record.get("tools"), train_on="last"
        )
        before, _, after = (turn.context + turn.completion).rpartition(opener)
        assert trace.number == number
        for id_, name, prompt, text in zip(tokens.ids, tokens.names, prompts, texts, strict=True):
            pass_ = trace.after(id_)
            assert tokenizer.decode(pass_.token_ids) == before + name + after
            assert pass_.token_ids[~pass_.trained].tolist() == prompt
            assert tokenizer.decode(prompt) == text
            assert pass_.token_ids[trace.fork] == id_
            assert not pass_.trained[: trace.fork + 1].any()
            assert pass_.trained[-1]


@pytest.mark.parametrize("family", OPENERS)
@pytest.mark.parametrize("turns", [1, 3])
def test_the_forking_token_replaces_the_opener(family, turns):
    tokenizer, tokens = with_tokens(fresh_tokenizer(family))
    check_traces(random_set(1, 3, turns=turns), tokenizer, tokens, OPENERS[family])


@pytest.mark.shared
@pytest.mark.skipif(not SHARED.is_dir(), reason=SHARED_REASON)
@pytest.mark.parametrize("folder", REAL)
def test_with_real_tokenizers_and_tools(folder):
    path = SHARED / "tokenizers" / folder
    tokenizer = AutoTokenizer.from_pretrained(path, model_max_length=10**9)
    tokenizer.chat_template = (path / "chat_template.jinja").read_text("utf-8")
    tokenizer, tokens = with_tokens(tokenizer)
    record = {**random_set(1, 3, turns=2), "tools": [TOOL]}
    check_traces(record, tokenizer, tokens, OPENERS[REAL[folder]])


@pytest.mark.parametrize("verify", [False, True])
@pytest.mark.parametrize("family", OPENERS)
def test_the_prompt_is_rendered_and_encoded_once_for_all_traces(family, verify, monkeypatch):
    """And the traces are those of records with one completion each."""
    tokenizer, tokens = with_tokens(fresh_tokenizer(family))
    record = random_set(1, 4, turns=3)
    record["completions"][1] = {"role": "assistant", "content": "<think>hm</think>2"}
    if family != "gptoss":  # which writes no opener without reasoning
        record["completions"][2] = {"role": "assistant", "content": "four"}
    single = [
        traces_of({**record, "completions": [completion]}, tokenizer, tokens, verify=verify)[0]
        for completion in record["completions"]
    ]
    contexts, encoded, render = [], [], Template.render

    def counting(self, messages, *, prompt):
        if prompt and messages[0]["content"]:
            contexts.append(messages)
        return render(self, messages, prompt=prompt)

    def encoding(tokenizer, texts):
        encoded.extend(texts)
        return encode_alone(tokenizer, texts)

    monkeypatch.setattr(Template, "render", counting)
    monkeypatch.setattr("onepass_trl.setsft.rendering.encode_alone", encoding)
    traces = traces_of(record, tokenizer, tokens, verify=verify)
    assert len(contexts) == 1
    assert sum(record["prompt"][-1]["content"] in text for text in encoded) == 1 + verify
    for number, (trace, expected) in enumerate(zip(traces, single, strict=True)):
        assert (trace.number, trace.fork) == (number, expected.fork)
        assert trace.pass_.token_ids.tolist() == expected.pass_.token_ids.tolist()
        assert trace.pass_.trained.tolist() == expected.pass_.trained.tolist()


def test_columns_of_json_text_are_read(tmp_path):
    tokenizer, tokens = with_tokens(fresh_tokenizer())
    record = random_set(1, 2)
    text = {name: json.dumps(value) for name, value in record.items()}
    for a, b in zip(*(traces_of(r, tokenizer, tokens) for r in (record, text)), strict=True):
        assert a.pass_.token_ids.tolist() == b.pass_.token_ids.tolist()


def test_completions_may_be_strings_and_lists_of_one_message():
    tokenizer, tokens = with_tokens(fresh_tokenizer())
    record = random_set(1, 1)
    [message] = record["completions"]
    string = f"<think>{message['reasoning_content']}</think>{message['content']}"
    record["completions"] = [message, [message], string]
    first, *others = (t.pass_.token_ids.tolist() for t in traces_of(record, tokenizer, tokens))
    assert others == [first, first]


@pytest.mark.parametrize("family", ["qwen3", "deepseekv3"])
def test_a_trace_without_reasoning_has_an_empty_one(family):
    tokenizer, tokens = with_tokens(fresh_tokenizer(family))
    record = {**random_set(1, 1), "completions": [{"role": "assistant", "content": "four"}]}
    [trace] = traces_of(record, tokenizer, tokens)
    trained = trace.pass_.token_ids[trace.pass_.trained]
    assert tokenizer.decode(trained).lstrip().startswith("</think>\n\nfour")


def test_without_an_opener_the_token_is_between_prompt_and_completion():
    """Templates without reasoning, and turns of gpt-oss without it."""
    for family in ("llama3_1", "phi3", "gptoss"):
        tokenizer, tokens = with_tokens(fresh_tokenizer(family), opener="")
        record = {**random_set(1, 1), "completions": [{"role": "assistant", "content": "four"}]}
        [trace] = traces_of(record, tokenizer, tokens)
        [turn] = render_turns([*record["prompt"], *record["completions"]], tokenizer)
        decoded = tokenizer.decode(trace.after(tokens.ids[2]).token_ids)
        assert decoded == f"{turn.context}<think3>{turn.completion}"
        prompts = forking_prompts(
            record["prompt"], tokenizer, K, thinking_opener="", tokenize=False
        )
        assert prompts[2] == f"{turn.context}<think3>"


def test_an_opener_that_is_ordinary_text_is_replaced():
    tokenizer, tokens = with_tokens(fresh_tokenizer("llama3_1"), opener="<think>")
    completion = {"role": "assistant", "content": "<think>two and two</think>four"}
    record = {**random_set(1, 1), "completions": [completion]}
    [trace] = traces_of(record, tokenizer, tokens)
    decoded = tokenizer.decode(trace.after(tokens.ids[0]).token_ids)
    assert decoded.endswith("<think1>two and two</think>four<|eot_id|>")
    prompts = forking_prompts(record["prompt"], tokenizer, K, thinking_opener="<think>")
    assert trace.after(tokens.ids[0]).token_ids[~trace.pass_.trained].tolist() == prompts[0]


class TestText:
    @pytest.mark.parametrize(
        ("prompt", "completion", "expected"),
        [
            ("two?", "<think>add</think>four", "two?<think2>add</think>four<|im_end|>"),
            (
                "two?<think>\n",
                "add</think>four<|im_end|>",
                "two?<think2>\nadd</think>four<|im_end|>",
            ),
            ("[two]?", "<think>add", "[two]?<think2>add<|im_end|>"),
        ],
    )
    def test_the_opener_ends_the_prompt_or_begins_the_completion(
        self, prompt, completion, expected
    ):
        tokenizer, tokens = with_tokens(fresh_tokenizer())
        record = {"prompt": prompt, "completions": [completion]}
        [trace] = traces_of(record, tokenizer, tokens)
        pass_ = trace.after(tokens.ids[1])
        assert tokenizer.decode(pass_.token_ids) == expected
        context = pass_.token_ids[~pass_.trained].tolist()
        assert forking_prompts(prompt, tokenizer, K)[1] == context

    def test_the_prompt_has_the_tokenizers_special_tokens_and_the_completion_has_not(self):
        from tokenizers.processors import TemplateProcessing

        tokenizer, tokens = with_tokens(fresh_tokenizer("llama3_1"), opener="")
        bos = "<|begin_of_text|>"
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.convert_tokens_to_ids(bos))]
        )
        [trace] = traces_of({"prompt": "two", "completions": ["four"]}, tokenizer, tokens)
        text = tokenizer.decode(trace.after(tokens.ids[0]).token_ids)
        assert text == f"{bos}two<think1>four<|eot_id|>"

    def test_a_prompt_that_happens_to_be_a_json_list_is_text(self):
        tokenizer, tokens = with_tokens(fresh_tokenizer("llama3_1"), opener="")
        [trace] = traces_of({"prompt": "[1, 2]", "completions": ["b"]}, tokenizer, tokens)
        text = tokenizer.decode(trace.after(tokens.ids[0]).token_ids)
        assert text == "[1, 2]<think1>b<|eot_id|>"


PROMPT = [{"role": "user", "content": "two?"}]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"prompt": PROMPT}, "has no completions, only 'prompt'"),
        ({"messages": PROMPT}, "has no prompt and no completions"),
        ({"prompt": PROMPT, "completions": []}, "at least one assistant message"),
        ({"prompt": PROMPT, "completions": "four"}, "at least one assistant message"),
        ({"prompt": PROMPT, "completions": [{"role": "user", "content": "x"}]}, "0 of 1: it must"),
        ({"prompt": PROMPT, "completions": [[]]}, "must be one assistant message"),
        ({"prompt": PROMPT, "completions": ["four", ""]}, "completion 1 of 2.*it is empty"),
        ({"prompt": "two?", "completions": [" "]}, "it is empty"),
        ({"prompt": "two?", "completions": [{"role": "assistant", "content": "x"}]}, "is text"),
        ({"prompt": "two?", "completions": [" <think>a"]}, "white space stands before"),
        ({"prompt": "two?", "completions": ["four"]}, "thinking opener '<think>'.*neither"),
        ({"prompt": "two?", "completions": ["<think>a<think2>b"]}, "forking token '<think2>' its"),
        ({"prompt": "a<think1>b", "completions": ["<think>a"]}, "the prompt contains the forking"),
        ({"prompt": "", "completions": ["<think>four"]}, "the question is empty"),
        (
            {"prompt": PROMPT, "completions": ["<think>a <think3> b</think>c"]},
            "contains the special token '<think3>'",
        ),
        (
            {
                "prompt": PROMPT,
                "completions": ["four"],
                "chat_template_kwargs": {"enable_thinking": False},
            },
            "Give the completion reasoning|excludes turns with reasoning|doesn't go on",
        ),
    ],
)
def test_records_that_cannot_be_traces_are_errors(record, message):
    tokenizer, tokens = with_tokens(fresh_tokenizer())
    with pytest.raises(ChatFormatError, match=message):
        traces_of(record, tokenizer, tokens)


def test_a_missing_opener_is_an_error():
    """gpt-oss begins a turn without reasoning with its answer; Llama 3 has no opener at all."""
    tokenizer, tokens = with_tokens(fresh_tokenizer("gptoss"))
    record = {"prompt": PROMPT, "completions": [{"role": "assistant", "content": "four"}]}
    with pytest.raises(ChatFormatError, match=r"completion 0 of 1: the thinking opener.*neither"):
        traces_of(record, tokenizer, tokens)
    with pytest.raises(ValueError, match=r"has no thinking opener '<think>'.*or to ''"):
        with_tokens(fresh_tokenizer("llama3_1"))


def test_prompts_for_a_tokenizer_without_the_tokens_are_errors():
    with pytest.raises(ValueError, match=r"splits the forking token '<think1>' into \d ids"):
        forking_prompts(PROMPT, fresh_tokenizer(), K)
