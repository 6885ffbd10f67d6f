"""Every option of TRL's trainer keeps its meaning; what can't be honoured is an error."""

import math
import subprocess
import sys
from itertools import chain

import pytest
import torch
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM, BertConfig, Qwen3Config, TrainerCallback
from trl import SFTConfig

from onepass_trl import OnePassSFTConfig
from onepass_trl.versions import checkpointing_option
from tests.conversations import as_record, forked_rollouts
from tests.models import make_model
from tests.n_pass import n_pass_loss
from tests.training.conversations import CONVERSATIONS, RECORDS, history


def test_what_n_pass_would_have_computed_is_logged(train):
    trainer = train(max_steps=3)
    trainer.train()
    passes = [pass_ for conversation in CONVERSATIONS for pass_ in conversation]
    rows = [len(row["input_ids"]) for row in trainer.train_dataset]
    assert history(trainer, "row_tokens")[-1] == sum(rows)
    assert history(trainer, "num_tokens")[-1] == sum(rows)
    assert history(trainer, "npass_tokens")[-1] == sum(map(len, passes))
    assert history(trainer, "npass_ratio")[-1] == pytest.approx(sum(map(len, passes)) / sum(rows))
    assert history(trainer, "trained_tokens")[-1] == sum(pass_.num_trained for pass_ in passes)
    assert history(trainer, "turns")[-1] == len(passes)
    assert len(history(trainer, "mean_token_accuracy")) == len(history(trainer, "entropy")) == 3


# Each step trains all conversations, so that their order doesn't matter.
ALL_IN_A_STEP = dict(per_device_train_batch_size=2, gradient_accumulation_steps=3)


@pytest.fixture(scope="module")
def plain_losses() -> list[float]:
    """The losses of `ALL_IN_A_STEP` without options, once a test has trained it."""
    return []


@pytest.mark.parametrize(
    "options",
    [
        dict(packing=True, max_length=300),
        dict(packing=True, max_length=300, eval_packing=False),
        dict(per_device_train_batch_size=6, gradient_accumulation_steps=1),
        dict(bf16=True),
        dict(assistant_only_loss=True),
        dict(shuffle_dataset=True),
        dict(dataset_num_proc=2),
        dict(neftune_noise_alpha=5.0),
        dict(train_sampling_strategy="group_by_length"),
        {f"{checkpointing_option()}_kwargs": {"use_reentrant": True}},
    ],
    ids=lambda options: "-".join(options),
)
def test_options_train(train, plain_losses, options):
    plain = train(**ALL_IN_A_STEP)
    trainer = train(**{**ALL_IN_A_STEP, **options})
    rows, plain_rows = (
        [row["input_ids"].tolist() for row in each.train_dataset] for each in (trainer, plain)
    )
    assert sorted(chain(*rows)) == sorted(chain(*plain_rows))
    assert (rows != plain_rows) == (not {"shuffle_dataset", "packing"}.isdisjoint(options))
    if not plain_losses:
        plain.train()
        plain_losses += history(plain, "loss")
    trainer.train()
    losses = history(trainer, "loss")
    assert len(losses) == 2
    if "neftune_noise_alpha" in options:  # noise, but not in place of the embeddings
        assert losses != pytest.approx(plain_losses, rel=1e-4)
        assert losses == pytest.approx(plain_losses, rel=0.1)
    else:
        assert losses == pytest.approx(plain_losses, rel=1e-3 if "bf16" in options else 1e-5)


@pytest.mark.parametrize("options", [dict(packing=True, max_length=300), dict(padding_free=True)])
def test_no_attention_is_recommended(train, options, caplog):
    train(**options)
    assert "Flash Attention" not in caplog.text


def test_dft_trains(train):
    trainer = train(loss_type="dft", **ALL_IN_A_STEP)
    trainer.train()
    passes = [pass_ for conversation in CONVERSATIONS for pass_ in conversation]
    expected = n_pass_loss(make_model("qwen3"), passes, dft=True).item()
    assert history(trainer, "loss")[0] == pytest.approx(expected, rel=1e-5)


def test_the_options_of_the_caller_stay_as_they_are(train, tmp_path):
    model_id = tmp_path / "model"
    make_model("qwen3").save_pretrained(model_id)
    args = OnePassSFTConfig(
        str(tmp_path / "run"),
        assistant_only_loss=True,
        model_init_kwargs={"dtype": "float32"},
        bf16=False,
        use_cpu=True,
        report_to="none",
    )
    before = args.to_dict()
    train(model=str(model_id), args=args)
    assert args.to_dict() == before


def test_the_loss_falls(train):
    trainer = train(max_steps=25, per_device_train_batch_size=6, lr_scheduler_type="constant")
    trainer.train()
    losses = history(trainer, "loss")
    assert losses[-1] < 0.6 * losses[0]


def test_lora_trains_the_adapter_only(train):
    from peft import LoraConfig

    trainer = train(trainer_kwargs={"peft_config": LoraConfig(r=4, task_type="CAUSAL_LM")})
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    changed = {
        name for name, p in trainer.model.named_parameters() if not torch.equal(p, before[name])
    }
    assert changed
    assert all("lora_" in name for name in changed)


def test_evaluation_on_one_and_several_sets(train):
    dataset = Dataset.from_list(RECORDS[:3])
    one = train(eval_dataset=dataset, eval_strategy="steps", eval_steps=1)
    one.train()
    assert len(history(one, "eval_loss")) == 2
    assert history(one, "eval_turns") == [9, 9]

    several = train(eval_dataset={"a": dataset, "b": Dataset.from_list(RECORDS[3:])})
    metrics = several.evaluate()
    assert {"eval_a_loss", "eval_b_loss"} <= metrics.keys()
    assert several.evaluate(Dataset.from_list(RECORDS[3:]))["eval_loss"] == pytest.approx(
        metrics["eval_b_loss"]
    )


@pytest.mark.parametrize("loss_type", ["nll", "dft"])
def test_the_loss_of_an_evaluation_is_per_target(train, loss_type):
    """transformers' mean of the batches' means depends on how the rows are batched."""

    def evaluate(**options):
        trainer = train(make_model("qwen3"), loss_type=loss_type, **options)
        return trainer.evaluate(Dataset.from_list(RECORDS))

    losses = [
        evaluate(per_device_eval_batch_size=1),
        evaluate(per_device_eval_batch_size=4),
        evaluate(per_device_eval_batch_size=4, padding_free=True),
        evaluate(per_device_eval_batch_size=2, packing=True, max_length=300),
    ]
    expected = losses[0]["eval_loss"]
    if loss_type == "nll":
        model = make_model("qwen3").eval()
        passes = [pass_ for conversation in CONVERSATIONS for pass_ in conversation]
        assert expected == pytest.approx(n_pass_loss(model, passes).item(), rel=1e-6)
    assert [metrics["eval_loss"] for metrics in losses] == pytest.approx([expected] * 4, rel=1e-6)
    totals = ("eval_row_tokens", "eval_trained_tokens", "eval_turns", "eval_npass_tokens")
    assert len({tuple(metrics[name] for name in totals) for metrics in losses}) == 1


def test_streaming(train):
    def generate():
        yield from RECORDS

    stream = IterableDataset.from_generator(generate)
    trainer = train(dataset=stream, packing=True, max_length=300)
    rows = [row["input_ids"].tolist() for row in trainer.train_dataset]
    whole = train(packing=True, max_length=300).train_dataset
    assert rows == [row["input_ids"].tolist() for row in whole]
    trainer.train()
    assert len(history(trainer, "loss")) == 2


def test_resuming_continues_as_if_never_stopped(train, tmp_path):
    whole = train(max_steps=4, save_strategy="no")
    whole.train()

    first = train(max_steps=4, save_steps=2)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2
            return control

    first.add_callback(Stop())
    first.train()
    resumed = train(max_steps=4)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for (name, expected), actual in zip(
        whole.model.named_parameters(), resumed.model.parameters(), strict=True
    ):
        torch.testing.assert_close(actual, expected, msg=name)


def test_a_checkpoint_loads_in_plain_transformers(train, tmp_path):
    trainer = train()
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    ids = torch.arange(3, 20)[None]
    trainer.model.eval()
    expected = trainer.model(input_ids=ids).logits
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert "onepass" not in (tmp_path / "model" / "config.json").read_text()
    torch.testing.assert_close(loaded(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    code = (
        "import sys; from transformers import AutoModelForCausalLM as A; "
        f"A.from_pretrained({str(tmp_path / 'model')!r}); assert not any(m.startswith('onepass') "
        "for m in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_model_card_names_the_method(train, tmp_path):
    trainer = train(max_steps=1, save_steps=1)
    trainer.train()
    card = (
        (tmp_path / "checkpoint-1" / "README.md").read_text()
        if (tmp_path / "checkpoint-1" / "README.md").exists()
        else (tmp_path / "README.md").read_text()
    )
    assert "2504.18246" in card
    assert "onepass-trl" in card


def test_configs_of_trl_are_converted(train, tmp_path):
    args = SFTConfig(
        str(tmp_path),
        max_length=77,
        eos_token="<|im_end|>",
        learning_rate=3e-4,
        bf16=False,
        use_cpu=True,
        report_to="none",
    )
    trainer = train(args=args)
    assert isinstance(trainer.args, OnePassSFTConfig)
    assert (trainer.args.max_length, trainer.args.learning_rate) == (77, 3e-4)
    assert trainer.args.eos_token == "<|im_end|>"


def test_defaults_work_without_an_accelerator(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    for options in ({}, {"use_cpu": True}):
        assert OnePassSFTConfig(str(tmp_path), **options).bf16 is False
    assert OnePassSFTConfig(str(tmp_path), use_cpu=True, bf16=True).bf16 is True


@pytest.mark.parametrize("wrong", ["enable_thinking", ["enable_thinking"]])
def test_template_arguments_that_are_none(tmp_path, wrong):
    with pytest.raises(ValueError, match=r"must be a dict, or JSON text of one such as"):
        OnePassSFTConfig(str(tmp_path), use_cpu=True, bf16=False, chat_template_kwargs=wrong)


def test_a_model_id_is_loaded_with_one_pass_attention(train, tmp_path, caplog):
    make_model("llama").save_pretrained(tmp_path / "llama")
    trainer = train(
        model=str(tmp_path / "llama"),
        model_init_kwargs={"attn_implementation": "flash_attention_2"},
    )
    assert trainer.model.config._attn_implementation == "onepass"
    assert "training with 'onepass' instead" in caplog.text
    trainer.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(packing=True, max_length=64, packing_strategy="wrapped"), 'packing_strategy="bfd"'),
        (dict(packing=True, max_length=64, packing_strategy="bfd_split"), 'packing_strategy="bfd"'),
        (dict(packing=True), "set max_length"),
        (dict(label_smoothing_factor=0.1), "label_smoothing_factor=0"),
        (dict(activation_offloading=True), "needs an accelerator"),
        (dict(null_arguments="maybe"), "null_arguments must be one of"),
        (dict(attention_impl="flex"), "can't train on a CPU"),
        (dict(attention_impl="flex_flash"), "can't train on a CPU"),
        (dict(attention_impl="varlen"), "can't train on a CPU"),
        (dict(fp16=True), "fp16=True needs an accelerator"),
        (dict(attention_impl="foo"), "attention_impl must be one of auto, cuda"),
        (dict(max_length=1), "max_length must be at least 2"),
        (dict(max_length=-3), "max_length must be at least 2"),
        (dict(max_steps=-5), "max_steps must be at least -1, got -5"),
        (dict(max_steps=-1, num_train_epochs=-1), "num_train_epochs must be at least 0, got -1"),
        (dict(max_grad_norm=-1.0), "max_grad_norm must be at least 0, got -1"),
        (dict(max_grad_norm=math.nan), "max_grad_norm must be at least 0, got nan"),
        (dict(gradient_accumulation_steps=-4), "gradient_accumulation_steps must be at least 1"),
        (dict(pad_to_multiple_of=-8), "pad_to_multiple_of must be at least 1, got -8"),
        (dict(router_aux_loss_coef=-0.1), "router_aux_loss_coef must be at least 0"),
        (dict(overflow="cut"), "overflow must be one of"),
        (dict(train_on="first"), "train_on must be"),
        (dict(train_on="[0, 0.5]"), "train_on must be"),
        (dict(parallelism_config=ParallelismConfig(sp_size=2)), "use FSDP2 with cp_size 2"),
    ],
)
def test_options_that_cannot_be_honoured_are_errors(train, options, message):
    with pytest.raises(ValueError, match=message):
        train(**options)


def test_options_of_another_kind_are_errors(train):
    with pytest.raises(TypeError, match=r"such as OnePassSFTConfig\(output_dir\), got dict"):
        train(args={"output_dir": "out"})


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("BertForMaskedLM", BertConfig(vocab_size=8, hidden_size=8, num_attention_heads=2)),
        ("Qwen3ForSequenceClassification", Qwen3Config(vocab_size=8, hidden_size=8)),
    ],
)
def test_models_that_generate_no_text_are_refused(train, kind, config, tmp_path):
    config.architectures = [kind]
    config.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=f"is a {kind}, which doesn't generate text"):
        train(model=str(tmp_path / "model"))


def test_parallelism_of_the_launcher_is_refused_before_anything_is_made(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_SP_SIZE", "2")
    with pytest.raises(ValueError, match="use FSDP2 with cp_size 2"):
        OnePassSFTConfig(str(tmp_path))


def test_parallelism_of_a_configured_accelerator_is_refused(train, monkeypatch):
    Accelerator(cpu=True)
    # What it would need two processes for.
    monkeypatch.setattr(ParallelismConfig, "get_device_mesh", lambda *_: None)
    monkeypatch.setattr(ParallelismConfig, "_validate_accelerator", lambda *_: None)
    of_all = AcceleratorState._shared_state
    monkeypatch.setitem(of_all, "parallelism_config", ParallelismConfig(sp_size=2))
    with pytest.raises(ValueError, match="use FSDP2 with cp_size 2"):
        train(accelerator_config={"use_configured_state": True})


@pytest.mark.parametrize(
    "argument", ["compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics"]
)
def test_functions_of_logits_are_errors(train, argument):
    with pytest.raises(ValueError, match=f"can't honour {argument}"):
        train(trainer_kwargs={argument: print})


def test_other_collators_and_prompt_learning_are_errors(train):
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

    with pytest.raises(ValueError, match="data_collator must be an OnePassCollator, got dict"):
        train(trainer_kwargs={"data_collator": {}})
    with pytest.raises(ValueError, match="virtual tokens"):
        train(
            trainer_kwargs={
                "peft_config": PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
            }
        )
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="PromptTuningConfig puts virtual tokens"):
        train(model=get_peft_model(make_model("qwen3"), config))


def test_a_loss_that_is_not_finite_stops_the_run(train):
    model = make_model("qwen3")
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"loss is \[nan\].*at step 0"):
        train(model=model).train()


@pytest.mark.parametrize("save", [dict(save_strategy="no"), dict(save_steps=1)], ids=str)
def test_weights_that_a_nan_gradient_has_reached_are_not_saved(train, tmp_path, save):
    model = make_model("qwen3")
    model.model.norm.weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(FloatingPointError, match="the weights aren't finite after step 1, since a"):
        train(model=model, max_steps=1, **save).train()
    assert not list(tmp_path.rglob("*.safetensors"))


def test_outputs_of_the_loss_are_errors(train):
    trainer = train()
    batch = next(iter(trainer.get_train_dataloader()))
    with pytest.raises(ValueError, match="computes no logits"):
        trainer.compute_loss(trainer.model, batch, return_outputs=True)


def test_prediction_is_evaluation_without_predictions(train):
    trainer = train()
    output = trainer.predict(Dataset.from_list(RECORDS[:3]))
    assert output.predictions is None
    expected = trainer.evaluate(Dataset.from_list(RECORDS[:3]))
    assert output.metrics["test_loss"] == expected["eval_loss"]
    assert (
        trainer.predict(trainer.train_dataset.select(range(3))).metrics["test_loss"]
        == (expected["eval_loss"])
    )


def test_a_formatting_function_makes_what_is_predicted_too(train):
    records = Dataset.from_list([{"sum": "1 + 2", "is": "3"}, {"sum": "2 + 5", "is": "7"}])
    trainer = train(
        dataset=records,
        trainer_kwargs={"formatting_func": lambda record: f"{record['sum']} = {record['is']}"},
    )
    loss = trainer.evaluate(records)["eval_loss"]
    assert trainer.predict(records).metrics["test_loss"] == loss


def test_weights_and_fork_copies_reach_the_loss(train):
    trainer = train(
        dataset=Dataset.from_list([as_record(forked_rollouts(3))]), per_device_train_batch_size=1
    )
    row = trainer.train_dataset[0]
    assert row["weights"].max() == 2
    assert (row["multiplicity"] == 0).sum() == 2
    trainer.train()
    assert history(trainer, "trained_tokens")[0] == 28


def test_a_model_that_drops_visible_end_is_an_error(train):
    from transformers import NemotronConfig, NemotronForCausalLM

    config = NemotronConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    with pytest.raises(ValueError, match="got no visible_end"):
        train(model=NemotronForCausalLM(config)).train()


def test_rotary_embeddings_that_depend_on_the_row_are_errors(train):
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    model = make_model("llama", max_position_embeddings=32, rope_parameters=rope)
    with pytest.raises(ValueError, match="Set max_length to at most 32"):
        train(model=model)
    train(model=model, max_length=32)
