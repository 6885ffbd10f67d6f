"""One pass against N passes with the user's own model, before the first step of a training."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from numpy.typing import NDArray
from torch import nn
from transformers import PreTrainedModel

from onepass_trl.attention.model_check import base_model, reference_attention
from onepass_trl.attention.transformers_backend import set_attention
from onepass_trl.data.layout import Layout, images_on, separate, target_paths
from onepass_trl.passes import IGNORE_INDEX
from onepass_trl.vision import Vision, ordinary_inputs
from onepass_trl.wording import counted

logger = logging.getLogger(__name__)

NUM_ROWS = 32  # of the dataset, among which the row to compare is chosen
MAX_TOKENS = 2048  # of that row
MAX_PASSES = 8
MAX_TARGETS = 256  # of each pass: as many rows of logits are in memory at once

# Mean differences in nats that may be rounding: always up to the first number, and up to the second
# if an ordinary pass of text shows that this model rounds so (TF32, or experts that change).
_ROUNDING = {
    torch.float64: (1e-9, 1e-7),
    torch.float32: (1e-4, 1e-2),
    torch.float16: (0.02, 0.1),
    torch.bfloat16: (0.05, 0.3),
}
_FACTOR = 5.0  # times the rounding of that pass

LogProbs = Callable[[Layout], NDArray[np.float32]]
"""Gives the log-probability of the target at each position of a row, ``(num_tokens,)``."""


@dataclass(frozen=True)
class Difference:
    """How far one pass is from N passes: mean absolute differences of log-probabilities, in nats.

    Attributes:
        one_pass: of the pass in which it is largest; NaN if it is NaN in one.
        rounding: of an ordinary causal pass of text, of which both compute the same.
        num_passes: passes that were compared.
        num_tokens: tokens of the row.
    """

    one_pass: float
    rounding: float
    num_passes: int
    num_tokens: int

    def check(self, model: nn.Module, dtype: torch.dtype) -> None:
        """Raise ValueError if it is more than rounding of a model that computes in `dtype`."""
        least, most = _ROUNDING.get(dtype, _ROUNDING[torch.bfloat16])
        allowed = min(max(least, _FACTOR * self.rounding), most)
        if math.isnan(self.rounding) or self.one_pass <= allowed:
            return  # a model without finite log-probabilities is reported by its first loss
        raise ValueError(
            f"{type(base_model(model)).__name__} does not compute in one pass what it computes in "
            f"{counted(self.num_passes, 'pass', 'passes')}: the log-probabilities of a row of "
            f"{counted(self.num_tokens, 'token')} differ by {self.one_pass:.2g} on average, where "
            f"rounding in {dtype} explains up to {allowed:.2g}. So it would be trained with "
            "another loss. A layer may ignore visible_end, visible_begin or position_ids, or a "
            "kernel may be wrong: try attention_impl='flex' or 'dense', and please report it with "
            "the output of `onepass-trl env`. verify_model=False trains without this check"
        )


@torch.no_grad()
def verify(
    model: PreTrainedModel,
    wrapped: nn.Module,
    rows: Iterable[Layout],
    *,
    log_probs: LogProbs,
    accelerator: Accelerator,
    vision: Vision | None = None,
) -> None:
    """Raise ValueError unless one pass gives what N passes give, on one of the rows.

    Args:
        model: the transformers model.
        wrapped: the same as it is trained, so perhaps sharded and compiled.
        rows: of the beginning of the dataset. Each process may have another part of a stream; the
            first one's choice counts.
        log_probs: computes rows as training does.
        accelerator: of the processes.
        vision: processes the images of rows.
    """
    begin = time.perf_counter()
    [row] = broadcast_object_list([choose_row(rows)])
    if row is None:
        logger.info("The model is not verified: the first rows are all too long for it")
        return
    # Not compiled for the length of each pass.
    causal = getattr(wrapped, "_orig_mod", wrapped)
    wrapped.eval()
    try:
        found = compare(row, log_probs, lambda row: causal_log_probs(model, row, causal, vision))
    finally:
        wrapped.train()
    # All processes come to the same result, or some would wait for others that have raised.
    own = torch.tensor([[found.one_pass, found.rounding]], device=accelerator.device)
    one_pass, rounding = accelerator.gather(own).amax(dim=0).tolist()
    found = replace(found, one_pass=one_pass, rounding=rounding)
    autocast = {"bf16": torch.bfloat16, "fp16": torch.float16}
    found.check(model, autocast.get(accelerator.mixed_precision, model.dtype))
    logger.info(
        "One pass gives the log-probabilities of %s: on a row of %s they differ by %.2g on average "
        "(%.1f s)",
        counted(found.num_passes, "pass", "passes"),
        counted(found.num_tokens, "token"),
        found.one_pass,
        time.perf_counter() - begin,
    )


def choose_row(rows: Iterable[Layout]) -> Layout | None:
    """Return the smallest tree of `rows` that shows most, of at most `MAX_TOKENS`.

    That is one with images, of several passes, and with different images, which could be confused;
    what comes first here counts most. None if all are longer.
    """
    trees = [tree for row in rows for tree in separate(row)]
    fitting = [tree for tree in trees if len(tree) <= MAX_TOKENS and tree.weights.any()]
    return min(
        fitting,
        key=lambda tree: (
            not tree.images,
            len(list(target_paths(tree))) == 1,
            len({span.source for span in tree.images}) < 2,
            len(tree),
        ),
        default=None,
    )


def compare(row: Layout, one_pass: LogProbs, n_pass: LogProbs) -> Difference:
    """Return how far the log-probabilities of a tree's targets are from those of its passes.

    Args:
        row: a tree.
        one_pass: computes as training does.
        n_pass: computes rows that are one pass by the model's own causal attention.
    """
    paths = list(target_paths(row))[:MAX_PASSES]
    together = one_pass(row)
    differences = []
    rounding = 0.0
    for number, (path, targets) in enumerate(paths):
        alone = _pass_alone(row, path, targets[:: math.ceil(len(targets) / MAX_TARGETS)])
        compared = alone.weights > 0
        expected = n_pass(alone)[compared]
        differences.append(np.abs(together[path][compared] - expected).mean())
        if number == 0:
            # A fault with images would be taken for rounding, as it is in this pass too.
            text = _without_images(alone)
            expected = n_pass(text)[compared] if alone.images else expected
            rounding = float(np.abs(one_pass(text)[compared] - expected).mean())
    return Difference(float(np.max(differences)), rounding, len(paths), len(row))


def _pass_alone(row: Layout, path: NDArray[np.int64], targets: NDArray[np.int64]) -> Layout:
    """Return the row of one pass: a path of a tree, with some of its targets."""
    length = len(path)
    shift_labels = np.full(length, IGNORE_INDEX, dtype=np.int32)
    shift_labels[targets] = row.shift_labels[path[targets]]
    return Layout(
        input_ids=row.input_ids[path],
        position_ids=np.arange(length, dtype=np.int32),
        shift_labels=shift_labels,
        weights=(shift_labels != IGNORE_INDEX).astype(np.float32),
        visible_end=np.full(length, length, dtype=np.int32),
        multiplicity=np.ones(length, dtype=np.int32),
        num_turns=1,
        images=images_on(row, path),
    )


def _without_images(alone: Layout) -> Layout:
    """Return the row of one pass with text in the places of its images, so of the same length."""
    input_ids, is_text = alone.input_ids.copy(), np.ones(len(alone), dtype=np.bool_)
    for span in alone.images:
        is_text[span.begin : span.end] = False
    input_ids[~is_text] = np.resize(input_ids[is_text], np.count_nonzero(~is_text))
    return replace(alone, input_ids=input_ids, images=())


def causal_log_probs(
    model: PreTrainedModel,
    row: Layout,
    forward: Callable[..., Any],
    vision: Vision | None = None,
) -> NDArray[np.float32]:
    """Return the log-probabilities of a pass's targets, ``(num_tokens,)``, 0 where there is none.

    By one ordinary causal forward and the model's own logits, in its reference attention.

    Args:
        model: the transformers model.
        row: one pass.
        forward: calls the model, which may be wrapped.
        vision: processes the images of the pass.
    """
    is_target = row.weights > 0
    targets = torch.from_numpy(np.flatnonzero(is_target)).to(model.device)
    input_ids, labels = (
        torch.from_numpy(ids).long().to(model.device) for ids in (row.input_ids, row.shift_labels)
    )
    images = ordinary_inputs(row.input_ids, row.images, vision, model.device)
    with _attention(model, reference_attention(model)):
        outputs = forward(
            input_ids=input_ids[None], use_cache=False, logits_to_keep=targets, **images
        )
    logits = outputs.logits[0]
    if len(logits) != len(targets):  # some multimodal models don't know logits_to_keep
        logits = logits[targets]
    log_probs = logits.float().log_softmax(-1).gather(1, labels[targets, None])[:, 0]
    out = np.zeros(len(row), dtype=np.float32)
    out[is_target] = log_probs.cpu().numpy()
    return out


@contextmanager
def _attention(model: PreTrainedModel, implementation: str) -> Iterator[None]:
    before = model.config._attn_implementation
    set_attention(model, implementation)
    try:
        yield
    finally:
        set_attention(model, before)
