"""One pass with images against N passes by the model's own forward and processor."""

import copy
import importlib
import io
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import ParallelismConfig
from datasets import Dataset, Image, List
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText
from transformers.utils import is_torchvision_available
from trl import SFTConfig, SFTTrainer

from onepass_trl import (
    OnePassCollator,
    OnePassSFTConfig,
    OnePassSFTTrainer,
    build_tree,
    linearize,
    render_passes,
)
from onepass_trl.attention.image_models import (
    IMAGE_MODELS,
    has_position_planes,
    layer_sees_image_blocks,
    sees_image_blocks,
    why_no_images,
)
from onepass_trl.attention.transformers_backend import use_onepass_attention
from onepass_trl.data.collator import model_inputs
from onepass_trl.data.image_positions import image_blocks
from onepass_trl.tools import verify
from onepass_trl.tools.verify import compare
from onepass_trl.training.arguments import why_no_images_with
from onepass_trl.training.context_parallel import forward_in_pieces
from onepass_trl.versions import checkpointing_option
from onepass_trl.visibility import dense_mask
from onepass_trl.vision import vision_of
from tests.image_families import FAMILIES
from tests.images import (
    CHATS,
    A,
    B,
    C,
    answer,
    make_image_model,
    make_processor,
    part,
    text,
)
from tests.launching import FSDP2, launch, run
from tests.models import WINDOW, make_model
from tests.n_pass import (
    GRADIENT_TOLERANCE,
    LOSS_TOLERANCE,
    SGD,
    assert_same_gradients,
    gradients,
)

long = pytest.mark.long("onepass_trl", "tests/training", "tests/images.py")
USUAL = (
    "exaone4_5",
    "gemma3",
    "gemma4",
    "glm46v",
    "glm4v",
    "idefics3",
    "internvl",
    "llava_next",
    "qwen2_5_vl",
    "qwen2_vl",
    "qwen3_5",
    "qwen3_vl",
    "qwen3_vl_moe",
)
TEXT_ONLY = [{"role": "user", "content": "Hi"}, answer("Yo."), {"role": "user", "content": "Hm"}]
TEXT_ONLY.append(answer("What?"))
CONVERSATIONS = [*CHATS.values(), TEXT_ONLY]


def test_every_family_is_tested_and_documented():
    assert FAMILIES.keys() == set(IMAGE_MODELS)
    page = (Path(__file__).parents[2] / "docs" / "images.md").read_text("utf-8")
    table = page.partition("| models | model types |")[2].partition("Others are refused")[0]
    assert sorted(re.findall(r"`(\w+)`", table)) == sorted(IMAGE_MODELS)


def families(*usual):
    """All families; those that aren't usual are tested with torchvision only."""
    others = pytest.mark.skipif(
        not is_torchvision_available(), reason="with torchvision: make test-images"
    )
    return [pytest.param(name, marks=() if name in usual else others) for name in FAMILIES]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", families(*USUAL))
def test_one_pass_equals_n_passes(name, chat, monkeypatch):
    # The gradient of a decay is a small sum of large terms.
    floor = 1e-4 if name.startswith("qwen3_5") else 1e-5
    monkeypatch.setattr(verify, "_GRADIENT_FLOOR", floor)
    model, processor = make_image_model(name), make_processor(name)
    passes = render_passes(CHATS[chat], processor)
    comparison = compare(model, passes, processor)
    assert comparison.one_pass_tokens < comparison.n_pass_tokens
    assert comparison.agrees(LOSS_TOLERANCE, GRADIENT_TOLERANCE), comparison


@pytest.mark.parametrize("name", ["qwen3_vl", "gemma3", "gemma4"])
def test_an_image_only_in_a_branch(name):
    model, processor = make_image_model(name), make_processor(name)
    system = {"role": "system", "content": "Be brief."}
    passes = [
        pass_
        for content in ([part(A), text("What?")], [part(B), part(A)], "Sure?")
        for pass_ in render_passes(
            [system, {"role": "user", "content": content}, answer("Yes.")], processor
        )
    ]
    row = linearize(build_tree(passes))
    assert [int(row.visible_end[span.begin]) < len(row) for span in row.images].count(True) >= 2
    comparison = compare(model, passes, processor)
    assert comparison.agrees(LOSS_TOLERANCE, GRADIENT_TOLERANCE), comparison


@pytest.mark.parametrize("name", ["gemma3", "gemma4"])
@pytest.mark.parametrize("window", [3, WINDOW, 400])
def test_blocks_are_seen_as_the_masks_of_the_model_say(name, window):
    """In which layers, and beyond a window that is shorter than an image."""
    model, processor = make_image_model(name, sliding_window=window), make_processor(name)
    modeling = importlib.import_module(type(model).__module__)
    *_, pass_ = render_passes(CHATS["four turns"], processor)
    row = linearize(build_tree([pass_]))
    types = vision_of(processor).token_types(row.input_ids)
    [key] = {"token_type_ids", "mm_token_type_ids"} & types.keys()
    config = model.config.get_text_config()
    config._attn_implementation = "eager"  # whose masks are tensors
    embeddings = torch.zeros(1, len(row), config.hidden_size)
    masks = modeling.create_masks_for_vision_model(
        config,
        embeddings,
        None,
        None,
        torch.arange(len(row))[None],
        modeling.get_block_sequence_ids_for_mask(types[key], device=embeddings.device),
    )
    begins = image_blocks(row, vision_of(processor).is_image(row.input_ids))
    assert (begins < np.arange(len(row))).sum() > 10
    for kind, layer_window in (("full_attention", None), ("sliding_attention", window)):
        sees = layer_sees_image_blocks(config, layer_window)
        assert sees is (name == "gemma3" or kind == "sliding_attention")
        expected = dense_mask(
            row.visible_end, row.position_ids, layer_window, begins if sees else None
        )
        np.testing.assert_array_equal((masks[kind][0, 0] == 0).numpy(), expected, err_msg=kind)


def test_gemma_4_that_sees_images_causally():
    """Its small models: `use_bidirectional_attention` isn't "vision"."""
    model = make_image_model("gemma4", use_bidirectional_attention=None)
    assert not sees_image_blocks(model.config)
    assert sees_image_blocks(make_image_model("gemma4").config)
    processor = make_processor("gemma4")
    comparison = compare(model, render_passes(CHATS["tool result"], processor), processor)
    assert comparison.agrees(LOSS_TOLERANCE, GRADIENT_TOLERANCE), comparison


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["gemma3", "gemma4"])
def test_flex_attention_sees_blocks_too(name):
    """Only forward: it has no backward on a CPU."""
    model, processor = make_image_model(name), make_processor(name)
    rows = [linearize(build_tree(render_passes(chat, processor))) for chat in CHATS.values()]
    collator = OnePassCollator(vision=vision_of(processor), padding_free=True, blocks=True)
    inputs = model_inputs(collator(rows))
    assert inputs["visible_begin"].shape == inputs["visible_end"].shape
    del inputs["shift_labels"]
    use_onepass_attention(model)
    with torch.no_grad():
        cpu, flex, causal = (
            model(**{**inputs, **change}, use_cache=False).logits
            for change in (
                {"attention_impl": "cpu"},
                {"attention_impl": "flex"},
                {"attention_impl": "cpu", "visible_begin": None},
            )
        )
    torch.testing.assert_close(flex, cpu, rtol=1e-4, atol=1e-5)
    assert (cpu - causal).abs().max() > 1e-3


def test_windows_are_measured_in_positions_of_the_text():
    model = make_image_model(
        "qwen2_5_vl",
        use_sliding_window=True,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
    )
    processor = make_processor("qwen2_5_vl")
    comparison = compare(model, render_passes(CHATS["four turns"], processor), processor)
    assert comparison.agrees(LOSS_TOLERANCE, GRADIENT_TOLERANCE), comparison


def n_pass_loss(model, processor, conversations):
    """The mean loss of the trained tokens, each context and its pixels by the processor itself."""
    total, count = torch.zeros(()), 0
    for messages in conversations:
        turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
        for index, pass_ in zip(turns, render_passes(messages, processor), strict=True):
            inputs = processor.apply_chat_template(
                messages[:index],
                tokenize=True,
                add_generation_prompt=True,
                return_dict=True,
                return_tensors="np",
                processor_kwargs={
                    "return_mm_token_type_ids": has_position_planes(model.config)
                    or sees_image_blocks(model.config)
                },
            )
            inputs = {name: torch.from_numpy(values) for name, values in inputs.items()}
            completion = torch.from_numpy(pass_.token_ids[pass_.trained]).long()[None]
            for name, more in (
                ("input_ids", completion),
                ("attention_mask", torch.ones_like(completion)),
                ("mm_token_type_ids", torch.zeros_like(completion)),
                ("token_type_ids", torch.zeros_like(completion)),
            ):
                if name in inputs:
                    inputs[name] = torch.cat([inputs[name], more], dim=1)
            logits = model(**inputs, use_cache=False).logits[0, -completion.size(1) - 1 : -1]
            log_probs = logits.log_softmax(-1).gather(1, completion[0, :, None])
            total = total - log_probs.sum()
            count += completion.numel()
    return total / count


def png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def as_record(messages):
    """The messages with places for images, and the images in a column."""
    images, out = [], []
    for message in messages:
        content = message["content"]
        if isinstance(content, list):
            images += [part["image"] for part in content if part["type"] == "image"]
            content = [
                {key: value for key, value in part.items() if key != "image"} for part in content
            ]
        else:
            content = [text(content)]
        out.append({**message, "content": content})
    return {"messages": out, "images": images}


def make_trainer(model, processor, records, tmp_path, **options):
    settings = dict(
        max_length=None,
        report_to="none",
        bf16=False,
        use_cpu=True,
        router_aux_loss_coef=0.0,
        logging_steps=1,
        per_device_train_batch_size=len(records),
    )
    settings[checkpointing_option()] = False
    dataset = Dataset.from_list(records)
    if options.pop("stream", False):
        dataset = dataset.to_iterable_dataset()
    return OnePassSFTTrainer(
        model,
        OnePassSFTConfig(str(tmp_path), **{**settings, **options}),
        train_dataset=dataset,
        processing_class=processor,
    )


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen3_5", "internvl", "gemma3", "gemma4"])
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(padding_free=True),
        dict(packing=True, max_length=400),
        dict(max_length=200),
        dict(pad_to_multiple_of=64),
        {checkpointing_option(): True},
    ],
    ids=["padded", "padding_free", "packed", "split", "multiple", "checkpointing"],
)
def test_a_batch_of_the_trainer_equals_n_passes(name, options, tmp_path):
    conversations, limit = CONVERSATIONS, options.get("max_length")
    if limit is not None and name == "gemma4":  # its images have up to 70 tokens
        options = {**options, "max_length": 2 * limit}
    if limit == 200:
        conversations = [CHATS["four turns"], CHATS["same image twice"], TEXT_ONLY]
    reference, processor = make_image_model(name), make_processor(name)
    trainer = make_trainer(
        copy.deepcopy(reference),
        processor,
        list(map(as_record, conversations)),
        tmp_path,
        **options,
    )
    rows = list(trainer.train_dataset)
    if limit == 200:
        assert len(rows) > len(conversations)
        assert max(len(row["input_ids"]) for row in rows) <= options["max_length"]
    if options.get("packing"):
        assert len(rows) < len(conversations)

    expected = n_pass_loss(reference, processor, conversations)
    expected.backward()
    batch = trainer.data_collator(rows)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=LOSS_TOLERANCE, atol=0)
    assert_same_gradients(gradients(trainer.model), gradients(reference), floor=1e-5)


@pytest.mark.parametrize("name", families())
def test_packed_split_and_checkpointed_rows_of_every_family_equal_n_passes(name, tmp_path):
    reference, processor = make_image_model(name), make_processor(name)
    trees = [render_passes(chat, processor) for chat in CONVERSATIONS]
    longest = max(len(pass_) for passes in trees for pass_ in passes)
    options = {"packing": True, "max_length": longest, checkpointing_option(): True}
    records = list(map(as_record, CONVERSATIONS))
    trainer = make_trainer(copy.deepcopy(reference), processor, records, tmp_path, **options)
    rows = list(trainer.train_dataset)
    num_tokens = sum(len(linearize(build_tree(passes))) for passes in trees)
    assert sum(len(row["input_ids"]) for row in rows) > num_tokens  # paths come twice
    expected = n_pass_loss(reference, processor, CONVERSATIONS)
    expected.backward()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(rows))
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=LOSS_TOLERANCE, atol=0)
    assert_same_gradients(gradients(trainer.model), gradients(reference), floor=1e-5)


def trained_model(name, *, tied=False, adapters=False):
    """A model of all of whose linear layers, with `adapters`, adapters alone are trained."""
    model = make_image_model(name, tied=tied)
    if not adapters:
        return model
    peft = pytest.importorskip("peft")
    linear = [path for path, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
    targets = [path for path in linear if not path.endswith(("lm_head", "gate_up_proj"))]
    torch.manual_seed(0)
    # Small ones: PEFT's random adapters make scores so sharp that rounding exceeds the tolerance.
    config = peft.LoraConfig(r=2, lora_alpha=0.2, target_modules=targets, init_lora_weights=False)
    return peft.get_peft_model(model, config)


def n_pass_training(name, **kind):
    """The model after two steps of SGD on all conversations, and the loss of each step."""
    model, losses = trained_model(name, **kind), []
    for _ in range(2):
        model.zero_grad()
        loss = n_pass_loss(model, make_processor(name), CONVERSATIONS)
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
    return model, losses


@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_equals_n_pass_training(accumulation, tmp_path):
    """After the check of the model, with text alone in a batch, and what is saved."""
    processor = make_processor("qwen3_vl")
    model, records = make_image_model("qwen3_vl"), list(map(as_record, CONVERSATIONS))
    batch = {
        "per_device_train_batch_size": len(records) // accumulation,
        "gradient_accumulation_steps": accumulation,
    }
    trainer = make_trainer(model, processor, records, tmp_path, max_steps=2, **batch, **SGD)
    trainer.train()
    expected, losses = n_pass_training("qwen3_vl")
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, rel=1e-6)
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "checkpoint-2")
    for (name, trained), actual, other in zip(
        model.named_parameters(), saved.parameters(), expected.parameters(), strict=True
    ):
        torch.testing.assert_close(trained, other, rtol=1e-4, atol=1e-6, msg=name)
        torch.testing.assert_close(actual, trained, rtol=0, atol=0, msg=name)


LAYERS = {
    "qwen3_vl": ["Qwen3VLTextDecoderLayer", "Qwen3VLVisionBlock"],
    "gemma3": ["Gemma3DecoderLayer", "SiglipEncoderLayer"],
    "gemma4": ["Gemma4TextDecoderLayer", "Gemma4VisionEncoderLayer"],
}
PACKED = {"packing": True, "max_length": 450, checkpointing_option(): True}
EACH = "per_device_train_batch_size"
SETTINGS = {
    "ddp": {EACH: 2},
    "accumulated": {EACH: 1, "gradient_accumulation_steps": 2},
    "streamed": {EACH: 2, "stream": True},
    "packed": {EACH: 1, **PACKED},
    "split": {EACH: 3, "max_length": 200},
    "adapters": {EACH: 2, "adapters": True},
    "fsdp2": {EACH: 2, "tied": True, **FSDP2},
    "fsdp2_packed": {EACH: 1, **PACKED, **FSDP2},
}
"""Two processes have all conversations in each step."""
OF_GEMMA = ("ddp", "packed", "split", "adapters", "fsdp2", "fsdp2_packed")


@pytest.mark.parametrize(
    ("name", "setting"),
    [
        ("qwen3_vl", "ddp"),
        *(
            pytest.param(name, setting, marks=long)
            for name, settings in {
                "qwen3_vl": ("accumulated", "fsdp2", "streamed"),
                "gemma3": OF_GEMMA,
                "gemma4": OF_GEMMA,
            }.items()
            for setting in settings
        ),
    ],
)
def test_two_processes_equal_n_pass_training(name, setting, tmp_path):
    options = {"name": name, **SETTINGS[setting]}
    if "max_length" in options and name == "gemma4":  # its images have up to 70 tokens
        options["max_length"] *= 2
    if "fsdp_config" in options:
        layers = {"transformer_layer_cls_to_wrap": LAYERS[name]}
        options["fsdp_config"] = {**options["fsdp_config"], **layers}
    history, weights = run(tmp_path / "run", 2, "tests.training.image_worker", **options)
    kind = {key: options[key] for key in ("tied", "adapters") if key in options}
    expected, losses = n_pass_training(name, **kind)
    assert [entry["loss"] for entry in history if "loss" in entry] == pytest.approx(losses, 1e-6)
    if "adapters" not in options:  # some have other names in files
        saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "model")
        weights = dict(saved.named_parameters())
    trained = {path: p.data for path, p in expected.named_parameters() if p.requires_grad}
    for path, parameter in trained.items():
        actual = weights[path.replace(".default.", ".")].data
        torch.testing.assert_close(actual, parameter, rtol=1e-4, atol=1e-6, msg=path)


@long
def test_processes_that_divide_the_encoder_need_images_in_all_batches_or_none(tmp_path):
    layers = {"transformer_layer_cls_to_wrap": LAYERS["qwen3_vl"]}
    options = {"name": "qwen3_vl", "tied": True, "is_mixed": True, EACH: 1, **FSDP2}
    options["fsdp_config"] = {**options["fsdp_config"], **layers}
    arguments = (str(tmp_path), json.dumps(options))
    launch(2, "tests.training.image_worker", *arguments, ACCELERATE_USE_CPU="false")
    for process in range(2):
        error = (tmp_path / f"{process}.txt").read_text("utf-8")
        assert error.startswith("the batches of 1 of 2 processes have images")


def test_the_check_of_the_model_sees_what_is_wrong_with_images(tmp_path, monkeypatch):
    model, processor = make_image_model("qwen3_vl"), make_processor("qwen3_vl")
    trainer = make_trainer(model, processor, [as_record(CHATS["four turns"])], tmp_path)
    monkeypatch.setattr(
        "onepass_trl.data.collator.position_planes",
        lambda row, *_: np.tile(row.position_ids.astype(np.int64), (4, 1)),
    )
    with pytest.raises(ValueError, match="does not compute in one pass what it computes in"):
        trainer.train()


@pytest.mark.filterwarnings("ignore:The following \\w+_pattern keys")  # PEFT's, of experts
@pytest.mark.parametrize("name", families("gemma3", "gemma4", "qwen3_vl"))
def test_adapters_are_trained(name, tmp_path):
    reference, processor = trained_model(name, adapters=True), make_processor(name)
    conversations = [CHATS["same image twice"], TEXT_ONLY]
    records = list(map(as_record, conversations))
    trainer = make_trainer(copy.deepcopy(reference), processor, records, tmp_path)
    expected = n_pass_loss(reference, processor, conversations)
    expected.backward()
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=LOSS_TOLERANCE, atol=0)
    assert any("vision" in name or "visual" in name for name in gradients(reference))
    assert_same_gradients(gradients(trainer.model), gradients(reference))


def test_rows_refer_to_images_and_pixels_are_loaded_in_batches(tmp_path):
    """Paths stay paths, and bytes the bytes of the file; an image is read again for each batch."""
    path = tmp_path / "a.png"
    A.save(path)
    jpeg = io.BytesIO()
    B.save(jpeg, "JPEG")
    record = {
        "messages": [
            {"role": "user", "content": [{"type": "image"}, {"type": "image"}, text("Same?")]},
            {"role": "assistant", "content": [text("No.")]},
        ],
        "images": [{"path": str(path), "bytes": None}, {"path": None, "bytes": jpeg.getvalue()}],
    }
    dataset = Dataset.from_list([record]).cast_column("images", List(Image()))
    model, processor = make_image_model("qwen3_vl"), make_processor("qwen3_vl")
    trainer = OnePassSFTTrainer(
        model,
        OnePassSFTConfig(str(tmp_path / "out"), report_to="none", use_cpu=True, bf16=False),
        train_dataset=dataset,
        eval_dataset=dataset,
        processing_class=processor,
    )
    [row] = trainer.train_dataset
    first, second = row["image_spans"]
    assert (first["path"], first["content"]) == (str(path), None)
    assert (second["path"], second["content"]) == (None, jpeg.getvalue())
    batch = trainer.data_collator([row])
    assert batch["image_grid_thw"].tolist() == [[1, 6, 10], [1, 4, 4]]
    assert trainer.evaluate()["eval_loss"] > 0

    C.resize((40, 24)).save(path)
    again = trainer.data_collator([row])
    assert not torch.equal(again["pixel_values"], batch["pixel_values"])
    C.save(path)
    with pytest.raises(ValueError, match="has 15 tokens in its row, but 1 x 6 x 3 by the proces"):
        trainer.data_collator([row])
    path.unlink()
    with pytest.raises(ValueError, match=r"a\.png'\) can't be read"):
        trainer.data_collator([row])


def test_models_of_other_families_are_refused_with_images(tmp_path, tiny_tokenizer):
    record = {"messages": [{"role": "user", "content": [part(A)]}, {"role": "assistant"}]}
    record["messages"][1]["content"] = [text("Yes.")]
    processor = make_processor("qwen3_vl")
    with pytest.raises(
        ValueError, match=r"\(model_type 'qwen3'\) doesn't see images in one pass, exp"
    ):
        make_trainer(make_model("qwen3"), processor, [record], tmp_path)
    with pytest.raises(ValueError, match=r"message 0 has an image, but .* can't process images"):
        make_trainer(make_model("qwen3"), tiny_tokenizer, [record], tmp_path)
    passes = render_passes(record["messages"], processor)
    with pytest.raises(ValueError, match="doesn't see images in one pass"):
        compare(make_model("qwen3", vocab_size=len(processor.tokenizer)), passes, processor)


def test_records_with_broken_images_may_be_left_out(tmp_path, caplog):
    records = [as_record(CHATS["same image twice"]), as_record(CHATS["tool result"])]
    records[0]["images"][0] = {"bytes": b"no image", "path": None}
    records[0]["images"][1:] = [{"bytes": png(image), "path": None} for image in (A, A)]
    records[1]["images"] = [{"bytes": png(image), "path": None} for image in (C, B)]
    model, processor = make_image_model("qwen3_vl"), make_processor("qwen3_vl")
    with pytest.raises(
        ValueError, match=r"row 0 of the train .*message 0, image 0: the image \(8 by"
    ):
        make_trainer(model, processor, records, tmp_path)
    trainer = make_trainer(model, processor, records, tmp_path, invalid_turns="drop")
    assert [len(row["image_spans"]) for row in trainer.train_dataset] == [3]  # one in two branches
    assert "row 0: message 0, image 0: the image (8 bytes) can't be read" in caplog.text


REFUSED = [
    ("qwen3_vl", {"parallelism_config": ParallelismConfig(cp_size=2)}, "cp_size is 2, which divid"),
    *(
        (name, {"attention_impl": impl}, f"attention_impl='{impl}' doesn't see them in both direct")
        for name in ("gemma3", "gemma4")
        for impl in ("cuda", "flex_flash", "varlen")
    ),
]


@pytest.mark.parametrize(("name", "options", "reason"), REFUSED)
def test_options_that_images_cannot_be_trained_with(name, options, reason):
    defaults = {"parallelism_config": None, "attention_impl": "auto"}
    args = SimpleNamespace(**{**defaults, **options})
    config = make_image_model(name).config
    assert why_no_images_with(config, SimpleNamespace(**defaults)) is None
    why = why_no_images_with(config, args)
    assert why.startswith(reason)
    assert why.endswith("or remove the images")


def test_images_are_refused_when_records_and_rows_are_given(tmp_path, monkeypatch):
    """By the launcher's environment, before it matters that there is one process."""
    records, processor = [as_record(CHATS["tool result"])], make_processor("qwen3_vl")
    model = make_image_model("qwen3_vl")
    rows = make_trainer(model, processor, records, tmp_path).train_dataset
    message = "has images, but cp_size is 2, which divides rows of text only: set cp_size to 1, or"
    monkeypatch.setattr(OnePassSFTTrainer, "get_cp_size", lambda _: 2)
    monkeypatch.setattr(OnePassSFTTrainer, "_context_parallel_group", None)
    settings = dict(report_to="none", bf16=False, use_cpu=True)
    for prepared in ({}, {"skip_prepare_dataset": True}):
        config = OnePassSFTConfig(str(tmp_path), dataset_kwargs=prepared, **settings)
        with pytest.raises(ValueError, match=f"the train dataset {message}"):
            OnePassSFTTrainer(model, config, train_dataset=rows, processing_class=processor)
    monkeypatch.setenv("ACCELERATE_USE_PARALLELISM_CONFIG", "true")
    monkeypatch.setenv("PARALLELISM_CONFIG_CP_SIZE", "2")
    with pytest.raises(ValueError, match=f"row 0 of the train dataset: the row {message}"):
        make_trainer(model, processor, records, tmp_path)


def test_rows_are_not_divided_between_processes():
    with pytest.raises(ValueError, match="has images, and cp_size > 1 divides rows of text only"):
        forward_in_pieces(torch.nn.Identity(), None, {"pixel_values": torch.zeros(1)})


def test_models_that_are_not_compared_are_refused_with_images():
    problem = why_no_images(CONFIG_MAPPING["paligemma"]())
    assert "the model (model_type 'paligemma') isn't proven to train images in one p" in problem


def test_a_collator_without_a_processor_refuses_images(tmp_path):
    processor = make_processor("qwen3_vl")
    trainer = make_trainer(
        make_image_model("qwen3_vl"), processor, [as_record(CHATS["tool result"])], tmp_path
    )
    with pytest.raises(ValueError, match="has images, which need the model's processor"):
        OnePassCollator()(list(trainer.train_dataset))


def test_gemma_4_embeds_images_as_the_tokenizers_padding_as_in_trl(tmp_path):
    """Its layers' own embeddings of an image's tokens are those of the configuration's padding,
    which SFTTrainer makes the tokenizer's."""
    reference, processor = make_image_model("gemma4"), make_processor("gemma4")
    padding = processor.tokenizer.pad_token_id
    reference.config.get_text_config().pad_token_id = padding - 1
    chat = [{"role": "user", "content": [part(A), text("What?")]}, answer("A cat.")]
    trainer = make_trainer(copy.deepcopy(reference), processor, [as_record(chat)], tmp_path)
    loss = trainer.compute_loss(trainer.model, trainer.data_collator(list(trainer.train_dataset)))
    of_trl = SFTTrainer(
        copy.deepcopy(reference),
        SFTConfig(str(tmp_path), report_to="none", bf16=False, use_cpu=True, max_length=None),
        train_dataset=Dataset.from_list([as_record(chat)]),
        processing_class=processor,
    ).model.eval()
    for model in (trainer.model, of_trl):
        assert model.config.get_text_config().pad_token_id == padding
    expected, before = (n_pass_loss(model, processor, [chat]) for model in (of_trl, reference))
    torch.testing.assert_close(loss, expected, rtol=LOSS_TOLERANCE, atol=0)
    assert abs(before - expected) > 10 * LOSS_TOLERANCE
