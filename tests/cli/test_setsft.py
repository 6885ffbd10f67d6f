import contextlib
import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from onepass_trl.cli import main, report_errors
from onepass_trl.cli.setsft import train
from onepass_trl.setsft import forking_prompts

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def flags(tiny_model_dir, tmp_path):
    """Of the example, on a tiny model."""
    return [
        "--config",
        str(EXAMPLES / "setsft.yaml"),
        f"--model_name_or_path={tiny_model_dir}",
        f"--dataset_name={EXAMPLES / 'questions.jsonl'}",
        f"--output_dir={tmp_path / 'out'}",
        "--dtype=float32",
        "--max_steps=2",
        "--bf16=False",
        "--use_cpu",
    ]


def test_the_example_trains_and_saves(flags, tmp_path, capfd):
    assert main(["setsft", *flags, "--num_processes=1"]) == 0
    out = capfd.readouterr().out
    assert all(name in out for name in ("matched_cost", "matching_gap", "eval_matched_share_6"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    question = [{"role": "user", "content": "What is two plus two?"}]
    prompts = forking_prompts(question, tokenizer, 6)
    assert {prompt[-1] for prompt in prompts} == set(range(len(tokenizer) - 6, len(tokenizer)))
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)


@pytest.mark.long("onepass_trl", "tests/cli")
def test_two_processes_train(flags, capfd):
    assert (
        main(
            [
                "setsft",
                *flags,
                "--num_processes=2",
                "--main_process_port",
                "0",
                "--matching_batch=5",
            ]
        )
        == 0
    )
    assert "matched_cost" in capfd.readouterr().out


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`")  # as the vocabulary grew
def test_a_lora_checkpoint_has_the_tokens(flags, tmp_path):
    from peft import AutoPeftModelForCausalLM

    more = ["--use_peft", "--lora_r=4", "--eval_strategy=no", "--learning_rate=0.1"]
    assert train([*flags, *more]) == 0
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    [ids] = config["trainable_token_indices"].values()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert ids == tokenizer.convert_tokens_to_ids([f"<think{i}>" for i in range(1, 7)])
    model = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "out")
    rows = model.get_input_embeddings()(torch.tensor(ids))
    assert torch.pdist(rows).min() > 0.1  # trained, each in its own way


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--num_forking_tokens=2"], "row 0 of the train dataset: it has 4 completions"),
        (["--matching=greedy"], "invalid choice"),
        (["--forking_token_format=think"], "must differ"),
        (["--thinking_opener=<reason>"], "completion 0 of 4: the thinking opener '<reason>'"),
        (["--train_on=last"], "Leave train_on unset"),
        (["--max_length=40", "--overflow=error"], "raise max_length to at least"),
    ],
)
def test_wrong_input_is_one_message_and_status_two(flags, more, message, capsys):
    with contextlib.suppress(SystemExit):  # of argparse, which has status 2 as well
        assert report_errors(train, [*flags, *more]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
