"""How long forward and backward take on this machine, fitted to a few rows that are run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls

from onepass_trl.chat.processing import ProcessingClass
from onepass_trl.data import Layout
from onepass_trl.data.collator import OnePassCollator, model_inputs
from onepass_trl.passes import Pass
from onepass_trl.preparation.options import PreparationOptions
from onepass_trl.preparation.rows import lay_out, render_record
from onepass_trl.tools.bench.timing import seconds_of
from onepass_trl.tools.bench.workload import labelled
from onepass_trl.tools.estimation import Begins, Work, weighted_pairs, work_of_pass, work_of_row
from onepass_trl.vision import Vision, ordinary_inputs, vision_of
from onepass_trl.wording import counted

if TYPE_CHECKING:
    from datasets import Features
    from transformers import PreTrainedModel

NUM_PROBES = 6
LONGEST_PROBE = 8192  # tokens


@dataclass(frozen=True)
class StepTime:
    """Seconds of forward and backward per row, token, executed pair and token of an image.

    Attributes:
        per_row: independent of the row's length.
        per_token: for each token of a row.
        per_pair: for each pair in an executed tile, times the weight of its layers.
        per_image_token: for each token of an image, what the vision tower adds.
        weights: by window, of the layers that have it.
        largest_error: of the fit, relative to the measured time.
        num_rows: the number of rows of the fit.
        longest: tokens of the longest of these rows.
    """

    per_row: float
    per_token: float
    per_pair: float
    per_image_token: float
    weights: Mapping[int | None, int]
    largest_error: float
    num_rows: int
    longest: int

    def seconds(self, work: Work) -> float:
        """Return the seconds that these rows take."""
        coefficients = [self.per_row, self.per_token, self.per_pair, self.per_image_token]
        return float(_features(work, self.weights) @ coefficients)


def _features(work: Work, weights: Mapping[int | None, int]) -> np.ndarray:
    pairs = weighted_pairs(work.executed, weights)
    return np.array([work.rows, work.tokens, pairs, work.image_tokens], dtype=np.float64)


def fit(
    works: Sequence[Work], seconds: Sequence[float], weights: Mapping[int | None, int]
) -> StepTime:
    """Return the non-negative coefficients with the smallest relative error against `seconds`.

    >>> from collections import Counter
    >>> works = [Work(1, n, n, executed=Counter({None: n * n})) for n in (100, 200, 400)]
    >>> time = fit(works, [1 + 0.01 * n + 1e-5 * n * n for n in (100, 200, 400)], {None: 1})
    >>> print(f"{time.per_row:.3f} {time.per_token:.5f} {time.per_pair:.2g}")
    1.000 0.01000 1e-05
    """
    features = np.array([_features(work, weights) for work in works])
    measured, scale = np.array(seconds), np.maximum(features.max(axis=0), 1)
    coefficients, _ = nnls(features / scale / measured[:, None], np.ones(len(works)))
    coefficients /= scale
    error = float(np.abs(features @ coefficients / measured - 1).max())
    per_row, per_token, per_pair, per_image_token = coefficients.tolist()
    return StepTime(
        per_row,
        per_token,
        per_pair,
        per_image_token,
        dict(weights),
        error,
        num_rows=len(works),
        longest=max(work.tokens for work in works),
    )


def spread(lengths: NDArray[np.int64], number: int = NUM_PROBES) -> list[int]:
    """Return indices of some lengths from the shortest to the longest, evenly by rank.

    >>> spread(np.array([50, 10, 40, 20, 30]), 3)
    [1, 4, 0]
    """
    order = np.argsort(lengths, kind="stable")
    ranks = np.linspace(0, len(order) - 1, min(number, len(order))).round().astype(int)
    return list(dict.fromkeys(order[ranks].tolist()))


def choose_probes(
    records: Sequence[Mapping[str, Any]],
    tokenizer: ProcessingClass,
    options: PreparationOptions,
    *,
    features: Features | None = None,
) -> tuple[list[Layout], list[Pass]]:
    """Return rows of one pass and of N-pass to run, spread over the lengths of the conversations.

    None is longer than `LONGEST_PROBE`: longer ones are cut, as with that ``max_length``.

    Raises:
        ValueError: if no trained token is within that length.
    """
    length = min(options.max_length or LONGEST_PROBE, LONGEST_PROBE)
    options = replace(options, max_length=length, overflow="truncate")
    layouts: list[Layout] = []
    passes: list[Pass] = []
    for record in records:
        rendered = render_record(record, tokenizer, options, features=features)
        left, rows, _ = lay_out(rendered.passes, options)
        layouts += rows
        passes += left
    if not passes:
        raise ValueError(
            f"nothing to measure: of {counted(len(records), 'conversation')}, no trained token is "
            f"within the first {length:,} tokens of its turn with its context"
        )
    chosen = spread(np.array([len(layout) for layout in layouts]))
    chosen_passes = spread(np.array([len(pass_) for pass_ in passes]))
    return [layouts[at] for at in chosen], [passes[at] for at in chosen_passes]


def measure(
    model: PreTrainedModel,
    rows: Sequence[Layout],
    passes: Sequence[Pass],
    weights: Mapping[int | None, int],
    *,
    processing_class: ProcessingClass | None = None,
    repeats: int = 3,
    progress: Callable[[], None] = lambda: None,
) -> tuple[StepTime, StepTime]:
    """Return the step times of one pass and of N-pass, each fitted to its own rows.

    Both run the model as the trainers do, with TRL's fused LM head, in turn, and the shortest of
    `repeats` counts. N-pass uses SDPA, or eager attention if SDPA can't do what the model needs.

    Args:
        model: a causal language model of transformers. Its weights don't matter; afterwards it has
            TRL's head and no gradients.
        weights: of the layers' attention, by window, see `Estimate.attention_weights`.
        processing_class: the model's processor, for rows with images. The time that it takes
            doesn't count.
        repeats: how often each is timed, after a run that isn't.
        progress: called after each run.

    Raises:
        ValueError: if one-pass attention doesn't support the model.
    """
    from onepass_trl.attention.image_models import (
        collator_options,
        layer_sees_image_blocks,
        sees_image_blocks,
    )
    from onepass_trl.attention.model_check import reference_attention
    from onepass_trl.attention.transformers_backend import set_attention, use_onepass_attention
    from onepass_trl.training.freed_memory import keep_freed_memory
    from onepass_trl.training.lm_head import add_fused_lm_head

    if model.device.type == "cpu":
        keep_freed_memory()  # as the trainer, whose steps are predicted
    use_onepass_attention(model)
    add_fused_lm_head(model)
    model.train()
    vision = None if processing_class is None else vision_of(processing_class)
    collator = OnePassCollator(vision=vision, **collator_options(model.config))
    one_pass = [
        {name: x.to(model.device) for name, x in model_inputs(collator([row])).items()}
        for row in rows
    ]
    n_pass = [_n_pass_batch(pass_, vision, model.device) for pass_ in passes]
    ways = (("onepass", one_pass), (reference_attention(model), n_pass))
    shortest = [[math.inf] * len(batches) for _, batches in ways]
    for repeat in range(repeats + 1):
        for (name, batches), best in zip(ways, shortest, strict=True):
            set_attention(model, name)
            for index, batch in enumerate(batches):
                seconds = _seconds(model, batch)
                if repeat:
                    best[index] = min(best[index], seconds)
                progress()
    config = model.config
    sees_blocks = sees_image_blocks(config)
    seeing = (
        [None] if sees_blocks and layer_sees_image_blocks(config.get_text_config(), None) else []
    )
    n_pass_works = [work_of_pass(pass_, [None], seeing, vision) for pass_ in passes]
    works = [
        work_of_row(row, weights, _visible_begins(model, batch, weights))
        for row, batch in zip(rows, one_pass, strict=True)
    ]
    return (
        fit(works, shortest[0], weights),
        # SDPA masks what is outside a window but skips none of it.
        fit(n_pass_works, shortest[1], {None: sum(weights.values())}),
    )


def _visible_begins(
    model: PreTrainedModel, batch: Mapping[str, torch.Tensor], windows: Iterable[int | None]
) -> Begins:
    from onepass_trl.attention.image_models import layer_sees_image_blocks

    if "visible_begin" not in batch:
        return {}
    config, begins = model.config.get_text_config(), batch["visible_begin"][0].cpu().numpy()
    return {window: begins for window in windows if layer_sees_image_blocks(config, window)}


def _n_pass_batch(
    pass_: Pass, vision: Vision | None, device: torch.device
) -> dict[str, torch.Tensor]:
    text = {name: torch.tensor([values], device=device) for name, values in labelled(pass_).items()}
    return text | ordinary_inputs(pass_.token_ids, pass_.images, vision, device)


def _seconds(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> float:
    def step() -> None:
        model(**batch, use_cache=False, fused_lm_head=True).loss.backward()

    model.zero_grad(set_to_none=True)
    return seconds_of(step, model.device)
