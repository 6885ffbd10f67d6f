import contextlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, T5Config

from onepass_trl.cli import main, report_errors
from onepass_trl.cli.sft import train
from tests.chats import CHATS, write_jsonl
from tests.training.sharding import ENVIRONMENT, SHARDED, needs_deepspeed

ACCELERATE = Path(__file__).parents[2] / "examples" / "accelerate"
long = pytest.mark.long("onepass_trl", "examples/accelerate", "tests/cli")
# Tests run side by side.
ANY_PORT = ("--main_process_port", "0")
ANSWER = {"role": "assistant", "content": "4."}


@pytest.fixture
def sft_flags(tiny_model_dir, chats, tmp_path):
    return [
        str(chats),
        f"--model_name_or_path={tiny_model_dir}",
        f"--output_dir={tmp_path / 'out'}",
        "--max_steps=2",
        "--logging_steps=1",
        "--report_to=none",
        "--bf16=False",
        "--use_cpu",
    ]


def test_without_a_verb_the_verbs_are_listed(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    assert all(verb in out for verb in ("sft", "verify", "env"))


def test_sft_names_the_row_whose_column_of_text_holds_something_else(sft_flags, tmp_path):
    path = write_jsonl(tmp_path / "body.jsonl", [{"body": "Two."}, {"body": [2]}])
    flags = ["--dataset_name", str(path), *sft_flags[1:], "--dataset_text_field=body"]
    with pytest.raises(ValueError, match="row 1 of the train dataset: column 'body' must be text"):
        train(flags)


def test_an_unknown_verb_is_refused(capsys):
    with pytest.raises(SystemExit) as error:
        main(["trian"])
    assert error.value.code == 2
    assert "trian" in capsys.readouterr().err


def test_sft_trains_and_saves(sft_flags, tmp_path, capfd):
    """Through accelerate, as a user starts it; the evaluation split is cut from the same file."""
    flags = [*sft_flags, "--dataset_train_split=train[:6]", "--dataset_test_split=train[6:]"]
    assert (
        main(["sft", *flags, "--eval_strategy=steps", "--eval_steps=1", "--num_processes=1"]) == 0
    )
    assert (tmp_path / "out" / "model.safetensors").is_file()
    out = capfd.readouterr().out
    assert "eval_loss" in out
    assert "npass_tokens" in out


@pytest.mark.parametrize(
    "launcher",
    [
        ["--num_processes=2"],
        pytest.param([f"--accelerate_config={ACCELERATE / 'ddp_cpu.yaml'}"], marks=long),
    ],
    ids=["flags", "ddp_cpu"],
)
def test_sft_trains_in_two_processes(sft_flags, launcher, capfd):
    """A step of two processes takes twice the rows of one: 2 of the 8 at batch size 1."""
    flags = [*sft_flags, "--per_device_train_batch_size=1", *ANY_PORT]
    assert main(["sft", *flags, *launcher]) == 0
    assert "'epoch': '0.25'" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("file", "expected", "epoch"),
    [
        ("fsdp2.yaml", "FSDP", "0.25"),
        # Both processes have the same rows.
        pytest.param("fsdp2_context_parallel.yaml", "FSDP", "0.125", marks=long),
        pytest.param("deepspeed_zero3.yaml", "DEEPSPEED", "0.25", marks=needs_deepspeed),
    ],
)
def test_a_model_is_sharded_as_the_launcher_is_configured(
    sft_flags, file, expected, epoch, tmp_path
):
    config = yaml.safe_load((ACCELERATE / file).read_text())
    if sizes := config.get("parallelism_config"):
        assert sizes == {"parallelism_config_cp_size": 4, "parallelism_config_dp_shard_size": 2}
        sizes |= {"parallelism_config_cp_size": 2, "parallelism_config_dp_shard_size": 1}
    (tmp_path / file).write_text(yaml.safe_dump(config))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file"]
    launcher += [tmp_path / file, "--num_processes=2", "--mixed_precision=no", *ANY_PORT]
    flags = [flag for flag in sft_flags if flag != "--use_cpu"]
    flags += [
        "--per_device_train_batch_size=1",
        f"--accelerator_config={json.dumps(SHARDED['accelerator_config'])}",
    ]
    result = subprocess.run(
        [*launcher, "-m", "tests.training.sharding", *flags],
        env={**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.splitlines().count(expected) == 2, result.stdout  # in whichever order
    assert f"'epoch': '{epoch}'" in result.stdout
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_processes_that_would_train_alone_are_refused(sft_flags, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="each would train alone"):
        train([flag for flag in sft_flags if flag != "--use_cpu"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "can't be read: No such file"),
        ("a: b: c", "is not YAML: mapping values are not allowed here"),
        ("- packing", "has a list, expected one flag per line"),
        ("", "has nothing, expected one flag per line"),
    ],
)
def test_a_file_of_no_flags_is_an_error(tmp_path, text, message, capsys):
    file = tmp_path / "sft.yaml"
    if text is not None:
        file.write_text(text)
    assert main(["sft", f"--config={file}"]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--config {file}", "--config={file}"])
def test_sft_reads_the_yaml_files_of_trl(sft_flags, tmp_path, chats, flag):
    options = dict(flag.removeprefix("--").split("=") for flag in sft_flags if "=" in flag)
    options = {key: yaml.safe_load(value) for key, value in options.items()}
    options["datasets"] = [{"path": "json", "data_files": str(chats)}]
    config = tmp_path / "sft.yaml"
    options |= {"use_cpu": True, "packing": True, "max_length": 256}
    config.write_text(yaml.safe_dump(options))
    assert train(flag.format(file=config).split()) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dataset_test_split=test", "--eval_strategy=epoch"], "has no split 'test'"),
        (["--overflow=cut"], "invalid choice"),
        (["--chat_template_kwargs=no"], "chat_template_kwargs must be a dict"),
        (["--verify_rendering=perhaps"], "verify_rendering"),
        (["--packing_strategy=wrapped", "--packing"], "packing_strategy="),
    ],
)
def test_wrong_input_is_one_message_and_status_two(sft_flags, flags, message, capsys):
    with contextlib.suppress(SystemExit):  # of argparse, which has status 2 as well
        assert report_errors(train, [*sft_flags, *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_a_missing_dataset_is_named(sft_flags, capsys):
    _, *flags = sft_flags
    assert report_errors(train, ["missing.jsonl", *flags]) == 2
    assert "there is no such file" in capsys.readouterr().err


def test_unknown_flags_are_refused_before_anything_starts(sft_flags, capsys):
    with pytest.raises(SystemExit) as error:
        main(["sft", *sft_flags, "--lerning_rate=1"])
    assert error.value.code == 2
    assert "--lerning_rate" in capsys.readouterr().err


def test_a_missing_configuration_of_accelerate_is_an_error(sft_flags, capsys):
    assert main(["sft", *sft_flags, "--accelerate_config=no.yaml"]) == 2
    assert "no.yaml is neither a file nor a valid config" in capsys.readouterr().err


def test_a_yaml_file_is_read_before_anything_starts(tmp_path, capsys):
    config = tmp_path / "sft.yaml"
    config.write_text("overflow: cut\n")
    for flags in (["--config", str(config)], [f"--config={config}"]):
        assert main(["sft", *flags, f"--output_dir={tmp_path}", "--use_cpu"]) == 2
        assert "overflow must be one of" in capsys.readouterr().err


def test_verify_agrees_and_says_so(tiny_model_dir, chats, capsys):
    flags = [f"--model_name_or_path={tiny_model_dir}", f"--dataset_name={chats}", "-k", "2"]
    assert main(["verify", *flags]) == 0
    out = capsys.readouterr().out
    assert "One pass agrees with N-pass" in out
    assert main(["verify", *flags, "--model_from_config"]) == 0


def test_verify_takes_one_dataset(tiny_model_dir, chats, capsys):
    model = f"--model_name_or_path={tiny_model_dir}"
    for datasets in ([], [str(chats), f"--dataset_name={chats}"]):
        with pytest.raises(SystemExit):
            main(["verify", *datasets, model])
        assert "name one dataset: as the first argument, or" in capsys.readouterr().err


def test_verify_takes_template_arguments(tiny_model_dir, chats, capsys):
    flags = [str(chats), f"--model_name_or_path={tiny_model_dir}", "-k", "1"]
    assert main(["verify", *flags, '--chat_template_kwargs={"enable_thinking": false}']) == 2
    assert "set chat_template_kwargs to {'enable_thinking': True}" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["verify", *flags, "--chat_template_kwargs=[1]"])
    assert "expected a JSON object, got [1]" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["verify", *flags, '--chat_template_kwargs={"a": 1, "a": 2}'])
    assert "an object with the key 'a' twice; keep one, got {" in capsys.readouterr().err


def test_verify_trains_the_turns_that_are_chosen(tiny_model_dir, chats, capsys):
    flags = [str(chats), f"--model_name_or_path={tiny_model_dir}", "-k", "1"]
    assert main(["verify", *flags, "--train_on=last"]) == 0
    conversation, turns = capsys.readouterr().out.splitlines()[2].split()[:2]
    assert (conversation, turns) == ("0", "1")
    assert main(["verify", *flags, "--train_on=[0, 2]"]) == 2
    assert "train_on lists turn 2" in capsys.readouterr().err


def test_verify_renders_with_another_template(tiny_model_dir, chats, tmp_path, capsys):
    flags = [str(chats), f"--model_name_or_path={tiny_model_dir}", "-k", "1"]
    other = AutoTokenizer.from_pretrained(tiny_model_dir)
    template = "{% for m in messages %}{{ '<|turn|>' + m.content + eos_token }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ '<|turn|>' }}{% endif %}"
    other.chat_template = template
    other.add_tokens(["<|turn|>"], special_tokens=True)
    other.save_pretrained(tmp_path / "other")
    (tmp_path / "plain.jinja").write_text(template)
    for path in (tmp_path / "plain.jinja", tmp_path / "other"):
        assert main(["verify", *flags, f"--chat_template_path={path}"]) == 2
        assert "the template has no place for any" in capsys.readouterr().err
    chats.write_text(json.dumps({"messages": [*CHATS[0]["messages"][:1], ANSWER]}))
    num_tokens = []
    for path in (tmp_path / "plain.jinja", tmp_path / "other"):
        assert main(["verify", *flags, f"--chat_template_path={path}"]) == 0
        num_tokens.append(int(capsys.readouterr().out.splitlines()[2].split()[2]))
    assert num_tokens[1] < num_tokens[0]  # <|turn|> is one token


def test_verify_takes_what_nulls_mean(tiny_model_dir, chats, capsys):
    from datasets import Dataset

    flags = [f"{chats}.parquet", f"--model_name_or_path={tiny_model_dir}"]
    calls = [{"name": "f", "arguments": {"a": 1, "b": None}}]
    Dataset.from_list(
        [{"messages": [CHATS[0]["messages"][0], {**ANSWER, "tool_calls": calls}]}]
    ).to_parquet(f"{chats}.parquet")
    assert main(["verify", *flags]) == 2
    assert "has a null among its arguments" in capsys.readouterr().err
    for choice in ("keep", "drop"):
        assert main(["verify", *flags, f"--null_arguments={choice}"]) == 0


def test_verify_ends_with_one_if_they_differ(tiny_model_dir, chats, capsys):
    flags = [str(chats), f"--model_name_or_path={tiny_model_dir}", "-k", "1"]
    assert main(["verify", *flags, "--gradient_tolerance=1e-30"]) == 1
    assert "One pass differs from N-pass" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--max_length=-3", "a whole number of at least 2, got -3"),
        ("--num_conversations=0", "a whole number of at least 1, got 0"),
        ("--num_conversations=two", "a whole number of at least 1, got two"),
        ("--loss_tolerance=-1", "a number of at least 0, got -1"),
        ("--gradient_tolerance=nan", "a number of at least 0, got nan"),
    ],
)
def test_verify_takes_numbers_that_make_sense(tiny_model_dir, chats, flag, expected, capsys):
    with pytest.raises(SystemExit):
        main(["verify", str(chats), f"--model_name_or_path={tiny_model_dir}", flag])
    assert f"{flag.split('=')[0]}: expected {expected}" in capsys.readouterr().err


def test_verify_names_what_is_missing(tiny_model_dir, tmp_path, capsys):
    flags = [str(tmp_path / "no.jsonl"), f"--model_name_or_path={tiny_model_dir}"]
    assert main(["verify", *flags]) == 2
    assert "there is no such file" in capsys.readouterr().err


def test_verify_refuses_another_model_s_tokenizer(tiny_model_dir, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.add_tokens(["Paris"])
    tokenizer.save_pretrained(model)
    config = AutoConfig.from_pretrained(model)
    config.vocab_size = len(tokenizer) - 1
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    message = {"role": "user", "content": "Where? Paris"}
    answer = {"role": "assistant", "content": "There."}
    dataset = write_jsonl(tmp_path / "paris.jsonl", [{"messages": [message, answer]}])
    assert main(["verify", str(dataset), f"--model_name_or_path={model}"]) == 2
    error = capsys.readouterr().err
    assert (
        f"has the token id {config.vocab_size}, but the model has {config.vocab_size} emb" in error
    )


def test_verify_names_the_class_of_another_kind_of_model(tiny_model_dir, chats, tmp_path, capsys):
    model = tmp_path / "model"
    shutil.copytree(tiny_model_dir, model)
    T5Config().save_pretrained(model)
    assert main(["verify", str(chats), f"--model_name_or_path={model}"]) == 2
    error = capsys.readouterr().err
    assert f"'{model}' can't be loaded: Unrecognized configuration class" in error
    assert "Model type should be one of" not in error


def test_verify_names_the_row_and_an_id_without_an_embedding(tiny_model_dir, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    flags = [str(path), f"--model_name_or_path={tiny_model_dir}"]
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "Hi"}]}))
    assert main(["verify", *flags]) == 2
    assert "row 0 of the dataset: the conversation has 1 message, none" in capsys.readouterr().err
    path.write_text(json.dumps({"passes": [{"input_ids": [1, 9**9], "labels": [-100, 9**9]}]}))
    assert main(["verify", *flags]) == 2
    assert "the conversation has the token id 387420489, but the" in capsys.readouterr().err
