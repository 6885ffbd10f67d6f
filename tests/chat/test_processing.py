"""A processor is taken wherever a tokenizer is: its own chat template, its tokenizer's ids."""

import copy
import json

import numpy as np
import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoProcessor
from transformers.utils import is_torchvision_available

from onepass_trl import PreparationOptions, render_passes, render_record
from onepass_trl.chat import ChatFormatError
from onepass_trl.chat.processing import (
    MissingTorchvisionError,
    check_template_source,
    load_processing_class,
    tokenizer_of,
)
from onepass_trl.preparation.round_trip import response_template_of
from tests.chat.families import CASES
from tests.chat.test_golden import skip_without_template
from tests.chat.tokenizers import make_processor, make_small_tokenizer, small_tokenizer, texts
from tests.chats import CHAT

QUESTION = CHAT[:2]
PARTS = """{%- for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}
{%- if m['reasoning_content'] %}
{{- '<think>\n' + m['reasoning_content'] + '\n</think>\n\n' }}{% endif %}
{%- for part in m['content'] %}{% if part['type'] == 'image' %}{{ '<|image_pad|>' }}
{%- elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}
{{- '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
"""Takes contents as lists of parts only, as the templates of many processors do."""


def moved_to_a_processor(tokenizer):
    """Return a processor that has the tokenizer's chat template, which its own tokenizer lacks."""
    processor = make_processor(tokenizer, chat_template=tokenizer.chat_template)
    processor.tokenizer.chat_template = None
    return processor


def assert_same_passes(actual, expected):
    assert len(actual) == len(expected)
    for pass_, other in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(pass_.token_ids, other.token_ids)
        np.testing.assert_array_equal(pass_.trained, other.trained)


@pytest.mark.parametrize("case", CASES.values(), ids=lambda case: case.name)
def test_a_processor_renders_as_its_tokenizer_does(case):
    skip_without_template(case)
    tokenizer = make_small_tokenizer(case)
    messages = CHAT[1:] if case.reasoning else [{**m, "reasoning_content": ""} for m in CHAT[1:]]
    kwargs = {"chat_template_kwargs": case.kwargs}
    expected = render_passes(messages, tokenizer, **kwargs)
    assert_same_passes(render_passes(messages, moved_to_a_processor(tokenizer), **kwargs), expected)


@pytest.mark.parametrize("template", [None, PARTS])
def test_contexts_are_the_processor_s(template):
    tokenizer = small_tokenizer("qwen3")
    processor = make_processor(tokenizer, template or tokenizer.chat_template)
    passes = render_passes(CHAT, processor)
    for pass_, number in zip(passes, (2, 4), strict=True):
        messages = CHAT[:number]
        if template is not None:
            messages = [
                {**message, "content": [{"type": "text", "text": message["content"]}]}
                for message in messages
            ]
        [expected] = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True
        )
        assert pass_.token_ids[~pass_.trained].tolist() == expected


def test_a_processor_s_template_goes_before_its_tokenizer_s():
    processor = make_processor(small_tokenizer("qwen3"), PARTS)
    context, completion = texts(processor.tokenizer, render_passes(CHAT, processor)[1])
    assert "Let me think." in context  # which the tokenizer's template leaves out
    assert completion == "<think>\nFirst, add.\n</think>\n\nIt is seven.<|im_end|>"
    assert_same_passes(
        render_passes(CHAT, make_processor(small_tokenizer("qwen3"))),
        render_passes(CHAT, small_tokenizer("qwen3")),
    )


def test_named_templates_of_a_processor():
    tokenizer = small_tokenizer("qwen3")
    named = {"default": tokenizer.chat_template, "parts": PARTS}
    processor = make_processor(tokenizer, named)
    assert_same_passes(render_passes(CHAT, processor), render_passes(CHAT, tokenizer))
    chosen = render_passes(CHAT, processor, chat_template_kwargs={"chat_template": "parts"})
    assert_same_passes(chosen, render_passes(CHAT, make_processor(tokenizer, PARTS)))
    with pytest.raises(ChatFormatError, match="has the templates parts, none of them the default"):
        render_passes(CHAT, make_processor(tokenizer, {"parts": PARTS}))


def test_without_a_template_there_is_an_error():
    processor = moved_to_a_processor(small_tokenizer("qwen3"))
    processor.chat_template = None
    with pytest.raises(ChatFormatError, match="no chat template"):
        render_passes(CHAT, processor)


def adds_tokens(tokenizer, single):
    """Return a copy of a tokenizer that adds special tokens to texts, as `single` says."""
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = "<|endoftext|>"
    ids = [(t, tokenizer.convert_tokens_to_ids(t)) for t in ("<|endoftext|>", "<|im_end|>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single, special_tokens=ids)
    return tokenizer


def test_a_processor_begins_a_prompt_with_the_token_that_its_template_leaves_out():
    tokenizer = adds_tokens(small_tokenizer("qwen3"), "<|endoftext|> $A")
    processor = make_processor(tokenizer, tokenizer.chat_template)
    [first, *_] = render_passes(CHAT, processor)
    [expected] = processor.apply_chat_template(QUESTION, add_generation_prompt=True, tokenize=True)
    assert first.token_ids[~first.trained].tolist() == expected
    assert first.token_ids[0] == tokenizer.bos_token_id
    [alone, *_] = render_passes(CHAT, tokenizer)
    np.testing.assert_array_equal(first.token_ids[1:], alone.token_ids)
    processor.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    assert_same_passes(render_passes(CHAT, processor)[:1], [first])


def test_a_processor_that_ends_each_prompt_is_refused():
    tokenizer = adds_tokens(small_tokenizer("qwen3"), "$A <|im_end|>")
    with pytest.raises(ValueError, match=r"encodes 'a' as 'a<\|im_end\|>'.*no turn could follow"):
        render_passes(CHAT, make_processor(tokenizer))


def test_what_has_no_tokenizer_is_refused():
    processor = make_processor(small_tokenizer("qwen3"))
    with pytest.raises(ValueError, match="LlavaImageProcessorPil has no tokenizer, expected"):
        render_passes(CHAT, processor.image_processor)


def test_turns_are_parsed_back_by_the_tokenizer_s_response_template():
    tokenizer = copy.deepcopy(small_tokenizer("deepseekv3"))
    processor = moved_to_a_processor(tokenizer)
    assert tokenizer.response_template is not None
    assert response_template_of(processor, tokenizer.chat_template, None) is not None
    assert response_template_of(processor, PARTS, None) is None
    found = render_record({"messages": CHAT}, processor, verify=True)
    expected = render_record({"messages": CHAT}, tokenizer, verify=True)
    assert_same_passes(found.passes, expected.passes)


def test_text_is_encoded_by_the_tokenizer():
    processor = make_processor(small_tokenizer("qwen3"))
    record, options = {"text": "What is two?"}, PreparationOptions()
    assert_same_passes(
        render_record(record, processor, options).passes,
        render_record(record, processor.tokenizer, options).passes,
    )


def test_a_model_s_processor_is_loaded_or_else_its_tokenizer(tmp_path):
    tokenizer = small_tokenizer("qwen3")
    make_processor(tokenizer, PARTS).save_pretrained(tmp_path / "with")
    tokenizer.save_pretrained(tmp_path / "without")
    processor = load_processing_class(str(tmp_path / "with"))
    assert type(processor).__name__ == "LlavaProcessor"
    assert processor.chat_template == PARTS
    loaded = load_processing_class(str(tmp_path / "without"))
    assert loaded is tokenizer_of(loaded)


@pytest.mark.skipif(is_torchvision_available(), reason="torchvision is there")
@pytest.mark.parametrize(
    ("processor", "images", "videos"),
    [
        ("PixtralProcessor", "PixtralImageProcessor", None),
        ("Lfm2VlProcessor", "Lfm2VlImageProcessor", None),
        ("Kimi_K25Processor", "Kimi_K25ImageProcessor", "Kimi_K25VideoProcessor"),
        ("Qwen3VLProcessor", "Qwen2VLImageProcessor", "Qwen3VLVideoProcessor"),
    ],
)
def test_processors_that_need_torchvision_say_so(processor, images, videos, tmp_path):
    small_tokenizer("qwen3").save_pretrained(tmp_path)
    config = {"processor_class": processor, "image_processor": {"image_processor_type": images}}
    if videos:
        config["video_processor"] = {"video_processor_type": videos}
    (tmp_path / "processor_config.json").write_text(json.dumps(config))
    with pytest.raises(MissingTorchvisionError, match="needs torchvision, which isn't installed"):
        load_processing_class(str(tmp_path))


def test_another_error_of_a_processor_is_not_torchvision_s(tmp_path, monkeypatch):
    make_processor(small_tokenizer("qwen3")).save_pretrained(tmp_path)

    def broken(*_, **__):
        raise ValueError("unknown size")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", broken)
    with pytest.raises(ValueError, match="unknown size"):
        load_processing_class(str(tmp_path))


def test_a_processor_that_needs_torchvision_says_so(tmp_path, monkeypatch):
    make_processor(small_tokenizer("qwen3")).save_pretrained(tmp_path)

    def needs_torchvision(*_, **__):
        raise ImportError("Qwen3VLVideoProcessor requires the Torchvision library")

    monkeypatch.setattr(AutoProcessor, "from_pretrained", needs_torchvision)
    monkeypatch.setattr("transformers.utils.is_torchvision_available", lambda: False)
    with pytest.raises(MissingTorchvisionError, match=f"{tmp_path} needs torchvision.*pip install"):
        load_processing_class(str(tmp_path))
    monkeypatch.setattr("transformers.utils.is_torchvision_available", lambda: True)
    with pytest.raises(ImportError, match="requires the Torchvision library"):
        load_processing_class(str(tmp_path))


def test_another_tokenizer_s_template_is_not_for_a_processor(tmp_path):
    tokenizer = small_tokenizer("qwen3")
    file = tmp_path / "chat.jinja"
    file.write_text("{{ messages }}")
    check_template_source("Qwen/Qwen3-0.6B", tokenizer)
    check_template_source(str(file), make_processor(tokenizer))
    with pytest.raises(ValueError, match=r"names a tokenizer, .* LlavaProcessor can't be given"):
        check_template_source("Qwen/Qwen3-0.6B", make_processor(tokenizer))


def test_a_template_s_file_that_cannot_be_read_is_named(tmp_path):
    file = tmp_path / "chat.jinja"
    with pytest.raises(FileNotFoundError, match=r"chat\.jinja"):
        check_template_source(str(file), small_tokenizer("qwen3"))
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"the chat template .*chat.jinja is not text in UTF-8"):
        check_template_source(str(file), small_tokenizer("qwen3"))
