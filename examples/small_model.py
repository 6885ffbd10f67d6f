"""A small tokenizer and an untrained Qwen3, made on the spot: nothing is downloaded."""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tokenizers
import torch
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

CONVERSATIONS = Path(__file__).parent / "conversations.jsonl"

# Qwen3's tokens: those of the first line are skipped when decoding, the others are text.
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_MARKERS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]


def read_conversations(path: Path = CONVERSATIONS) -> list[dict[str, Any]]:
    """Return the conversations of a .jsonl file, one dict with `messages` (and `tools`) each."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def make_tokenizer(
    conversations: Iterable[dict[str, Any]], vocab_size: int = 2048
) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE trained on the conversations, with the chat template of Qwen3."""
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - len(_SPECIAL) - len(_MARKERS),
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_texts(conversations), trainer)
    bpe.add_special_tokens(_SPECIAL)
    bpe.add_tokens([AddedToken(marker, normalized=False) for marker in _MARKERS])
    template = importlib.resources.files("trl").joinpath("chat_templates/qwen3.jinja")
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=template.read_text(encoding="utf-8"),
    )


def make_model(
    tokenizer: PreTrainedTokenizerFast, *, layers: int = 2, hidden_size: int = 256
) -> Qwen3ForCausalLM:
    """Return a Qwen3 with random weights, always the same."""
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=hidden_size // 4,
        max_position_embeddings=8192,
        initializer_range=0.05,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config)


def make_tiny_model(
    tokenizer: PreTrainedTokenizerFast, seed: int, **options: Any
) -> Qwen3ForCausalLM:
    """Return a Qwen3 of 340,000 random weights; `options` go to its configuration."""
    torch.manual_seed(seed)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            head_dim=32,
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **options,
        )
    )


def _texts(conversations: Iterable[dict[str, Any]]) -> Iterator[str]:
    for conversation in conversations:
        for message in conversation["messages"]:
            yield message["content"]
            yield message.get("reasoning_content", "")
