"""One pass against N separate passes on the same conversation: tokens, loss, gradients, time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.nn import functional

from onepass_trl.data import build_tree, linearize
from onepass_trl.passes import Pass
from onepass_trl.tools.bench.timing import seconds_of
from onepass_trl.vision import Vision, ordinary_inputs, vision_of
from onepass_trl.wording import counted

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from onepass_trl.chat.processing import ProcessingClass

# A gradient below this share of the whole gradient's norm is measured against that share: it is a
# sum of larger terms that cancel (in the extreme, the gradient of a key bias without rotary
# embedding is zero), so its rounding error scales with them and not with itself. A tolerance of
# 1e-4 then allows an error of 1e-6 of the whole gradient, eight roundings in float32.
_GRADIENT_FLOOR = 1e-2


@dataclass(frozen=True)
class Comparison:
    """One pass against N separate passes.

    Attributes:
        num_turns: how many passes N-pass needs.
        num_trained: trained tokens, the same in both.
        n_pass_tokens: tokens that N-pass computes.
        one_pass_tokens: tokens that one pass computes.
        n_pass_loss: mean negative log-likelihood of the trained tokens.
        one_pass_loss: the same from one pass.
        gradient_difference: largest ``norm(one_pass - n_pass) / norm(n_pass)`` of a parameter's
            gradients.
        worst_parameter: the name of that parameter.
        n_pass_seconds: time of forward and backward.
        one_pass_seconds: the same. On a CPU TRL's fused LM head also scores tokens without a
            target, and each twice.
    """

    num_turns: int
    num_trained: int
    n_pass_tokens: int
    one_pass_tokens: int
    n_pass_loss: float
    one_pass_loss: float
    gradient_difference: float
    worst_parameter: str
    n_pass_seconds: float
    one_pass_seconds: float

    @property
    def loss_difference(self) -> float:
        """The difference of the losses, relative to N-pass."""
        return abs(self.one_pass_loss - self.n_pass_loss) / abs(self.n_pass_loss)

    @property
    def token_ratio(self) -> float:
        """Tokens of N-pass over those of one pass."""
        return self.n_pass_tokens / self.one_pass_tokens

    @property
    def speedup(self) -> float:
        """Seconds of N-pass over those of one pass."""
        return self.n_pass_seconds / self.one_pass_seconds

    def agrees(self, loss_tolerance: float, gradient_tolerance: float) -> bool:
        """Return whether both differences are within tolerance; a NaN never is."""
        return (
            self.loss_difference <= loss_tolerance
            and self.gradient_difference <= gradient_tolerance
        )


def compare(
    model: PreTrainedModel,
    passes: Sequence[Pass],
    processing_class: ProcessingClass | None = None,
) -> Comparison:
    """Return how the loss and gradients of one pass differ from those of N separate passes.

    N-pass is one ordinary causal forward and backward for each pass, with the model's own logits
    and SDPA, or eager attention if the model has no SDPA or softcaps its scores (which SDPA can't).
    One pass is the row of the prefix tree, as `OnePassSFTTrainer` computes it: with TRL's fused LM
    head, in float32 at most. The model is compared in evaluation mode, so without dropout.
    Afterwards its state is as before, without gradients.

    Args:
        passes: of one conversation, see `onepass_trl.render_passes`.
        processing_class: the model's processor, for passes with images.

    Raises:
        ValueError: if no token of `passes` or no parameter is trained, the model has no embedding
            for a token, or it cannot be trained in one pass.
    """
    from onepass_trl.attention.image_models import collator_options, why_no_images
    from onepass_trl.attention.model_check import check_token_ids, reference_attention
    from onepass_trl.attention.transformers_backend import set_attention, use_onepass_attention
    from onepass_trl.data.collator import OnePassCollator, model_inputs
    from onepass_trl.training import loss

    num_trained = sum(pass_.num_trained for pass_ in passes)
    if num_trained == 0:
        raise ValueError(
            f"nothing to compare: no token is trained in {counted(len(passes), 'pass', 'passes')}"
        )
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError("nothing to compare: no parameter of the model requires a gradient")
    check_token_ids("the conversation", max(int(p.token_ids.max()) for p in passes), model)
    loss.check_head(model)
    row = linearize(build_tree(passes))
    vision = None if processing_class is None else vision_of(processing_class)
    if row.images and (reason := why_no_images(model.config)):
        raise ValueError(reason)

    def n_pass() -> float:
        return sum(_backward_pass(model, pass_, num_trained, vision) for pass_ in passes)

    collator = OnePassCollator(vision=vision, **collator_options(model.config))
    batch = {name: x.to(model.device) for name, x in collator([row]).items()}

    def one_pass() -> float:
        outputs = loss.forward(model, model_inputs(batch))
        weights = batch["weights"].to(outputs.log_probs.device)
        mean = loss.target_losses(outputs.log_probs, weights).sum() / num_trained
        mean.backward()
        return mean.item()

    implementation, training = model.config._attn_implementation, model.training
    model.eval()
    try:
        set_attention(model, reference_attention(model))
        n_pass_loss, n_pass_gradients, n_pass_seconds = _measure(model, n_pass)
        use_onepass_attention(model)
        with loss.fused_lm_head(model):
            one_pass_loss, one_pass_gradients, one_pass_seconds = _measure(model, one_pass)
    finally:
        set_attention(model, implementation)
        model.train(training)
    difference, worst = _gradient_difference(n_pass_gradients, one_pass_gradients)
    return Comparison(
        num_turns=len(passes),
        num_trained=num_trained,
        n_pass_tokens=sum(map(len, passes)),
        one_pass_tokens=len(row),
        n_pass_loss=n_pass_loss,
        one_pass_loss=one_pass_loss,
        gradient_difference=difference,
        worst_parameter=worst,
        n_pass_seconds=n_pass_seconds,
        one_pass_seconds=one_pass_seconds,
    )


def _measure(
    model: PreTrainedModel, run: Callable[[], float]
) -> tuple[float, dict[str, torch.Tensor], float]:
    """Return what `run` returns, the gradients it left in the model, and its seconds."""
    model.zero_grad(set_to_none=True)
    losses: list[float] = []
    seconds = seconds_of(lambda: losses.append(run()), model.device)
    gradients = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    model.zero_grad(set_to_none=True)
    return losses[0], gradients, seconds


def _backward_pass(
    model: PreTrainedModel, pass_: Pass, num_trained: int, vision: Vision | None
) -> float:
    """Backpropagate a pass's share of the mean loss, from the model's own logits, and return it."""
    targets = np.flatnonzero(pass_.trained)
    if targets.size == 0:
        return 0.0
    logits = model(
        input_ids=_tensor(pass_.token_ids, model)[None].long(),
        use_cache=False,
        logits_to_keep=_tensor(targets - 1, model),
        **ordinary_inputs(pass_.token_ids, pass_.images, vision, model.device),
    ).logits[0]
    if len(logits) != len(targets):  # some multimodal models don't know logits_to_keep
        logits = logits[targets - 1]
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    expected = _tensor(pass_.token_ids[targets], model).long()
    loss = functional.cross_entropy(logits, expected, reduction="sum") / num_trained
    loss.backward()
    return loss.item()


def _gradient_difference(
    expected: dict[str, torch.Tensor], actual: dict[str, torch.Tensor]
) -> tuple[float, str]:
    """Return the largest relative difference of a parameter's gradients, and its name."""
    if expected.keys() != actual.keys():
        odd = sorted(expected.keys() ^ actual.keys())
        return float("inf"), f"{odd[0]} (has a gradient in only one of the two)"
    norms = {name: _norm(gradient) for name, gradient in expected.items()}
    floor = _GRADIENT_FLOOR * sum(norm**2 for norm in norms.values()) ** 0.5
    differences = {
        name: _norm(actual[name] - expected[name]) / max(norm, floor)
        for name, norm in norms.items()
    }
    # NaN sorts as the largest.
    worst = max(differences, key=lambda name: (np.isnan(differences[name]), differences[name]))
    return differences[worst], worst


def _norm(gradient: torch.Tensor) -> float:
    return torch.linalg.vector_norm(gradient, dtype=torch.float64).item()


def _tensor(array: np.ndarray, model: PreTrainedModel) -> torch.Tensor:
    return torch.from_numpy(array).to(model.device)
