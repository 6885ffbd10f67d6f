"""Verbs take models with a processor, and render with it."""

import shutil

import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from onepass_trl.chat import processing
from onepass_trl.cli import main
from onepass_trl.cli.sft import train
from tests.chat.test_processing import PARTS
from tests.chat.tokenizers import make_processor
from tests.chats import CHATS
from tests.model_coverage import make_tiny_model


@pytest.fixture
def with_processor(tiny_model_dir, tiny_tokenizer, tmp_path):
    """A folder with a tiny model and a processor whose template isn't the tokenizer's."""
    folder = tmp_path / "with_processor"
    shutil.copytree(tiny_model_dir, folder)
    make_processor(tiny_tokenizer, PARTS).save_pretrained(folder)
    return folder


def test_the_processor_s_template_renders(run_on_chats, with_processor, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    status, out, _ = run_on_chats("inspect", CHATS, model=with_processor)
    assert status == 0
    assert "branch of turn 0" not in out  # PARTS keeps the reasoning of earlier turns
    (tmp_path / "plain.jinja").write_text(PARTS.replace("m['reasoning_content']", "''"))
    path = f"--chat_template_path={tmp_path / 'plain.jinja'}"
    status, _, err = run_on_chats("inspect", CHATS, path, model=with_processor)
    assert status == 2
    assert "reasoning" in err
    path = f"--chat_template_path={with_processor}"
    status, _, err = run_on_chats("inspect", CHATS, path, model=with_processor)
    assert status == 2
    assert "names a tokenizer, whose template and tokens a LlavaProcessor can't be given" in err


def test_verbs_take_a_processor(run_on_chats, with_processor):
    status, out, _ = run_on_chats("verify", CHATS, "-k1", model=with_processor)
    assert status == 0
    assert "One pass agrees with N-pass" in out
    status, out, _ = run_on_chats("estimate", CHATS, model=with_processor)
    assert status == 0
    assert "all conversations" in out


def test_without_torchvision_text_is_rendered_by_the_tokenizer(
    run_on_chats, with_processor, monkeypatch, caplog
):
    def needs_torchvision(model, **_):
        raise processing.MissingTorchvisionError(f"the processor of {model} needs torchvision")

    monkeypatch.setattr(processing, "load_processing_class", needs_torchvision)
    status, _, _ = run_on_chats("inspect", CHATS, model=with_processor)
    assert status == 0
    assert "needs torchvision. Until then its tokenizer alone renders" in caplog.text


def test_checkpoints_hold_the_processor(with_processor, chats, tmp_path):
    out = tmp_path / "out"
    flags = ["--max_steps=1", "--report_to=none", "--bf16=False", "--use_cpu", "--save_steps=1"]
    assert not train(
        [str(chats), f"--model_name_or_path={with_processor}", f"--output_dir={out}", *flags]
    )
    for folder in (out, out / "checkpoint-1"):
        processor = AutoProcessor.from_pretrained(folder)
        assert type(processor).__name__ == "LlavaProcessor"
        assert processor.chat_template == PARTS
    assert main(["verify", str(chats), f"--model_name_or_path={out}", "-k1"]) == 0


def test_verbs_load_the_class_of_a_multimodal_model(run_on_chats, tiny_tokenizer, tmp_path):
    model = make_tiny_model("qwen3_vl", AutoModelForImageTextToText)
    model.save_pretrained(tmp_path / "model")
    make_processor(tiny_tokenizer).save_pretrained(tmp_path / "model")
    status, out, _ = run_on_chats("estimate", CHATS, model=tmp_path / "model")
    assert status == 0
    assert "Qwen3VLForConditionalGeneration" in out
    for flags in ([], ["--model_from_config"]):
        status, out, _ = run_on_chats("verify", CHATS, "-k1", *flags, model=tmp_path / "model")
        assert status == 0
        assert "One pass agrees with N-pass" in out
