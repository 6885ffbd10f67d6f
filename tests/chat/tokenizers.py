"""Tokenizers of the families: small ones, and those made from the folder of real ones."""

from __future__ import annotations

import copy
import functools
import os
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken
from transformers import (
    AutoTokenizer,
    LlavaProcessor,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    ProcessorMixin,
)
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from tests.chat.families import CASES, Case

SHARED = Path(os.environ.get("ONEPASS_SHARED", Path(__file__).parents[3] / "shared"))
SHARED_REASON = f"needs the real conversations and tokenizers in {SHARED} (ONEPASS_SHARED)"

_SENTENCES = [
    "What is two plus two? The answer is four, because two and two are four.",
    'Search the web for "tree attention" and return {"query": "tree", "limit": 3}.',
    "Let me think about this step by step.\n\n1. First\n2. Then\n",
    "assistant user system tool functions commentary analysis final json",
]
SMALL = ("qwen3", "llama3_1", "phi3", "deepseekv3", "gptoss")
"""Templates whose tokens are as different as any: enough where all would take long."""


@functools.cache
def small_tokenizer(template: str) -> PreTrainedTokenizerBase:
    """Return the small tokenizer of the family that has this template."""
    return make_small_tokenizer(next(case for case in CASES.values() if case.template == template))


def tokenizer_with(template: str, eos: str | None = None) -> PreTrainedTokenizerBase:
    """Return Qwen3's small tokenizer with another template, and another end token if given."""
    tokenizer = copy.deepcopy(small_tokenizer("qwen3"))
    tokenizer.chat_template = template
    if eos is not None:
        tokenizer.eos_token = eos
    return tokenizer


def make_small_tokenizer(case: Case) -> PreTrainedTokenizerBase:
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
    tokens = case.tokens
    model.add_special_tokens(tokens.special.split())
    model.add_tokens([AddedToken(token, normalized=False) for token in tokens.plain.split()])
    names: dict[str, Any] = {"bos_token": tokens.bos} if tokens.bos else {}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model, eos_token=tokens.eos, pad_token=tokens.eos, **names
    )
    return _finished(tokenizer, case)


def make_processor(tokenizer: PreTrainedTokenizerBase, chat_template: Any = None) -> ProcessorMixin:
    """Return a processor of LLaVA's kind, one that needs no torchvision, around a copy."""
    return LlavaProcessor(
        LlavaImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}),
        copy.deepcopy(tokenizer),
        patch_size=14,
        vision_feature_select_strategy="default",
        chat_template=chat_template,
    )


def make_real_tokenizer(case: Case) -> PreTrainedTokenizerBase:
    """Return the real tokenizer of the family, or another one with the family's tokens."""
    tokenizer = AutoTokenizer.from_pretrained(
        SHARED / "tokenizers" / case.tokens.folder, model_max_length=10**9
    )
    known = tokenizer.get_added_vocab()
    special = [token for token in case.tokens.special.split() if token not in known]
    plain = [token for token in case.tokens.plain.split() if token not in known]
    tokenizer.add_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in plain])
    if case.tokens.bos:
        tokenizer.bos_token = case.tokens.bos
    tokenizer.eos_token = case.tokens.eos
    return _finished(tokenizer, case)


def _finished(tokenizer: PreTrainedTokenizerBase, case: Case) -> PreTrainedTokenizerBase:
    tokenizer.chat_template = case.template_text()
    if case.parser:
        tokenizer.response_template = case.parser
    return tokenizer


def texts(tokenizer: PreTrainedTokenizerBase, item: Any) -> tuple[str, str]:
    """Return the decoded context and completion of a pass."""
    context, completion = item.token_ids[~item.trained], item.token_ids[item.trained]
    return tokenizer.decode(context), tokenizer.decode(completion)
