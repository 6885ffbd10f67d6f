"""Every option of TRL's trainer keeps its meaning; what can't be honoured is an error."""

import json
import logging
import subprocess
import sys
from itertools import chain

import pytest
import torch
from accelerate import Accelerator
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import AcceleratorState
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig

from onepass_trl import OnePassSFTConfig, OnePassSFTTrainer
from onepass_trl.chat import ChatFormatError
from onepass_trl.training.preparation import ROW_COLUMNS
from tests.conversations import as_row, forked_rollouts, random_chat
from tests.models import make_model
from tests.training.test_exactness import n_pass_loss

CONVERSATIONS = [random_chat(3, seed=seed) for seed in range(6)]
ROWS = [as_row(passes) for passes in CONVERSATIONS]


@pytest.fixture
def train(tmp_path, tiny_tokenizer):
    """Make a trainer on random conversations; keyword arguments of the config or the trainer
    override."""

    def make(
        model=None, dataset=None, eval_dataset=None, args=None, trainer_kwargs=None, **options
    ):
        settings = dict(
            output_dir=str(tmp_path),
            max_length=None,
            report_to="none",
            bf16=False,
            use_cpu=True,
            logging_steps=1,
            max_steps=2,
            learning_rate=1e-2,
            per_device_train_batch_size=2,
        )
        return OnePassSFTTrainer(
            model if model is not None else make_model("qwen3"),
            args or OnePassSFTConfig(**{**settings, **options}),
            train_dataset=Dataset.from_list(ROWS) if dataset is None else dataset,
            eval_dataset=eval_dataset,
            processing_class=tiny_tokenizer,
            **(trainer_kwargs or {}),
        )

    return make


def history(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


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
        dict(activation_checkpointing_kwargs={"use_reentrant": True}),
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
    dataset = Dataset.from_list(ROWS[:3])
    one = train(eval_dataset=dataset, eval_strategy="steps", eval_steps=1)
    one.train()
    assert len(history(one, "eval_loss")) == 2
    assert history(one, "eval_turns") == [9, 9]

    several = train(eval_dataset={"a": dataset, "b": Dataset.from_list(ROWS[3:])})
    metrics = several.evaluate()
    assert {"eval_a_loss", "eval_b_loss"} <= metrics.keys()
    assert several.evaluate(Dataset.from_list(ROWS[3:]))["eval_loss"] == pytest.approx(
        metrics["eval_b_loss"]
    )


def test_streaming(train):
    def generate():
        yield from ROWS

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


def test_nothing_is_cut_by_default(train, tiny_tokenizer):
    answer = {"role": "assistant", "content": "word " * 2000}
    row = {"messages": [{"role": "user", "content": "Talk."}, answer]}
    [prepared] = train(dataset=Dataset.from_list([row])).train_dataset
    assert (prepared["shift_labels"] >= 0).sum() > 2000


def test_template_arguments_reach_every_conversation(train):
    messages = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
    rows = [{"messages": messages}]
    lengths = []
    for kwargs in (None, '{"enable_thinking": false}', {"enable_thinking": False}):
        trainer = train(
            dataset=Dataset.from_list(rows), chat_template_kwargs=kwargs, verify_rendering=True
        )
        row = trainer.train_dataset[0]
        lengths.append(int((row["weights"] > 0).sum()))
    # With thinking off, the prompt holds the empty reasoning.
    assert lengths[0] > lengths[1] == lengths[2]


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


def test_what_overflow_loses_is_counted(train, caplog):
    longest = max(len(pass_) for conversation in CONVERSATIONS for pass_ in conversation)
    long_turns = [len(p) for c in CONVERSATIONS for p in c if len(p) > longest // 2]
    with caplog.at_level(logging.WARNING):
        train(max_length=longest // 2, overflow="drop")
    assert (
        f"train dataset: {len(long_turns)} turns are longer than max_length={longest // 2}"
        in caplog.text
    )
    assert f"{len(long_turns)} turns whole" in caplog.text
    with pytest.raises(
        ValueError, match=r"row \d of the train dataset: pass \d .* tokens, but max_length is"
    ):
        train(max_length=longest // 2, overflow="error")
    with pytest.raises(ValueError, match="no row left to train"):
        train(max_length=2, overflow="drop")


def test_a_conversation_that_overflows_whole_leaves_the_others(train):
    short = [random_chat(1, seed=9, low=1, high=3)]
    rows = [as_row(passes) for passes in [CONVERSATIONS[0], *short]]
    trainer = train(dataset=Dataset.from_list(rows), max_length=12, overflow="drop")
    assert [int(row["num_turns"]) for row in trainer.train_dataset] == [1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(packing=True, max_length=64, packing_strategy="wrapped"), 'packing_strategy="bfd"'),
        (dict(packing=True, max_length=64, packing_strategy="bfd_split"), 'packing_strategy="bfd"'),
        (dict(packing=True), "set max_length"),
        (dict(completion_only_loss=False), "use SFTTrainer"),
        (dict(label_smoothing_factor=0.1), "label_smoothing_factor=0"),
        (dict(activation_offloading=True), "needs an accelerator"),
        (dict(null_arguments="maybe"), "null_arguments must be one of"),
        (dict(attention_impl="flex"), "can't train on a CPU"),
        (dict(attention_impl="foo"), "attention_impl must be one of auto, cuda"),
        (dict(max_length=1), "max_length must be at least 2"),
        (dict(overflow="cut"), "overflow must be one of"),
        (dict(train_on="first"), "train_on must be"),
        (dict(train_on="[0, 0.5]"), "train_on must be"),
        (dict(parallelism_config=ParallelismConfig(sp_size=2)), "use FSDP2 with cp_size 2"),
    ],
)
def test_options_that_cannot_be_honoured_are_errors(train, options, message):
    with pytest.raises(ValueError, match=message):
        train(**options)


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
    "argument",
    ["compute_loss_func", "compute_metrics", "preprocess_logits_for_metrics", "formatting_func"],
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


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"text": "hello"}], "SFTTrainer"),
        ([{"prompt": "a", "completion": "b"}], "SFTTrainer"),
        ([{"question": "hello"}], "question"),
        ([{"messages": [{"role": "user", "content": "hi"}], "image": "x.png"}], "image"),
        (
            [{"messages": [{"role": "user", "content": "hi"}]}],
            "row 0 of the train dataset.*assistant",
        ),
        (
            [*ROWS, {"passes": [{"input_ids": [1, 2], "labels": [-100, 3]}]}],
            "row 6 of the train dataset",
        ),
    ],
    ids=["text", "plain_prompt", "unknown", "vision", "no_assistant", "label"],
)
def test_datasets_that_cannot_be_trained_are_errors(train, rows, message):
    with pytest.raises(ValueError, match=message):
        train(dataset=Dataset.from_list(rows))


def test_empty_datasets_are_errors(train):
    with pytest.raises(ValueError, match="train dataset is empty"):
        train(dataset=Dataset.from_dict({"messages": []}))
    with pytest.raises(ValueError, match="eval dataset is empty"):
        train(eval_dataset=Dataset.from_dict({"messages": []}))


def test_a_loss_that_is_not_finite_stops_the_run(train):
    model = make_model("qwen3")
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"loss is \[nan\].*at step 0"):
        train(model=model).train()


def test_predictions_with_logits_are_errors(train):
    trainer = train(eval_dataset=Dataset.from_list(ROWS[:1]))
    with pytest.raises(ValueError, match="computes no logits"):
        trainer.predict(trainer.eval_dataset)


def test_prepared_rows_are_taken_as_they_are(train):
    prepared = train(eval_dataset=Dataset.from_list(ROWS)).eval_dataset
    again = train(dataset=prepared).train_dataset
    assert [row["visible_end"].tolist() for row in again] == [
        row["visible_end"].tolist() for row in prepared
    ]


def test_weights_and_fork_copies_reach_the_loss(train):
    trainer = train(
        dataset=Dataset.from_list([as_row(forked_rollouts(3))]), per_device_train_batch_size=1
    )
    row = trainer.train_dataset[0]
    assert row["weights"].max() == 2
    assert (row["num_passes"] == 0).sum() == 2
    trainer.train()
    assert history(trainer, "trained_tokens")[0] == 28


def test_chats_are_rendered_with_the_tokenizer(train, tiny_tokenizer):
    messages = [
        {"role": "user", "content": "Two plus two?"},
        {"role": "assistant", "reasoning_content": "Add them.", "content": "Four."},
        {"role": "user", "content": "Plus one?"},
        {"role": "assistant", "reasoning_content": "Four and one.", "content": "Five."},
    ]
    model = make_model("qwen3", vocab_size=len(tiny_tokenizer))
    forms = [
        [{"messages": messages}],
        [{"prompt": messages[:3], "completion": messages[3:]}],
        [
            {
                "messages": messages,
                "tools": json.dumps([]),
                "chat_template_kwargs": {"enable_thinking": True},
            }
        ],
    ]
    turns = [
        int(train(model=model, dataset=Dataset.from_list(rows)).train_dataset[0]["num_turns"])
        for rows in forms
    ]
    assert turns == [2, 1, 2]
    last = train(model=model, dataset=Dataset.from_list(forms[0]), train_on="last")
    assert last.train_dataset[0]["num_turns"] == 1


def test_prepared_rows_obey_the_options(train):
    prepared = train().train_dataset
    packed = train(dataset=prepared, packing=True, max_length=300).train_dataset
    assert len(packed) < len(prepared)
    assert sum(row["num_turns"] for row in packed) == sum(row["num_turns"] for row in prepared)
    with pytest.raises(ValueError, match=r"prepared train dataset has .* max_length is 8"):
        train(dataset=prepared, max_length=8)
    stream = prepared.to_iterable_dataset()
    trainer = train(dataset=stream, max_length=300, max_steps=2)
    trainer.train()
    assert len(history(trainer, "loss")) == 2
    with pytest.raises(ValueError, match=r"prepared train dataset has .* max_length is 8"):
        train(dataset=stream, max_length=8, max_steps=2).train()


BAD_ROWS = [
    {
        "messages": [
            {"role": "user", "content": "2+2?"},
            {"role": "assistant", "content": "4<|im_end|>"},
            {"role": "user", "content": "3+3?"},
            {"role": "assistant", "content": "6"},
        ]
    },
    {"messages": [{"role": "user", "content": "Hi"}]},
    {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]},
]


@pytest.mark.parametrize("streaming", [False, True])
def test_invalid_turns_are_left_out_where_asked(train, streaming, caplog):
    dataset = Dataset.from_list(BAD_ROWS)
    if streaming:
        dataset = dataset.to_iterable_dataset()
    options = {"max_steps": 1} if streaming else {}
    with pytest.raises(ValueError, match=r"row 0 of the train dataset: assistant turn 0 .*special"):
        next(iter(train(dataset=dataset, **options).train_dataset))
    prepared = train(dataset=dataset, invalid_turns="drop", **options).train_dataset
    assert [int(row["num_turns"]) for row in prepared] == [1, 1]
    assert set(next(iter(prepared))) == set(ROW_COLUMNS)
    assert "row 0: assistant turn 0 (message 1, template family composable)" in caplog.text
    assert "row 1: none of the 1 messages is from the assistant" in caplog.text
    assert ("of 2 turns or rows, which are left out" in caplog.text) != streaming


def test_turns_that_are_read_otherwise_are_left_out_where_all_are_read(train, monkeypatch):
    def check(turn, tokenizer):
        raise ChatFormatError(f"{turn.name}: parsing gives back another content")

    monkeypatch.setattr("onepass_trl.training.preparation.check_round_trip", check)
    dataset = Dataset.from_list([BAD_ROWS[2]] * 2)
    with pytest.raises(ValueError, match=r"row 0 of the train dataset: .*parsing gives back"):
        train(dataset=dataset, invalid_turns="drop")  # the rows behind the first aren't read
    with pytest.raises(ValueError, match=r"no row left to train: .* of 2 turns or rows"):
        train(dataset=dataset, invalid_turns="drop", verify_rendering=True)


def test_a_dataset_of_invalid_turns_is_an_error(train):
    with pytest.raises(ValueError, match="no row left to train: no exact pass can be made of 1 "):
        train(dataset=Dataset.from_list(BAD_ROWS[1:2]), invalid_turns="drop")


def test_prepared_rows_that_became_text_are_named(train):
    rows = [{key: str(row[key]) for key in row} for row in train().train_dataset]
    with pytest.raises(ValueError, match="'input_ids' of the prepared train dataset is text"):
        train(dataset=Dataset.from_list(rows))


def test_skipping_preparation_of_conversations_is_an_error(train):
    with pytest.raises(ValueError, match="the train dataset has the columns passes and lacks inp"):
        train(dataset_kwargs={"skip_prepare_dataset": True})


def test_ids_without_an_embedding_are_errors(train):
    row = {"passes": [{"input_ids": [1, 99999], "labels": [-100, 99999]}]}
    dataset = Dataset.from_list([row])
    with pytest.raises(ValueError, match="train dataset has the token id 99999, but the model has"):
        train(dataset=dataset)
    for eval_dataset, name in ((dataset, "eval"), ({"held out": dataset}, "held out")):
        with pytest.raises(ValueError, match=f"the {name} dataset has the token id 99999"):
            train(eval_dataset=eval_dataset)


def test_a_stream_of_which_everything_is_dropped_is_an_error(train):
    stream = Dataset.from_list(ROWS).to_iterable_dataset()
    with pytest.raises(ValueError, match="no row left to train"):
        train(dataset=stream, max_length=2, overflow="drop")


def test_nulls_of_a_tool_schema_survive_unless_a_struct_filled_them(train, tiny_tokenizer):
    from datasets import Features, Json, List, Value

    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    tool = {"name": "f", "parameters": {"default": None}}
    other = {"name": "g", "parameters": {"limit": 1}}
    rows = [{"messages": messages, "tools": [tool]}, {"messages": messages, "tools": [other]}]
    message = {"role": Value("string"), "content": Value("string")}
    for dataset, expected in [
        (
            Dataset.from_list(
                rows, features=Features({"messages": List(message), "tools": List(Json())})
            ),
            '"parameters": {"default": null}',
        ),
        (Dataset.from_list(rows), '"parameters": {}'),
    ]:
        model = make_model("qwen3", vocab_size=len(tiny_tokenizer))
        ids = train(model=model, dataset=dataset).train_dataset[0]["input_ids"]
        assert expected in tiny_tokenizer.decode(ids)


def test_a_subset_of_prepared_rows_is_checked_alone(train):
    prepared = train().train_dataset
    shortest = min(len(row["input_ids"]) for row in prepared)
    subset = prepared.filter(lambda row: len(row["input_ids"]) == shortest)
    assert len(train(dataset=subset, max_length=shortest).train_dataset) == len(subset)


def test_train_on_chooses_among_given_passes(train):
    assert {int(row["num_turns"]) for row in train(train_on="last").train_dataset} == {1}
    with pytest.raises(ValueError, match="lists turn 7"):
        train(train_on="[7]")


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


def test_fillers_next_to_json_are_not_taken_for_nulls(train):
    from datasets import Features, Json, LargeList, List, Value

    from onepass_trl.training.nulls import settle_null_arguments

    def settled(arguments, wrap=List):
        call = {"function": {"name": Value("string"), "arguments": arguments}}
        message = {"role": Value("string"), "metadata": Json(), "tool_calls": wrap(call)}
        dataset = Dataset.from_dict(
            {"messages": []}, features=Features({"messages": wrap(message)})
        )
        return settle_null_arguments(dataset, "auto")

    assert settled(Json()) == settled(Value("string")) == settled(Json(), LargeList) == "keep"
    assert settled({"a": Value("int64")}) == settled({"a": Value("int64")}, LargeList) == "error"
