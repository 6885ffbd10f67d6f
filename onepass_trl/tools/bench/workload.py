"""What is benchmarked: the passes of a chat, and a model's shape."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from onepass_trl.passes import IGNORE_INDEX, Pass
from onepass_trl.tools.bench.timing import available_bytes
from onepass_trl.tools.flops import has_latent_keys, head_sizes
from onepass_trl.tools.model_class import auto_model

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


Length = int | tuple[int, int]


class AttentionShape(NamedTuple):
    """The heads of an attention layer and their sizes.

    Attributes:
        heads: of queries.
        kv_heads: of keys and values.
        d_qk: size of a head of queries and keys.
        d_v: size of a head of values.
    """

    heads: int
    kv_heads: int
    d_qk: int
    d_v: int


def passes_of_turns(
    turns: Iterable[tuple[Sequence[int], Sequence[int], Sequence[int]]], start: Sequence[int] = ()
) -> list[Pass]:
    """Return the passes of a chat whose reasoning is hidden from later turns.

    Args:
        turns: the tokens of each turn: of the user's message, the reasoning and the response.
        start: tokens before the first turn.

    >>> [pass_.token_ids.tolist() for pass_ in passes_of_turns([([1], [2], [3]), ([4], [5], [6])])]
    [[1, 2, 3], [1, 3, 4, 5, 6]]
    """
    trunk = [*start]
    passes = []
    for user, reasoning, response in turns:
        trunk += user
        completion = [*reasoning, *response]
        passes.append(Pass(trunk + completion, [0] * len(trunk) + [1] * len(completion)))
        trunk += response
    return passes


def chat_passes(
    num_turns: int,
    user: Length,
    reasoning: Length,
    response: Length,
    vocab_size: int,
    rng: np.random.Generator | None = None,
) -> list[Pass]:
    """Return the passes of a chat of random tokens whose reasoning is hidden from later turns.

    Args:
        num_turns: at least 1.
        user: tokens of a user message: a number, or the least and the largest of random ones.
        reasoning: those of a turn's reasoning.
        response: those of its response.
        rng: draws tokens and lengths; by default they are always the same.

    >>> [len(pass_) for pass_ in chat_passes(2, 3, 5, 2, vocab_size=9)]
    [10, 15]
    """
    rng = rng or np.random.default_rng(0)

    def tokens(length: Length) -> list[int]:
        number = length if isinstance(length, int) else rng.integers(length[0], length[1] + 1)
        return rng.integers(0, vocab_size, number).tolist()

    return passes_of_turns(
        (tokens(user), tokens(reasoning), tokens(response)) for _ in range(num_turns)
    )


def small_config(
    *,
    num_layers: int = 4,
    hidden_size: int = 384,
    heads: int = 6,
    kv_heads: int = 2,
    head_dim: int = 64,
    vocab_size: int = 4096,
) -> PretrainedConfig:
    """Return the configuration of a small Qwen3."""
    from transformers import Qwen3Config

    return Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
    )


def trim_layers(config: PretrainedConfig, num_layers: int) -> None:
    """Keep only the first layers of a model's configuration.

    Raises:
        ValueError: if it has fewer.
    """
    text = config.get_text_config()
    if not 1 <= num_layers <= text.num_hidden_layers:
        raise ValueError(
            f"num_layers is {num_layers}, expected 1 to {text.num_hidden_layers}, the layers of "
            "the model"
        )
    text.num_hidden_layers = num_layers
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = text.layer_types[:num_layers]


def attention_shape(config: PretrainedConfig) -> AttentionShape:
    """Return the shape of a model's attention layers."""
    text: Any = config.get_text_config()
    heads = text.num_attention_heads
    own_keys = has_latent_keys(text) or not getattr(text, "num_key_value_heads", None)
    kv_heads = heads if own_keys else text.num_key_value_heads
    return AttentionShape(heads, kv_heads, *head_sizes(text, text))


def random_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Return a model with random weights, always the same, on torch's default device."""
    torch.manual_seed(0)
    # A copy of the configuration: a trainer writes into that of its model.
    return auto_model(config).from_config(copy.deepcopy(config), dtype=dtype)


def labelled(pass_: Pass) -> dict[str, list[int]]:
    """Return a pass as a row of token ids and labels.

    >>> labelled(Pass([5, 6, 7], [0, 0, 1]))
    {'input_ids': [5, 6, 7], 'labels': [-100, -100, 7]}
    """
    labels = np.where(pass_.trained, pass_.token_ids, IGNORE_INDEX)
    return {"input_ids": pass_.token_ids.tolist(), "labels": labels.tolist()}


def check_memory(
    config: PretrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    *,
    values_per_parameter: int,
    what: str,
    advice: str,
) -> None:
    """Raise ValueError unless there is memory for these values; activations come on top.

    Args:
        config: of the model.
        dtype: of all values.
        device: that has them.
        values_per_parameter: weights, gradients and the like.
        what: begins the message: "the model with gradients takes".
        advice: ends it: what to do.
    """
    free = available_bytes(device)
    needed = values_per_parameter * dtype.itemsize * num_parameters(config)
    if free is not None and needed > free:
        raise ValueError(
            f"{what} {needed / 2**30:.1f} GiB without activations, and {free / 2**30:.1f} GiB "
            f"are free: {advice}"
        )


def num_parameters(config: PretrainedConfig) -> int:
    """Return how many parameters a model has, without allocating them."""
    with torch.device("meta"):
        return auto_model(config).from_config(copy.deepcopy(config)).num_parameters()
