import pytest
import torch

from onepass_trl.tools.bench import step
from onepass_trl.tools.bench.report import step_table
from onepass_trl.tools.bench.step import N_PASS, measure_step
from onepass_trl.tools.bench.workload import (
    attention_shape,
    chat_passes,
    num_parameters,
    random_model,
    small_config,
    trim_layers,
)
from tests.models import make_model

TINY = small_config(num_layers=2, hidden_size=32, heads=4, kv_heads=2, head_dim=8, vocab_size=100)


def measure(**options):
    conversations = [chat_passes(turns, 4, 9, 5, 100) for turns in (3, 2)]
    given = dict(repeats=2, use_cpu=True)
    return measure_step(
        conversations, lambda: random_model(TINY, torch.float32), **{**given, **options}
    )


def test_both_ways_have_the_same_losses_and_their_own_tokens():
    result = measure()
    assert result["largest_loss_difference"] < 1e-5
    assert result["n_pass_loss"] == pytest.approx(result["one_pass_loss"], rel=1e-6)
    assert (result["conversations"], result["turns"], result["repeats"]) == (2, 5, 2)
    assert result["n_pass_tokens"] == (18 + 27 + 36) + (18 + 27)
    assert result["one_pass_tokens"] == (3 * (4 + 14) + 2 * 5) + (2 * (4 + 14) + 5)
    assert result["note"] is None
    for way in ("n_pass", "one_pass"):
        assert 0 < result[f"{way}_min_seconds"] <= result[f"{way}_median_seconds"]
    table = step_table(result)
    assert "Training step on 2 conversations" in table
    assert "The losses of a step differ by at most" in table


def test_one_repeat_is_timed_whatever_the_budget():
    assert measure(budget_s=0.0)["repeats"] == 1


def test_a_way_that_runs_out_of_memory_says_so(monkeypatch):
    time_step = step._time_step

    def fails(way):
        if way.trainer.train_dataset.num_rows == 5:
            raise torch.OutOfMemoryError("out of memory\nTried to allocate")
        return time_step(way)

    monkeypatch.setattr(step, "_time_step", fails)
    result = measure()
    assert result["note"] == f"{N_PASS}: OutOfMemoryError: out of memory"
    assert result["n_pass_min_seconds"] is result["speedup"] is None
    assert result["one_pass_min_seconds"] > 0
    assert "not measured: N-pass" in step_table(result)


def test_parameters_are_counted_without_a_model():
    assert num_parameters(TINY) == random_model(TINY, torch.float32).num_parameters()


@pytest.mark.parametrize(
    ("name", "shape"),
    [("qwen3", (4, 2, 16, 16)), ("llama", (4, 2, 8, 8)), ("deepseek_v3", (4, 4, 24, 12))],
)
def test_the_shape_of_a_model_is_read_from_its_configuration(name, shape):
    assert attention_shape(make_model(name).config) == shape


def test_layers_are_trimmed():
    config = make_model("gemma3").config
    trim_layers(config, 1)
    assert config.num_hidden_layers == len(config.layer_types) == 1
    with pytest.raises(ValueError, match="num_layers is 2, expected 1 to 1"):
        trim_layers(config, 2)
