"""The check before the first step, on rows with images: faults of images are found."""

import logging

import numpy as np
import pytest
import torch

from onepass_trl import OnePassCollator, build_tree, linearize, render_passes
from onepass_trl.attention.image_models import has_position_planes, sees_image_blocks
from onepass_trl.training.first_check import choose_row
from onepass_trl.vision import Vision
from tests.images import answer, make_image, make_image_model, make_processor, part, text
from tests.training.test_images import as_record, families, make_trainer

USUAL = ("gemma3", "gemma4", "internvl", "qwen3_5", "qwen3_vl")
# Two images of the same size, so that their features could change places.
ONE, OTHER = make_image(40, 40, 4), make_image(40, 40, 5)
CHAT = [
    {"role": "user", "content": [part(ONE), text(" or "), part(OTHER), text("?")]},
    answer("That."),
    {"role": "user", "content": "Sure?"},
    answer("Yes."),
]


def make_model(name):
    """A model whose weights are large enough for attention to prefer some tokens to others."""
    model = make_image_model(name)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 3 if parameter.ndim > 1 else 1
    return model


class Reversing(Vision):
    """Gives a model the features of images in the wrong order."""

    def inputs(self, sources):
        return super().inputs(sources[::-1])


def without_blocks(monkeypatch, _):
    monkeypatch.setattr(
        "onepass_trl.data.collator.image_blocks",
        lambda row, _: np.arange(len(row), dtype=np.int32),
    )


def in_other_order(monkeypatch, processor):
    monkeypatch.setattr(
        "onepass_trl.training.trainer.OnePassCollator",
        lambda vision, **options: OnePassCollator(vision=Reversing(processor), **options),
    )


def at_positions_of_text(monkeypatch, _):
    monkeypatch.setattr(
        "onepass_trl.data.collator.position_planes",
        lambda row, *_: np.tile(row.position_ids.astype(np.int64), (4, 1)),
    )


FAULTS = {
    without_blocks: sees_image_blocks,
    in_other_order: lambda _: True,
    at_positions_of_text: has_position_planes,
}
"""Each with whether a model of a configuration can have it."""


@pytest.mark.parametrize("name", families(*USUAL))
def test_faults_of_images_are_found_before_the_first_step(name, tmp_path, monkeypatch):
    model, processor = make_model(name), make_processor(name)
    before = {path: parameter.clone() for path, parameter in model.named_parameters()}
    for fault in [fault for fault, is_possible in FAULTS.items() if is_possible(model.config)]:
        with monkeypatch.context() as planted:
            fault(planted, processor)
            trainer = make_trainer(model, processor, [as_record(CHAT)], tmp_path)
            with pytest.raises(ValueError, match="does not compute in one pass what it computes"):
                trainer.train()
    assert all(torch.equal(p, before[path]) for path, p in model.named_parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", families(*USUAL))
def test_sound_models_pass(name, dtype, tmp_path, caplog):
    model, processor = make_model(name).to(dtype), make_processor(name)
    options = dict(max_steps=1, save_strategy="no", bf16=dtype == torch.bfloat16)
    trainer = make_trainer(model, processor, [as_record(CHAT)], tmp_path, **options)
    with caplog.at_level(logging.INFO, "onepass_trl.training.first_check"):
        trainer.train()
    assert "One pass gives the log-probabilities of 2 passes" in caplog.text


def test_a_row_whose_images_could_be_confused_is_chosen():
    processor = make_processor("qwen3_vl")
    same = [{"role": "user", "content": [part(ONE), text(" or else?")]}, *CHAT[1:]]
    none, one, both = (
        linearize(build_tree(render_passes(chat, processor)))
        for chat in ([*CHAT[2:], *CHAT[2:]], same, CHAT)
    )
    assert len(none) < len(one) < len(both)
    assert choose_row([none, one, both]).input_ids.tolist() == both.input_ids.tolist()
    assert choose_row([none, one]).input_ids.tolist() == one.input_ids.tolist()
    # A single pass has no branch, whatever images it has.
    single = linearize(build_tree(render_passes(CHAT, processor)[-1:]))
    assert len({span.source for span in single.images}) == 2
    assert choose_row([single, one]).input_ids.tolist() == one.input_ids.tolist()
