"""Text on the classes that natively multimodal models are loaded as, with their processors."""

import copy

import pytest
import torch
import transformers
from datasets import Dataset
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from onepass_trl import OnePassSFTConfig, OnePassSFTTrainer
from onepass_trl.attention.model_check import text_model
from onepass_trl.training.lm_head import check_sharded_head
from onepass_trl.versions import checkpointing_option
from tests.chat.tokenizers import make_processor, small_tokenizer
from tests.chats import CHATS
from tests.launching import run
from tests.model_coverage import make_tiny_model
from tests.models import make_model
from tests.n_pass import assert_same_batch, make_trainer
from tests.training.conversations import CONVERSATIONS

CHECKPOINTED = {checkpointing_option(): True}


def tiny(model_type):
    return make_tiny_model(model_type, AutoModelForImageTextToText)


def vision_weights(model):
    """Return the weights that text never reaches."""
    text, head = text_model(model), model.get_output_embeddings()
    reached = {id(weight) for part in (text, head) for weight in part.parameters()}
    return {n: p.detach().clone() for n, p in model.named_parameters() if id(p) not in reached}


@pytest.mark.parametrize("model_type", ["qwen3_vl", "qwen3_5", "qwen3_5_moe", "gemma3", "gemma4"])
@pytest.mark.parametrize("options", [{}, dict(padding_free=True)], ids=["padded", "padding_free"])
def test_a_batch_equals_n_pass(model_type, options, tmp_path):
    model = tiny(model_type)
    reference = copy.deepcopy(model)
    reference.set_attn_implementation("sdpa")
    model.config.text_config.use_cache = False
    conversations = CONVERSATIONS[:2]
    processor = make_processor(small_tokenizer("qwen3"))
    trainer = make_trainer(model, conversations, tmp_path, processor, **options)
    batch = trainer.data_collator(list(trainer.train_dataset))
    passes = [pass_ for conversation in conversations for pass_ in conversation]
    assert_same_batch(trainer, batch, reference, passes)


def test_state_of_an_earlier_call_changes_nothing(tmp_path):
    """Models with three planes of positions remember how images moved those of the last call."""
    model = tiny("qwen3_vl")
    reference = copy.deepcopy(model)
    trainer = make_trainer(model, CONVERSATIONS[:1], tmp_path, small_tokenizer("qwen3"))
    trainer.model.model.rope_deltas = torch.tensor([[-7], [3]])
    batch = trainer.data_collator(list(trainer.train_dataset))
    assert_same_batch(trainer, batch, reference, CONVERSATIONS[0])


def train(model, tmp_path, **options):
    """Return a trainer of two steps on text, with a processor, having trained and saved."""
    settings = dict(report_to="none", bf16=False, use_cpu=True, max_steps=2, save_steps=1)
    trainer = OnePassSFTTrainer(
        model,
        OnePassSFTConfig(str(tmp_path / "run"), learning_rate=1e-2, **settings),
        train_dataset=Dataset.from_list(CHATS),
        **options,
    )
    trainer.train()
    trainer.save_model(tmp_path / "out")
    return trainer


@pytest.mark.parametrize("model_type", ["qwen3_5", "qwen3_vl", "gemma3"])
def test_a_checkpoint_holds_the_whole_model_and_its_processor(model_type, tmp_path):
    model = tiny(model_type)
    kind, before = type(model), vision_weights(model)
    assert before
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    make_processor(small_tokenizer("qwen3")).save_pretrained(folder)
    trainer = train(str(folder), tmp_path)
    assert type(trainer.model) is kind
    for saved in (tmp_path / "out", tmp_path / "run" / "checkpoint-1"):
        loaded = getattr(transformers, kind.__name__).from_pretrained(saved)
        after = vision_weights(loaded)
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], weight) for name, weight in before.items())
        assert type(AutoProcessor.from_pretrained(saved)).__name__ == "LlavaProcessor"
    trained, start = text_model(loaded).state_dict(), text_model(model).state_dict()
    assert any(not torch.equal(trained[name], weight) for name, weight in start.items())


@pytest.mark.parametrize("model_type", ["qwen3_5", "qwen3_vl"])
def test_under_lora_a_checkpoint_holds_adapters_only(model_type, tmp_path):
    model = tiny(model_type)
    base = copy.deepcopy(model)
    trainer = train(
        model,
        tmp_path,
        peft_config=LoraConfig(target_modules=["q_proj", "v_proj"]),
        processing_class=make_processor(small_tokenizer("qwen3")),
    )
    saved = tmp_path / "out"
    weights = load_file(saved / "adapter_model.safetensors")
    assert weights
    assert all("lora_" in name and "language_model" in name for name in weights)
    assert not (saved / "model.safetensors").exists()
    assert type(AutoProcessor.from_pretrained(saved)).__name__ == "LlavaProcessor"
    loaded = PeftModel.from_pretrained(base, saved)
    ids = torch.arange(8)[None]
    logits = [
        each.eval()(input_ids=ids, position_ids=ids, use_cache=False).logits
        for each in (loaded, trainer.model)
    ]
    torch.testing.assert_close(*logits)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    folder = tmp_path_factory.mktemp("single") / "run"
    return run(folder, 1, model="qwen3_vl", per_device_train_batch_size=4)


@pytest.mark.parametrize("options", [{}, CHECKPOINTED], ids=["ddp", "checkpointed"])
def test_two_processes_equal_one(options, single, tmp_path):
    """Text leaves the vision tower without gradients, and DDP doesn't wait for them."""
    settings = dict(model="qwen3_vl", per_device_train_batch_size=2)
    history, weights = run(tmp_path / "run", 2, **settings, **options)
    expected_history, expected_weights = single
    for actual, expected in zip(history, expected_history, strict=True):
        assert actual["loss"] == pytest.approx(expected["loss"], rel=1e-4)
    assert any("visual" in name for name in weights)
    for name, expected in expected_weights.items():
        torch.testing.assert_close(weights[name], expected, rtol=1e-4, atol=1e-6, msg=name)


def test_a_head_that_fsdp_would_not_average_is_refused():
    model = tiny("qwen3_vl")
    with pytest.raises(ValueError, match="whose gradient FSDP would not average"):
        check_sharded_head(model)
    model.lm_head.requires_grad_(False)
    check_sharded_head(model)
    model.lm_head.requires_grad_(True)
    model.lm_head.weight = model.get_input_embeddings().weight
    check_sharded_head(model)
    check_sharded_head(make_model("llama"))
