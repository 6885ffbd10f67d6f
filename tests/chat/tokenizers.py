"""Small tokenizers with the chat templates of real model families, and the folder of real ones."""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

SHARED = Path(os.environ.get("ONEPASS_SHARED", Path(__file__).parents[3] / "shared"))
SHARED_REASON = f"needs the real conversations and tokenizers in {SHARED} (ONEPASS_SHARED)"

_SENTENCES = [
    "What is two plus two? The answer is four, because two and two are four.",
    'Search the web for "tree attention" and return {"query": "tree", "limit": 3}.',
    "Let me think about this step by step.\n\n1. First\n2. Then\n",
    "assistant user system tool functions commentary analysis final json",
]
_SPECIAL = {
    "qwen3": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
    "llama3_1": ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "phi3": ["<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"],
    "deepseekv3": ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"],
    "gptoss": ["<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|call|>", "<|return|>"],
}
_PLAIN = {
    "qwen3": ["<think>", "</think>", "<tool_call>", "</tool_call>"],
    "deepseekv3": ["<think>", "</think>", "<｜User｜>", "<｜Assistant｜>"],
}
_EOS = {
    "qwen3": "<|im_end|>",
    "llama3_1": "<|eot_id|>",
    "phi3": "<|endoftext|>",
    "deepseekv3": "<｜end▁of▁sentence｜>",
    "gptoss": "<|return|>",
}
_BOS = {"llama3_1": "<|begin_of_text|>", "deepseekv3": "<｜begin▁of▁sentence｜>"}
SMALL = tuple(_SPECIAL)


def trl_template(name: str) -> str:
    """Return a chat template that TRL ships, without importing TRL."""
    spec = importlib.util.find_spec("trl")
    assert spec is not None
    assert spec.origin is not None
    return (Path(spec.origin).parent / "chat_templates" / f"{name}.jinja").read_text("utf-8")


@functools.cache
def small_tokenizer(family: str) -> PreTrainedTokenizerBase:
    """Return a byte-level BPE trained on four sentences, with the family's tokens and template."""
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.train_from_iterator(
        _SENTENCES,
        tokenizers.trainers.BpeTrainer(
            vocab_size=400,
            show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    model.add_special_tokens(_SPECIAL[family])
    model.add_tokens([AddedToken(t, normalized=False) for t in _PLAIN.get(family, [])])
    names: dict[str, Any] = {"bos_token": _BOS[family]} if family in _BOS else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token=_EOS[family], pad_token=_EOS[family], **names
    )
    tokenizer.chat_template = trl_template(family)
    return tokenizer


@functools.cache
def real_tokenizer(folder: str, template: str = "chat_template.jinja") -> PreTrainedTokenizerBase:
    """Return a tokenizer of the shared folder with one of its templates."""
    tokenizer = AutoTokenizer.from_pretrained(
        SHARED / "tokenizers" / folder, model_max_length=10**9
    )
    tokenizer.chat_template = (SHARED / "tokenizers" / folder / template).read_text("utf-8")
    return tokenizer


def texts(tokenizer: PreTrainedTokenizerBase, item: Any) -> tuple[str, str]:
    """Return the decoded context and completion of a pass."""
    context, completion = item.token_ids[~item.trained], item.token_ids[item.trained]
    return tokenizer.decode(context), tokenizer.decode(completion)
