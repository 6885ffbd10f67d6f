"""Masks that training never builds, and generation slices."""

import pytest
import torch

from onepass_trl.attention import deferred_mask
from onepass_trl.attention.transformers_backend import use_onepass_attention

from ..models import make_model
from .test_transformers_backend import SEQ, causal, deferred, random_ids


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cache_implementation": "static", "disable_compile": True},
        {"prompt_lookup_num_tokens": 3},
    ],
    ids=["dynamic", "static", "assisted"],
)
def test_layers_that_share_keys_generate_what_they_generated(options):
    """They compute the last tokens of a prompt only, by a slice of its mask, whose first rows these
    are not."""
    model, ids = make_model("gemma4", sliding_window=4 * SEQ), random_ids(batch=1)
    ids[:, SEQ // 2 :] = ids[:, : SEQ // 2]  # something to look up

    def generate():
        generated = model.generate(
            ids,
            max_new_tokens=8,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
        return torch.stack(generated.logits)

    model.set_attn_implementation("sdpa")
    expected = generate()
    use_onepass_attention(model)
    torch.testing.assert_close(generate(), expected, rtol=1e-5, atol=1e-6)


def test_a_mask_is_sliced_by_queries_only():
    mask = deferred()
    everything = slice(None)
    assert mask[:, :, 0:, :] is mask
    assert mask[:, :, -1:, :] is None
    sliced = mask[:, :, -2:, :]
    assert sliced.tolist() == [[[[True, True, True, False], [True] * 4]]]
    for index in (0, (everything, everything, everything), (..., 0, everything)):
        with pytest.raises(TypeError, match="compute with the mask themselves can't be trained"):
            mask[index]
    with pytest.raises(TypeError, match="compute with the mask themselves can't be trained"):
        mask[:, :, :, :2]


@pytest.mark.parametrize("name", ["gemma3", "gemma4"])
def test_training_builds_no_dense_mask(name, monkeypatch):
    def fail(**_):
        raise AssertionError("a (seq, seq) mask was built")

    model, ids = make_model(name), random_ids()
    use_onepass_attention(model)
    monkeypatch.setattr(deferred_mask, "sdpa_mask", fail)
    model(ids, **causal(ids))
    with pytest.raises(AssertionError, match="mask was built"):
        model(ids)
