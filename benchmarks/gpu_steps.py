"""Training steps on a GPU: one pass per conversation against N passes, on Qwen3-shaped models.

Every step is forward, loss, backward and optimizer over the same conversations: one pass with our
kernels, with torch's variable-length flash attention along the tree, with FlexAttention and with
SDPA under the dense mask, and N-pass with all passes packed into rows without padding, with torch's
variable-length flash attention. In all of them the logits are computed in pieces and layers are
recomputed in backward.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from gpu_rows import conversations, lay_out
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, Qwen3Config, Qwen3ForCausalLM

from onepass_trl import OnePassCollator, Pass
from onepass_trl.attention.reference import visibility_mask
from onepass_trl.attention.transformers_backend import use_onepass_attention
from onepass_trl.tools.bench.timing import peak_mib, reason, repeated_seconds

_CONFIG = {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151_936}
MODELS: dict[str, dict[str, Any]] = {
    "0.6B": {
        **_CONFIG,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "8B": {
        **_CONFIG,
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
    },
}
TINY = {
    "tiny": {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "vocab_size": 1000,
    }
}
DENSE_MASK = "dense mask"  # SDPA's, without tree attention
CHUNK = 4096  # tokens whose logits exist at a time


class Batch(NamedTuple):
    """One forward pass: its inputs, and the target and weight of every token."""

    inputs: dict[str, Tensor]
    labels: Tensor
    weights: Tensor


def packed_causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    pass_begins: Tensor | None = None,
    longest: int = 0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Return causal attention within each of the passes that begin at `pass_begins`."""
    assert pass_begins is not None
    if query.device.type == "cpu":
        parts = [
            F.scaled_dot_product_attention(
                *(x[:, :, begin:end] for x in (query, key, value)),
                is_causal=True,
                scale=scaling,
                enable_gqa=True,
            )
            for begin, end in zip(pass_begins[:-1].tolist(), pass_begins[1:].tolist(), strict=True)
        ]
        return torch.cat(parts, dim=2).transpose(1, 2).contiguous(), None
    from torch.nn.attention.varlen import varlen_attn

    has_gqa = "enable_gqa" in inspect.signature(varlen_attn).parameters
    group = query.shape[1] // key.shape[1]
    if not has_gqa:
        key, value = (x.repeat_interleave(group, dim=1) for x in (key, value))
    q, k, v = (x[0].transpose(0, 1).contiguous() for x in (query, key, value))
    out = varlen_attn(
        q,
        k,
        v,
        pass_begins,
        pass_begins,
        longest,
        longest,
        scale=scaling,
        window_size=(-1, 0),
        **({"enable_gqa": group > 1} if has_gqa else {}),
    )
    return out[None], None


def one_pass_batch(chats: list[list[Pass]], device: str, impl: str) -> Batch:
    """Return the row of the chats' trees; `impl` is of tree attention, or DENSE_MASK."""
    batch = OnePassCollator()([lay_out(chats)])
    tensors = {name: values.to(device) for name, values in batch.items()}
    inputs = {name: tensors[name] for name in ("input_ids", "position_ids")}
    if impl == DENSE_MASK:
        inputs["attention_mask"] = visibility_mask(tensors["visible_end"])[:, None]
    else:
        inputs |= {"visible_end": tensors["visible_end"], "attention_impl": impl}
    return Batch(inputs, tensors["shift_labels"], tensors["weights"])


def n_pass_batches(chats: list[list[Pass]], device: str, max_tokens: int) -> list[Batch]:
    """Return the same targets as rows of whole passes, of at most `max_tokens` or one pass."""
    rows: list[list[Pass]] = [[]]
    for pass_ in sorted((p for passes in chats for p in passes), key=len):
        if rows[-1] and sum(map(len, rows[-1])) + len(pass_) > max_tokens:
            rows.append([])
        rows[-1].append(pass_)
    return [_packed(row, device) for row in rows]


def _packed(row: Sequence[Pass], device: str) -> Batch:
    lengths = [len(pass_) for pass_ in row]
    ids = torch.from_numpy(np.concatenate([pass_.token_ids for pass_ in row])).long()
    trained = torch.from_numpy(np.concatenate([pass_.trained for pass_ in row])).bool()
    begins = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32)
    labels = torch.where(trained, ids, -100).roll(-1)
    labels[(begins[1:] - 1).long()] = -100  # the next token is another pass's
    positions = torch.cat([torch.arange(length) for length in lengths])
    inputs = {
        "input_ids": ids[None].to(device),
        "position_ids": positions[None].to(device),
        "pass_begins": begins.to(device),
        "longest": max(lengths),
    }
    return Batch(inputs, labels[None].to(device), (labels != -100).float()[None].to(device))


def loss_of(model: Qwen3ForCausalLM, batch: Batch) -> Tensor:
    """Return the weighted sum of the cross entropies."""
    hidden = model.model(**batch.inputs, use_cache=False).last_hidden_state

    def part(states: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
        losses = F.cross_entropy(
            model.lm_head(states).float(), labels, ignore_index=-100, reduction="none"
        )
        return (losses * weights).sum()

    pieces = zip(*(x[0].split(CHUNK) for x in (hidden, batch.labels, batch.weights)), strict=True)
    return sum(checkpoint(part, *piece, use_reentrant=False) for piece in pieces)


def make_model(settings: dict[str, Any], device: str) -> Qwen3ForCausalLM:
    """Return a random model in bfloat16 that recomputes its layers in backward."""
    torch.manual_seed(0)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = Qwen3ForCausalLM(Qwen3Config(**settings))
    finally:
        torch.set_default_dtype(previous)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def switch_attention(model: Qwen3ForCausalLM, batch: Batch) -> None:
    """Give a model the attention that a batch was made for."""
    if "visible_end" in batch.inputs:
        use_onepass_attention(model)
    else:
        model.set_attn_implementation("packed_causal" if "pass_begins" in batch.inputs else "sdpa")


class Subject:
    """A model, and the conversations that every way trains; made when they are needed."""

    def __init__(self, name: str, settings: dict[str, Any], args: argparse.Namespace) -> None:
        self._name, self._settings, self._args = name, settings, args

    @cached_property
    def _chats(self) -> list[list[Pass]]:
        return conversations(self._args.step_tokens, self._args.turns, *self._args.lengths)

    @cached_property
    def _n_pass(self) -> list[Batch]:
        return n_pass_batches(self._chats, self._args.device, self._args.step_tokens)

    @cached_property
    def _trained(self) -> tuple[Qwen3ForCausalLM, torch.optim.Optimizer]:
        AttentionInterface.register("packed_causal", packed_causal_attention)
        AttentionMaskInterface.register("packed_causal", lambda *args, **kwargs: None)
        model = make_model(self._settings, self._args.device)
        # A learning rate of 0: the work of a step, with the same model for every way.
        return model, torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def measure(self, way: str, impl: str | None) -> list[dict[str, Any]]:
        """Return the result of a way, in one pass with `impl` or, if that is None, in N passes."""
        print(f"step: {self._name}, {way}", flush=True)
        model, optimizer = self._trained
        result = {
            "model": self._name,
            "turns": self._args.turns,
            "one_pass_tokens": len(lay_out(self._chats)),
            "n_pass_tokens": sum(batch.labels.numel() for batch in self._n_pass),
            "way": way,
        }
        try:
            batches = self._n_pass
            if impl is not None:
                batches = [one_pass_batch(self._chats, self._args.device, impl)]
            switch_attention(model, batches[0])
            result |= measure_way(model, optimizer, batches, self._args)
        except (RuntimeError, ValueError) as error:
            result |= dict.fromkeys(("step_ms", "peak_mib", "loss"))
            result["unavailable"] = reason(error)
        optimizer.zero_grad()
        gc.collect()
        if self._args.device == "cuda":
            torch.cuda.empty_cache()
        return [result]


def measure_way(
    model: Qwen3ForCausalLM, optimizer: torch.optim.Optimizer, batches: list[Batch], args: Any
) -> dict[str, Any]:
    """Return the time and memory of a step, and the loss per trained token."""
    total = sum(float(batch.weights.sum()) for batch in batches)
    with torch.no_grad():
        loss = sum(float(loss_of(model, batch)) for batch in batches) / total

    def step() -> None:
        for batch in batches:
            (loss_of(model, batch) / total).backward()
        optimizer.step()
        optimizer.zero_grad()

    device = torch.device(args.device)
    memory = peak_mib(step, device)
    seconds = repeated_seconds(step, device, repeats=args.step_repeats, budget_s=args.budget * 10)
    return {
        "step_ms": 1e3 * statistics.median(seconds),
        "peak_mib": memory,
        "loss": loss,
        "unavailable": None,
    }


def measurements(
    args: argparse.Namespace,
) -> Iterator[tuple[str, Callable[[], list[dict[str, Any]]]]]:
    """Yield the name of each way to train each of the chosen models, and what measures it."""
    own = "cuda" if args.device == "cuda" else "cpu"
    ways = {f"one pass, {impl}": impl for impl in (own, "varlen", "flex")}
    ways |= {"one pass, SDPA dense mask": DENSE_MASK, "N-pass, packed flash": None}
    for name, settings in (TINY if args.tiny else {n: MODELS[n] for n in args.models}).items():
        subject = Subject(name, settings, args)
        for way, impl in ways.items():
            yield f"{name}, {way}", partial(subject.measure, way, impl)


def print_table(results: list[dict[str, Any]]) -> None:
    """Print a line per model and way, with its time against that of N-pass."""
    print("\nms per step, times as fast as N-pass, loss per token")
    n_pass = {row["model"]: row["step_ms"] for row in results if row["way"].startswith("N-pass")}
    for row in results:
        head = f"{row['model']:6} {row['way']:28}"
        if row["unavailable"] is not None:
            print(head, row["unavailable"])
            continue
        reference = n_pass.get(row["model"])
        ratio = "" if reference is None else f"{reference / row['step_ms']:6.2f} x"
        print(f"{head} {row['step_ms']:10.1f} {ratio} {row['loss']:9.5f}")
