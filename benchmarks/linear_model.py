"""The ways of `linear_ways.py` for a whole model of four layers of Qwen3.5, of which one attends.

N-pass attends by torch's variable-length FlashAttention within each pass. Its convolutions run on
from a pass to the next, as transformers' do without causal-conv1d: the same work, not quite the
same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

from fla.ops.gated_delta_rule import chunk_gated_delta_rule
from gpu_steps import Batch, loss_of, n_pass_batches, one_pass_batch, packed_causal_attention
from linear_ways import Shape, Way
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoConfig, PreTrainedModel

from onepass_trl import Pass
from onepass_trl.attention.branching import delta_rule
from onepass_trl.attention.branching.recurrences import along_tree
from onepass_trl.attention.transformers_backend import use_onepass_attention
from onepass_trl.tools.bench.workload import random_model

LINEAR, FULL = "linear_attention", "full_attention"


def model_ways(
    passes: list[Pass], shape: Shape, layer_ways: dict[str, Way], *, tiny: bool
) -> dict[str, Way]:
    """Return all ways to compute the passes; the steps of a layer are those of `layer_ways`."""
    model = _model(shape, tiny=tiny)
    use_onepass_attention(model)
    tree = one_pass_batch([passes], shape.device, "auto")
    [packed] = n_pass_batches([passes], shape.device, max_tokens=sum(map(len, passes)))
    packed.inputs["cu_seq_lens_q"] = packed.inputs["pass_begins"].long()
    AttentionInterface.register("packed_causal", packed_causal_attention)
    AttentionMaskInterface.register("packed_causal", lambda *args, **kwargs: None)
    forwards = {
        "grouped": _forward(model, tree, "onepass", _by_groups),
        "leveled": _forward(model, tree, "onepass"),
        "n_pass": _forward(model, packed, "packed_causal"),
    }
    return {name: layer_ways[name]._replace(forward=run) for name, run in forwards.items()}


def _model(shape: Shape, *, tiny: bool) -> PreTrainedModel:
    width = 32 if tiny else 2048
    config = AutoConfig.for_model(
        "qwen3_5_text",
        vocab_size=4096,
        hidden_size=width,
        intermediate_size=3 * width,
        layer_types=[LINEAR, FULL] if tiny else [LINEAR, LINEAR, LINEAR, FULL],
        num_hidden_layers=2 if tiny else 4,
        num_attention_heads=shape.heads,
        num_key_value_heads=1,
        head_dim=shape.head_dim,
        linear_num_key_heads=shape.heads,
        linear_num_value_heads=shape.value_heads,
        linear_key_head_dim=shape.head_dim,
        linear_value_head_dim=shape.head_dim,
    )
    return random_model(config, shape.dtype).to(shape.device).train()


def _forward(
    model: PreTrainedModel,
    batch: Batch,
    attention: str,
    rule: Callable[..., Tensor] = delta_rule.along_tree_by_fla,
) -> Callable[[], Tensor]:
    def forward() -> Tensor:
        model.zero_grad()
        model.set_attn_implementation(attention)
        with patch.object(delta_rule, "along_tree_by_fla", rule):
            return loss_of(model, batch)

    return forward


def _by_groups(
    _: Any, __: str, visible_end: Tensor, sequences: Sequence[Tensor], **___: Any
) -> Tensor:
    """Return what `along_tree_by_fla` does, by a call for each group of segments."""

    def run(
        pieces: Sequence[Tensor], initial: Tensor | None, wants_state: bool
    ) -> tuple[Tensor, Tensor | None]:
        state = dict(initial_state=initial, output_final_state=wants_state)
        out: tuple[Tensor, Tensor | None] = chunk_gated_delta_rule(
            *pieces, use_qk_l2norm_in_kernel=True, **state
        )
        return out

    return along_tree(run, visible_end, sequences)
