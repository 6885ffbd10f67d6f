"""The oracle against its definition: every path of the tree alone, under plain causal
attention.
"""

import numpy as np
import torch
import torch.nn.functional as F

from onepass_trl.attention.reference import dense_tree_attention, visibility_mask
from onepass_trl.visibility import dense_mask

from .cases import Shape, make_case


def test_mask_is_the_rule_of_the_definition():
    case = make_case(Shape(batch=3, seq=50), seed=1, blocks=True)
    positions, begins = case.options["positions"], case.options["visible_begin"]
    for window in (None, 7):
        for given in (None, begins):
            expected = [
                dense_mask(
                    case.visible_end[row].numpy(),
                    positions[row].numpy(),
                    window,
                    None if given is None else given[row].numpy(),
                )
                for row in range(3)
            ]
            actual = visibility_mask(case.visible_end, positions, window, given)
            assert torch.equal(actual, torch.from_numpy(np.stack(expected)))


def test_every_path_equals_its_own_causal_sequence():
    case = make_case(Shape(heads=4, kv_heads=2, seq=60), seed=2)
    q, k, v = (case.inputs[name] for name in "qkv")
    out, lse = dense_tree_attention(q, k, v, case.visible_end, scale=0.3)
    seen = visibility_mask(case.visible_end)[0]
    for query in range(60):
        path = seen[query].nonzero().flatten()
        alone = F.scaled_dot_product_attention(
            q[:, :, path], k[:, :, path], v[:, :, path], is_causal=True, scale=0.3, enable_gqa=True
        )
        torch.testing.assert_close(out[:, :, query], alone[:, :, -1], rtol=1e-12, atol=1e-12)
    assert lse.shape == (1, 4, 60)


def test_a_sink_takes_probability_and_gives_no_value():
    case = make_case(Shape(heads=2, kv_heads=2, seq=20), seed=3)
    q, k, v = (case.inputs[name] for name in "qkv")
    plain, lse = dense_tree_attention(q, k, v, case.visible_end, scale=0.3)
    sinks = torch.tensor([0.5, -1.0], dtype=torch.float64)
    out, _ = dense_tree_attention(q, k, v, case.visible_end, scale=0.3, sinks=sinks)
    remaining = lse.exp() / (lse.exp() + sinks.exp()[None, :, None])
    torch.testing.assert_close(out, plain * remaining[..., None])
