"""What is trained, logged, saved and refused by `SetSFTTrainer`."""

import copy
import json
import logging
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from transformers import AutoModelForCausalLM, AutoProcessor, AutoTokenizer
from trl import SFTConfig

from onepass_trl.preparation.options import NUM_VERIFIED_RECORDS
from onepass_trl.preparation.round_trip import check_round_trip
from onepass_trl.setsft import (
    ForkingDiversityCallback,
    SetSFTConfig,
    SetSFTTrainer,
    forking_prompts,
    generate,
    mutual_information,
    rendering,
)
from onepass_trl.setsft.traces import SET_COLUMNS
from tests.chat.tokenizers import make_processor
from tests.chats import CHAT
from tests.models import make_model
from tests.setsft.sets import RECORDS, random_set
from tests.setsft.trainers import NUM_TOKENS, batch_of, forking_model, fresh_tokenizer, make_trainer


@pytest.fixture
def make(tmp_path):
    """Make a trainer of a tiny Qwen3; keyword arguments as for `make_trainer`."""

    def maker(records=RECORDS, **options):
        return make_trainer(*forking_model("qwen3"), tmp_path, records, **options)

    return maker


def history(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def assigned(trainer, **state):
    """The forking tokens of all traces of the training set, and the costs."""
    sets = batch_of(trainer)["sets"]
    for name, value in state.items():
        setattr(trainer.state, name, value)
    tokens = trainer._match(trainer.model, sets, len(sets))
    return tokens, trainer.matching_costs(trainer.model, sets)


class TestMatching:
    def test_the_metrics_are_those_of_the_assignment(self, make):
        trainer = make(per_device_train_batch_size=4, max_steps=2, learning_rate=0.0)
        tokens, costs = assigned(trainer)
        trainer._matched["train"][:] = trainer._matched["eval"][:] = 0
        trainer._metrics["train"].clear()
        trainer.train()
        matched = [c[t, np.arange(t.size)] for c, t in zip(costs, tokens, strict=True)]
        expected = np.concatenate(matched).mean()
        at_random = np.concatenate([matrix.mean(axis=0) for matrix in costs]).mean()
        assert history(trainer, "matched_cost") == pytest.approx([expected] * 2, rel=1e-5)
        gap = history(trainer, "matching_gap")
        assert gap == pytest.approx([at_random - expected] * 2, rel=1e-3)
        assert gap[0] > 0
        counts = np.bincount(np.concatenate(tokens), minlength=NUM_TOKENS)
        for number, count in enumerate(counts, start=1):
            assert history(trainer, f"matched_share_{number}")[-1] == pytest.approx(count / 10)
        shares = counts[counts > 0] / 10
        entropy = -(shares * np.log(shares)).sum()
        assert history(trainer, "assignment_entropy")[-1] == pytest.approx(entropy)
        assert 0 < history(trainer, "matching_time_share")[-1] < 1
        assert history(trainer, "turns")[-1] == 20
        json.dumps(trainer.state.log_history)

    @pytest.mark.parametrize(
        ("options", "num_forwards"),
        [
            (dict(), 2),
            (dict(max_length=2000), 1),
            (dict(matching_batch=50), 1),
            (dict(matching_batch=20), 3),
            (dict(matching_tokens=1), 1),
        ],
    )
    def test_forwards_have_no_more_tokens_than_training_needs_memory_for(
        self, make, monkeypatch, options, num_forwards
    ):
        monkeypatch.setattr("onepass_trl.setsft.trainer.MATCHING_TOKENS", 0)
        trainer = make(**options)
        sets, rows, log_probs = batch_of(trainer)["sets"], [], trainer._log_probs

        def recording(model, row):
            rows.append(len(row))
            return log_probs(model, row)

        monkeypatch.setattr(trainer, "_log_probs", recording)
        trainer.matching_costs(trainer.model, sets)
        assert len(rows) == num_forwards
        if not options:
            trained = sum(set_.num_row_tokens() for set_ in sets)
            assert max(rows) <= 2 * trained < sum(rows)

    def test_random_and_fixed_compute_no_costs(self, make, monkeypatch):
        for matching in ("random", "fixed"):
            trainer = make(matching=matching)
            monkeypatch.setattr(trainer, "matching_costs", None)
            trainer.train()
            assert not history(trainer, "matched_cost")
            assert len(history(trainer, "matched_share_1")) == 2

    def test_fixed_takes_the_order_and_random_changes_with_the_step(self, make):
        fixed, _ = assigned(make(matching="fixed"))
        assert [tokens.tolist() for tokens in fixed] == [[0, 1, 2, 3], [0, 1], [0, 1, 2], [0]]
        trainer = make(matching="random")
        drawn = [
            [tokens.tolist() for tokens in assigned(trainer, global_step=step)[0]]
            for step in (0, 0, 1)
        ]
        assert drawn[0] == drawn[1] != drawn[2]

    def test_evaluation_matches_and_starts_its_totals_again(self, make):
        held_out = Dataset.from_list([random_set(7, 3), random_set(8, 2)])
        trainer = make(
            trainer_kwargs={"eval_dataset": held_out}, eval_strategy="steps", eval_steps=1
        )
        trainer.train()
        assert len(history(trainer, "eval_matched_cost")) == 2
        shares = [history(trainer, f"eval_matched_share_{i}")[-1] for i in range(1, 6)]
        assert sum(shares) == pytest.approx(1)
        assert history(trainer, "eval_turns") == [5, 5]
        assert not history(trainer, "eval_matching_time_share")

    def test_a_cost_that_is_not_finite_stops_the_run(self, make):
        trainer = make()
        with torch.no_grad():
            trainer.model.model.norm.weight.fill_(float("nan"))
        with pytest.raises(FloatingPointError, match=r"cost of matching is \[nan\].*at step 0"):
            trainer.train()


class TestSets:
    def test_more_traces_than_tokens_are_an_error_or_are_split(self, make, caplog):
        records = [random_set(1, 7), random_set(2, 2)]
        with pytest.raises(
            ValueError, match=r"row 0 of the train dataset: it has 7 completions.*5"
        ):
            make(records)
        with caplog.at_level(logging.WARNING):
            trainer = make(records, excess_traces="split", matching="fixed")
        assert "train dataset: 1 question has more traces" in caplog.text
        sets = batch_of(trainer)["sets"]
        assert [[t.number for t in s.traces] for s in sets] == [[0, 1, 2, 3, 4], [5, 6], [0, 1]]
        trainer.train()

    def test_repeated_traces_are_kept_and_reported(self, make, caplog):
        record = random_set(1, 2)
        record["completions"].append(record["completions"][0])
        with caplog.at_level(logging.WARNING):
            trainer = make([record])
        assert "train dataset: 1 trace repeats another one" in caplog.text
        [tokens], [costs] = assigned(trainer)
        np.testing.assert_array_equal(costs[:, 0], costs[:, 2])
        assert len(set(tokens)) == 3
        trainer.train()
        assert history(trainer, "turns")[-1] == 3 * 2

    def test_one_trace_gets_its_cheapest_token(self, make):
        [tokens], [costs] = assigned(make([random_set(4, 1)]))
        assert tokens == costs.argmin()

    def test_traces_that_are_too_long_follow_the_policy(self, make, caplog):
        lengths = [len(t.pass_) for s in batch_of(make())["sets"] for t in s.traces]
        limit = sorted(lengths)[5]
        num_long = sum(length > limit for length in lengths)
        with caplog.at_level(logging.WARNING):
            trainer = make(max_length=limit)
        assert f"train dataset: {num_long} traces are longer than max_length={limit}" in caplog.text
        kept = [len(t.pass_) for s in batch_of(trainer)["sets"] for t in s.traces]
        assert kept == [min(length, limit) for length in lengths]
        trainer.train()

        caplog.clear()
        with caplog.at_level(logging.WARNING):
            trainer = make(max_length=limit, overflow="drop")
        assert f"{num_long} traces whole" in caplog.text
        assert sum(len(s.traces) for s in batch_of(trainer)["sets"]) == 10 - num_long
        with pytest.raises(ValueError, match=r"row \d of .*: completion \d has \d+ tokens.*raise"):
            make(max_length=limit, overflow="error")
        with pytest.raises(ValueError, match="no trace left to train"):
            make(max_length=5, overflow="drop")

    @pytest.mark.parametrize(
        ("records", "message"),
        [
            ([{**RECORDS[0], "completions": []}], "row 0 of the train dataset.*at least one"),
            (
                [{"messages": [{"role": "user", "content": "hi"}]}],
                "has no prompt and no completion",
            ),
            (
                [RECORDS[3], {**RECORDS[3], "completions": [{"role": "assistant", "content": ""}]}],
                "row 1",
            ),
        ],
    )
    def test_records_that_are_no_sets_are_named(self, make, records, message):
        with pytest.raises(ValueError, match=message):
            make([{k: json.dumps(v) for k, v in record.items()} for record in records])

    def test_empty_datasets_are_errors(self, make):
        with pytest.raises(ValueError, match="train dataset is empty"):
            make(Dataset.from_dict({"prompt": [], "completions": []}))

    def test_streams_and_packed_streams_train(self, make):
        stream = IterableDataset.from_generator(lambda: iter(RECORDS))
        for options in ({}, {"packing": True, "max_length": 300}):
            trainer = make(stream, **options)
            trainer.train()
            assert len(history(trainer, "loss")) == 2

    def test_packing_fills_rows_and_loses_nothing(self, make):
        trainer = make(packing=True, max_length=400)
        assert len(trainer.train_dataset) < len(RECORDS)
        indices = [s.index for s in batch_of(trainer)["sets"]]
        assert sorted(indices) == [0, 1, 2, 3]
        rows = trainer.train_dataset
        again = make(rows).train_dataset  # prepared rows are taken as they are
        assert [r["input_ids"].tolist() for r in again] == [r["input_ids"].tolist() for r in rows]

    def test_prepared_rows_must_suit_the_options(self, make):
        rows = make().train_dataset
        with pytest.raises(ValueError, match="tokens in a trace, but max_length is 20"):
            make(rows, max_length=20)
        with pytest.raises(ValueError, match="4 traces in a set, but num_forking_tokens is 3"):
            make(rows, num_forking_tokens=3)
        torn = rows.map(lambda row: {"trained": row["trained"][:-1]})
        with pytest.raises(ValueError, match="row 0 of the prepared train dataset: trained has "):
            make(torn)
        text = [{key: str(row[key]) for key in row} for row in rows]
        with pytest.raises(ValueError, match=" of the prepared train dataset is text"):
            make(Dataset.from_list(text))

    def test_nulls_that_a_table_filled_in_do_no_harm(self, make):
        plain = {"role": "assistant", "content": "four", "reasoning_content": None}
        record = {
            "prompt": RECORDS[0]["prompt"],
            "completions": [plain, RECORDS[0]["completions"][0]],
        }
        assert len(batch_of(make([record]))["sets"][0].traces) == 2


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (dict(matching="greedy"), "matching must be one of hungarian, random, fixed"),
            (dict(matching_reduction="max"), "matching_reduction must be one of"),
            (dict(matching_tokens=0), "matching_tokens must be at least 1"),
            (dict(matching_batch=-1), "matching_batch must be at least 1"),
            (dict(excess_traces="drop"), "excess_traces must be one of"),
            (dict(invalid_turns="drop"), "Leave invalid_turns unset"),
            (dict(num_forking_tokens=0), "num_forking_tokens must be at least 1"),
            (dict(num_forking_tokens=10**9), "at most 1,000, got 1,000,000,000"),
            (dict(forking_token_format="x"), "must differ"),
            (dict(forking_token_noise=-1.0), "forking_token_noise must be at least 0, got -1"),
            (dict(train_on="last"), "Leave train_on unset"),
            (dict(completion_only_loss=False), "Leave completion_only_loss unset"),
            (dict(packing=True), "set max_length"),
        ],
    )
    def test_values_without_meaning_are_errors(self, make, options, message):
        with pytest.raises(ValueError, match=message):
            make(**options)

    def test_a_collator_and_adapters_that_train_no_rows_are_errors(self, make):
        from peft import LNTuningConfig

        with pytest.raises(ValueError, match="data_collator can't be chosen"):
            make(trainer_kwargs={"data_collator": print})
        with pytest.raises(ValueError, match="LNTuningConfig can't train single embeddings"):
            make(trainer_kwargs={"peft_config": LNTuningConfig(task_type="CAUSAL_LM")})

    def test_rows_given_to_peft_are_kept(self, make):
        from peft import LoraConfig

        _, tokenizer = forking_model("qwen3")
        ids = sorted(tokenizer.convert_tokens_to_ids([f"<think{i}>" for i in range(1, 6)]))
        for given, expected in [
            ([3], [3, *ids]),
            ({"embed_tokens": [3, ids[0]]}, [3, *ids]),
            (None, ids),
        ]:
            config = LoraConfig(r=2, trainable_token_indices=given, task_type="CAUSAL_LM")
            trainer = make(trainer_kwargs={"peft_config": config})
            rows = trainer.model.peft_config["default"].trainable_token_indices
            assert rows == {"embed_tokens": expected}
            assert config.trainable_token_indices == given

    def test_other_configurations_are_converted(self, tmp_path):
        args = SFTConfig(
            str(tmp_path), max_length=200, bf16=False, use_cpu=True, report_to="none", max_steps=1
        )
        tokenizer = fresh_tokenizer()
        trainer = SetSFTTrainer(
            make_model("qwen3", vocab_size=len(tokenizer)),
            args,
            train_dataset=Dataset.from_list(RECORDS),
            processing_class=tokenizer,
        )
        assert isinstance(trainer.args, SetSFTConfig)
        assert trainer.args.num_forking_tokens == 6
        trainer.train()

    @pytest.mark.parametrize(
        "options",
        [
            dict(gradient_accumulation_steps=2),
            dict(loss_type="dft"),
            dict(neftune_noise_alpha=5.0),
            dict(dataset_num_proc=2),
            dict(shuffle_dataset=True),
            dict(train_sampling_strategy="group_by_length"),
            dict(pad_to_multiple_of=64),
        ],
        ids=lambda options: "-".join(options),
    )
    def test_options_of_trl_train(self, make, options):
        trainer = make(**options)
        trainer.train()
        assert all(loss > 0 for loss in history(trainer, "loss"))

    def test_template_arguments_hold_for_all_rows_and_a_rows_own_come_first(self, make):
        off = {"enable_thinking": False}
        with pytest.raises(ValueError, match=r"row 0 .* completion 0 .*enable_thinking"):
            make(chat_template_kwargs=off)
        records = [
            {**record, "chat_template_kwargs": {"enable_thinking": True}} for record in RECORDS
        ]
        expected, actual = make(), make(records, chat_template_kwargs=off)
        for a, b in zip(expected.train_dataset, actual.train_dataset, strict=True):
            assert a["input_ids"].tolist() == b["input_ids"].tolist()

    @pytest.mark.parametrize(
        ("choice", "verified"), [(None, NUM_VERIFIED_RECORDS), (True, 10), (False, 0)]
    )
    def test_completions_are_parsed_back(self, make, monkeypatch, choice, verified):
        turns = []
        monkeypatch.setattr(rendering, "check_round_trip", lambda turn, *_: turns.append(turn))
        records = [RECORDS[0]] * 10
        make(records, verify_rendering=choice)
        assert len(turns) == verified * len(RECORDS[0]["completions"])

    def test_a_completion_that_is_parsed_as_another_is_an_error(self, make, monkeypatch):
        def check_another(turn, *arguments):
            message = {**turn.message, "content": "another"}
            another = replace(turn, messages=[*turn.messages[:-1], message])
            return check_round_trip(another, *arguments)

        monkeypatch.setattr(rendering, "check_round_trip", check_another)
        with pytest.raises(ValueError, match=r"row 0 .* completion 0 .*gives back another content"):
            make()

    def test_the_router_loss_is_that_of_the_matched_traces(self, tmp_path):
        model, tokenizer = forking_model("qwen3_moe", router_aux_loss_coef=0.5)
        trainer = make_trainer(model, tokenizer, tmp_path, router_aux_loss_coef=0.5)
        trainer.train()
        assert len(history(trainer, "aux_loss")) == 2


def test_a_saved_model_has_tokens_and_rows_and_loads_alone(tmp_path):
    folder = tmp_path / "base"
    tokenizer = fresh_tokenizer()
    make_model("llama", vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = SetSFTConfig(
        str(tmp_path / "out"),
        model_init_kwargs={"attn_implementation": "eager"},
        bf16=False,
        use_cpu=True,
        report_to="none",
        max_steps=2,
        max_length=None,
        save_strategy="no",
    )
    trainer = SetSFTTrainer(str(folder), config, train_dataset=Dataset.from_list(RECORDS))
    assert config.model_init_kwargs == {"attn_implementation": "eager"}  # the user's own
    trainer.train()
    trainer.save_model()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    [prompt, *_] = forking_prompts(RECORDS[0]["prompt"], tokenizer, 6)
    ids = torch.tensor([prompt])
    trainer.model.eval()
    torch.testing.assert_close(
        loaded(input_ids=ids).logits, trainer.model(input_ids=ids).logits, rtol=1e-4, atol=1e-5
    )
    again = SetSFTTrainer(
        str(tmp_path / "out"), copy.deepcopy(config), train_dataset=Dataset.from_list(RECORDS)
    )
    assert len(again.processing_class) == len(tokenizer)


def test_the_loss_falls_and_the_tokens_part(make):
    trainer = make(max_steps=40, per_device_train_batch_size=4, learning_rate=1e-2)
    trainer.train()
    losses, gaps = history(trainer, "loss"), history(trainer, "matching_gap")
    assert losses[-1] < 0.5 * losses[0]
    assert gaps[-1] > 5 * abs(gaps[0])


class TestDiversity:
    def test_it_is_logged_at_each_evaluation(self, make):
        held_out = Dataset.from_list(RECORDS[:2])
        trainer = make(
            trainer_kwargs={"eval_dataset": held_out}, eval_strategy="steps", eval_steps=1
        )
        prompts = [record["prompt"] for record in RECORDS[:2]]
        callback = ForkingDiversityCallback(
            trainer, prompts, max_new_tokens=8, classify=lambda prompt, text: text[:2]
        )
        trainer.add_callback(callback)
        trainer.train()
        for key in ("eval_diversity", "eval_diversity_5", "eval_distinct_completions"):
            values = history(trainer, key)
            assert len(values) == 2
            assert all(0 <= value <= 1 for value in values)
        assert all(0 <= value <= np.log(5) for value in history(trainer, "eval_mutual_information"))
        assert len(history(trainer, "eval_loss")) == 2

    def test_equal_tokens_have_none(self, tmp_path):
        model, tokenizer = forking_model("qwen3")
        ids = tokenizer.convert_tokens_to_ids([f"<think{i}>" for i in range(1, 6)])
        rows = model.get_input_embeddings().weight
        with torch.no_grad():
            rows[ids] = rows[ids[0]].clone()
        trainer = make_trainer(model, tokenizer, tmp_path)
        metrics = ForkingDiversityCallback(
            trainer, [RECORDS[0]["prompt"]], max_new_tokens=6, classify=lambda prompt, text: text
        ).measure()
        assert metrics["eval_diversity"] == metrics["eval_mutual_information"] == 0
        assert metrics["eval_distinct_completions"] == pytest.approx(1 / NUM_TOKENS)

    def test_no_prompts_are_an_error(self, make):
        with pytest.raises(ValueError, match="prompts is empty"):
            ForkingDiversityCallback(make(), [])

    def test_completions_are_those_of_each_prompt_alone(self, make):
        """Padded on the left to one batch."""
        trainer = make()
        tokenizer = trainer.processing_class
        prompts = [
            forking_prompts(record["prompt"], tokenizer, NUM_TOKENS)[0] for record in RECORDS[:3]
        ]
        assert len({len(prompt) for prompt in prompts}) > 1
        together = generate(trainer.model, prompts, tokenizer, 6)
        alone = [generate(trainer.model, [prompt], tokenizer, 6)[0] for prompt in prompts]
        assert together == alone

    def test_the_model_s_own_tokens_end_a_completion_too(self, make):
        trainer = make()
        tokenizer, config = trainer.processing_class, trainer.model.generation_config
        prompt = forking_prompts(RECORDS[0]["prompt"], tokenizer, NUM_TOKENS)[0]
        [whole] = generate(trainer.model, [prompt], tokenizer, 6)
        config.eos_token_id = [whole[2]]
        [ended] = generate(trainer.model, [prompt], tokenizer, 6)
        assert ended == whole[: whole.index(whole[2])]

    def test_mutual_information_of_independent_and_of_equal_variables(self):
        independent = [(a, b) for a in range(3) for b in range(4)]
        assert mutual_information(independent) == pytest.approx(0)
        assert mutual_information([(a, str(a)) for a in range(3)]) == pytest.approx(np.log(3))


def test_prepared_sets_are_taken_as_they_are(make):
    prepared = make().train_dataset
    skip = {"skip_prepare_dataset": True}
    assert make(records=prepared, dataset_kwargs=skip).train_dataset.column_names == list(
        SET_COLUMNS
    )
    with pytest.raises(ValueError, match=r"lacks input_ids, trained, .* of a prepared row"):
        make(dataset_kwargs=skip)


def test_the_tokens_begin_as_what_begins_reasoning_in_the_template_of_a_file(tmp_path):
    source = fresh_tokenizer()
    template = tmp_path / "template.jinja"
    template.write_text(source.chat_template)
    tokenizer = fresh_tokenizer()
    tokenizer.chat_template = None
    model = make_model("qwen3", vocab_size=len(tokenizer))
    trainer = make_trainer(model, tokenizer, tmp_path, chat_template_path=str(template))
    assert trainer.forking_tokens().opener == "<think>"
    trainer.train()
    with pytest.raises(ValueError, match=r"call trl\.clone_chat_template on the model"):
        make_trainer(model, tokenizer, tmp_path, chat_template_path="Qwen/Qwen3-0.6B")


def test_a_processor_gets_the_tokens_and_keeps_its_template(tmp_path):
    source = fresh_tokenizer()
    processor = make_processor(source, chat_template=source.chat_template)
    processor.tokenizer.chat_template = None
    model = make_model("qwen3", vocab_size=len(source))
    trainer = make_trainer(model, processor, tmp_path, max_steps=1)
    plain = make_trainer(make_model("qwen3", vocab_size=len(source)), source, tmp_path)
    assert (
        trainer.train_dataset[0]["input_ids"].tolist()
        == plain.train_dataset[0]["input_ids"].tolist()
    )
    trainer.train()
    diversity = ForkingDiversityCallback(trainer, [CHAT[:2]], max_new_tokens=2)
    assert "eval_diversity" in diversity.measure()
    trainer.save_model(tmp_path / "out")
    saved = AutoProcessor.from_pretrained(tmp_path / "out")
    assert "<think1>" in saved.tokenizer.get_vocab()
    assert saved.chat_template == source.chat_template
