"""Images of conversations: forms, places, and contexts that equal those of the processor."""

import base64
import copy
import io
import json

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer

from onepass_trl import build_tree, linearize, render_passes, render_record
from onepass_trl.chat import ChatFormatError
from onepass_trl.chat.images import ImageContent, image_source, with_images
from onepass_trl.chat.messages import normalize_messages
from onepass_trl.chat.records import read_question
from onepass_trl.chat.rendering import render_answers
from onepass_trl.passes import ImageSource
from onepass_trl.vision import Vision, load, vision_of
from tests.chat.families import trl_template
from tests.image_families import FAMILIES
from tests.images import CHATS, A, B, C, answer, make_image, make_processor, part, text

PROCESSORS = sorted({(f.processor, f.images): name for name, f in FAMILIES.items()}.values())
"""A family for each processor."""


def contexts(messages, processor, **kwargs):
    """What the processor itself makes of the messages before each assistant turn."""
    return [
        processor.apply_chat_template(
            messages[:index],
            tokenize=True,
            add_generation_prompt=True,
            return_tensors="np",
            **kwargs,
        )[0].tolist()
        for index, message in enumerate(messages)
        if message["role"] == "assistant"
    ]


def rendered_contexts(messages, processor, **kwargs):
    passes = render_passes(messages, processor, **kwargs)
    return [pass_.token_ids[~pass_.trained].tolist() for pass_ in passes]


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("name", PROCESSORS)
def test_contexts_are_those_of_the_processor(name, chat):
    processor = make_processor(name)
    assert rendered_contexts(CHATS[chat], processor) == contexts(CHATS[chat], processor)


@pytest.mark.parametrize(
    "template", ["qwen2_5_vl", "qwen3_vl", "qwen3_5_nothink", "qwen3_6", "qwen3_8"]
)
def test_contexts_of_trl_s_templates_are_those_of_the_processor(template):
    processor = copy.deepcopy(make_processor("qwen3_vl"))
    processor.chat_template = trl_template(template)
    shown = [part(A), text("What?"), part(B)]
    if template == "qwen2_5_vl":
        messages = [{"role": "system", "content": [part(C), text("Be brief.")]}, *ask(*shown)]
    else:
        messages = [{"role": "system", "content": "Be brief."}, *ask(*shown), *ask(text("Sure?"))]
    messages = [{k: m[k] for k in ("role", "content")} for m in messages]
    assert rendered_contexts(messages, processor) == contexts(messages, processor)


def test_contexts_are_those_of_the_processor_with_numbered_images():
    """The template numbers images, so their places have different texts around them."""
    processor = make_processor("qwen3_vl")
    numbered = {"add_vision_id": True}
    assert rendered_contexts(
        CHATS["four turns"], processor, chat_template_kwargs=numbered
    ) == contexts(CHATS["four turns"], processor, **numbered)


def test_contexts_of_a_long_conversation_are_those_of_the_processor():
    """Its views are rendered from each other, with images in what is left out."""
    processor = make_processor("qwen3_vl")
    messages = []
    for number in range(40):
        shown = [part(make_image(16 + 8 * (number % 3), 16, number))] if number % 3 == 0 else []
        messages.append({"role": "user", "content": [*shown, text(f"Question {number}?")]})
        messages.append(answer(f"Answer {number}."))
    assert rendered_contexts(messages, processor) == contexts(messages, processor)


def test_the_processor_is_asked_once_for_each_size(monkeypatch):
    processor = copy.deepcopy(make_processor("qwen3_vl"))
    vision, asked = Vision(processor), []
    process = vision._process
    monkeypatch.setattr(
        vision, "_process", lambda images, *args: asked.append(images) or process(images, *args)
    )
    sources = [image_source(make_image(40, 24, seed)) for seed in range(5)]
    assert len({vision.tokens(source).size for source in [*sources, image_source(B)]}) == 2
    assert [image.size for [image] in asked] == [(40, 24), (16, 16)]
    processor.image_processor.size = {"shortest_edge": 64, "longest_edge": 256}
    assert vision.tokens(sources[0]).size < 15
    assert len(asked) == 3


def test_spans_have_the_tokens_of_their_images():
    processor = make_processor("internvl")
    passes = render_passes(CHATS["four turns"], processor)
    assert [len(pass_.images) for pass_ in passes] == [1, 1, 3, 4]
    vision = vision_of(processor)
    for pass_ in passes:
        for span in pass_.images:
            ids = pass_.token_ids[span.begin : span.end]
            np.testing.assert_array_equal(ids, vision.tokens(span.source))
            assert processor.tokenizer.decode(ids).startswith("<img><IMG_CONTEXT>")


def test_what_gemma3_writes_around_images_is_tokenized_with_the_text():
    """The processor writes two line breaks; with a third before them these are two tokens."""
    processor = copy.deepcopy(make_processor("gemma3"))
    settings = json.loads(processor.tokenizer.backend_tokenizer.to_str())
    vocabulary = settings["model"]["vocab"]
    vocabulary["ĊĊ"] = vocabulary.pop("õ")  # in the place of a byte that UTF-8 doesn't have
    settings["model"]["merges"].append(["Ċ", "Ċ"])
    processor.tokenizer._tokenizer = Tokenizer.from_str(json.dumps(settings))
    messages = ask(part(A), part(A), text("\nSame?"))
    assert rendered_contexts(messages, processor) == contexts(messages, processor)
    [pass_] = render_passes(messages, processor)
    first, second = pass_.images
    for span in pass_.images:
        tokens = processor.tokenizer.convert_ids_to_tokens(pass_.token_ids[span.begin : span.end])
        assert tokens == ["<start_of_image>", *["<image_soft_token>"] * 4, "<end_of_image>"]
    before = pass_.token_ids[first.begin - 2 : first.begin]
    between = pass_.token_ids[first.end : second.begin]
    assert processor.tokenizer.decode(before) == "\n\n\n"
    assert processor.tokenizer.convert_ids_to_tokens(between) == ["ĊĊ", "ĊĊ"]


def test_images_in_several_crops_are_refused():
    processor = copy.deepcopy(make_processor("gemma3"))
    images = processor.image_processor
    preprocess = images._preprocess
    crops = dict(
        do_pan_and_scan=True,
        pan_and_scan_min_crop_size=4,
        pan_and_scan_max_num_crops=4,
        pan_and_scan_min_ratio_to_activate=1.2,
    )
    images._preprocess = lambda *args, **kwargs: preprocess(*args, **{**kwargs, **crops})
    square = ask(part(B))
    assert rendered_contexts(square, processor) == contexts(square, processor)
    with pytest.raises(ChatFormatError, match=r"message 0, image 0: .* into crops .*do_pan_and_s"):
        render_passes(ask(part(A)), processor)


FORMS = {
    "PIL": lambda path: {"image": A},
    "path": lambda path: {"path": str(path)},
    "image path": lambda path: {"image": str(path)},
    "Path": lambda path: {"image": path},
    "bytes": lambda path: {"bytes": path.read_bytes()},
    "image bytes": lambda path: {"image": path.read_bytes()},
    "datasets' bytes": lambda path: {"image": {"bytes": path.read_bytes(), "path": "a.png"}},
    "datasets' path": lambda path: {"image": {"bytes": None, "path": str(path)}},
    "base64": lambda path: {"base64": base64.b64encode(path.read_bytes()).decode()},
    "data URI": lambda path: {
        "url": "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()
    },
    "Arrow's fillers": lambda path: {"path": str(path), "image": None, "text": None, "url": None},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_images(form, tmp_path):
    path = tmp_path / "a.png"
    A.save(path)
    content = [{"type": "image", **FORMS[form](path)}, text("What is it?")]
    [message] = normalize_messages([{"role": "user", "content": content}], inline_reasoning=False)
    assert message["content"] == "What is it?"
    assert isinstance(message["content"], ImageContent)
    copied = copy.deepcopy(message["content"])
    assert (copied, copied.parts) == (message["content"], message["content"].parts)
    [source] = message["content"].images
    np.testing.assert_array_equal(np.asarray(load(source)), np.asarray(A))


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGBA", "CMYK"])
def test_images_in_memory_keep_their_pixels(mode):
    image = A.convert(mode)
    loaded = load(image_source(image))
    np.testing.assert_array_equal(np.asarray(loaded), np.asarray(image.convert("RGB")))


def test_images_are_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    file = io.BytesIO()
    A.save(file, "PNG", exif=exif)
    assert load(image_source(file.getvalue())).size == (24, 40)
    assert load(image_source(Image.open(file))).size == (40, 24)  # as a processor takes it


def test_images_of_a_column_come_before_the_first_question():
    """As TRL's prepare_multimodal_messages puts them."""
    from trl.data_utils import prepare_multimodal_messages

    processor = make_processor("qwen3_vl")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Same?"}]
    record = {"messages": [*messages, answer("No.")], "images": [A, B]}
    [pass_] = render_record(record, processor).passes
    expected = contexts([*prepare_multimodal_messages(messages, [A, B]), answer("No.")], processor)
    assert pass_.token_ids[~pass_.trained].tolist() == expected[0]
    one = {"messages": record["messages"], "image": A}
    assert len(render_record(one, processor).passes[0].images) == 1


def test_images_of_a_column_belong_to_the_parts_without_their_own():
    own = ImageSource("own.png")
    messages = [
        {"role": "user", "content": [{"type": "image"}, part(own), {"type": "image"}]},
        {"role": "tool", "content": [{"type": "image", "image": None}]},
    ]
    sources = [ImageSource(f"{number}.png") for number in range(3)]
    filled = with_images(messages, sources)
    given = [part["image"] for message in filled for part in message["content"]]
    assert given == [sources[0], own, sources[1], sources[2]]
    assert messages[0]["content"][0] == {"type": "image"}


def test_a_prompt_and_its_completion_may_have_images():
    processor = make_processor("qwen3_vl")
    record = {"prompt": CHATS["four turns"][:-1], "completion": CHATS["four turns"][-1:]}
    [pass_] = render_record(record, processor).passes
    assert len(pass_.images) == 4


def test_turns_with_different_images_in_one_place_share_nothing_of_them():
    processor = make_processor("qwen3_vl")
    other = make_image(40, 24, seed=9)  # as many tokens
    passes = [
        render_passes(
            [{"role": "user", "content": [part(image), text("?")]}, answer("!")], processor
        )
        for image in (A, other, A)
    ]
    row = linearize(build_tree([pass_ for [pass_] in passes]))
    assert len({pass_.token_ids.tobytes() for [pass_] in passes}) == 1
    first = passes[0][0].images[0]
    assert [span.end - span.begin for span in row.images] == [first.end - first.begin] * 2
    assert [load(span.source).tobytes() for span in row.images] == [A.tobytes(), other.tobytes()]
    assert len(row) == 2 * len(passes[0][0]) - first.begin


def refusal(messages, processor=None, **record):
    with pytest.raises(ChatFormatError) as error:
        render_record({"messages": messages, **record}, processor or make_processor("qwen3_vl"))
    return str(error.value)


def ask(*parts):
    return [{"role": "user", "content": list(parts)}, answer("Yes.")]


PLACE = {"type": "image"}


def test_places_and_images_must_be_as_many():
    assert refusal(ask(PLACE, PLACE, text("?")), images=[A]) == (
        "the row has 1 image and its messages have 2 parts of type 'image' without one of their "
        "own: give as many of both"
    )
    assert "has 3 images and its messages have 1 part of" in refusal(ask(PLACE), images=[A, B, C])
    assert "has 1 image and its messages have 0 parts" in refusal(ask(text("?")), image=A)
    assert refusal(ask(text("?"), PLACE)) == (
        "message 0 has a place for an image in part 1, and no image for it: give it there, as "
        "{'type': 'image', 'image': ..}, or in the row's column 'images'"
    )
    assert "has columns 'image' and 'images'" in refusal(ask(PLACE), image=A, images=[A])
    assert "column 'images' must be a list, got PngImageFile" in refusal(
        ask(PLACE), images=Image.open(io.BytesIO(image_source(A).content))
    )


def test_images_that_cannot_be_read_are_named(tmp_path):
    cut = tmp_path / "cut.png"
    A.save(cut)
    cut.write_bytes(cut.read_bytes()[:200])
    missing = str(tmp_path / "missing.png")
    assert refusal(ask(text("?"), {"type": "image", "path": missing})) == (
        f"message 0 has an image in part 1 that can't be used: there is no file {missing!r}"
    )
    assert f"image 1 of column 'images': there is no file {missing!r}" in refusal(
        ask(PLACE, PLACE), images=[A, missing]
    )
    assert f"message 0, image 1: the image ({str(cut)!r}) can't be read: " in refusal(
        ask(part(A), part(str(cut)))
    )
    assert (
        "message 0, image 0: the image (4 bytes) can't be read: it has no image, or one of a format"
    ) in refusal(ask(part(b"text")))
    embedded = {"type": "image", "url": "data:image/png;base64," + "A" * 10_000}
    assert len(refusal(ask(embedded))) < 500
    assert "its 'base64' can't be decoded" in refusal(ask({"type": "image", "base64": "?"}))
    assert "an image is ndarray, expected a PIL image, a path" in refusal(
        ask(part(np.zeros((4, 4, 3))))
    )
    assert "it has 'image' and 'path'; keep one" in refusal(ask({**part(A), "path": missing}))


def test_an_image_that_the_processor_refuses_is_named():
    problem = refusal(ask(part(make_image(1, 300))))
    assert "message 0, image 0: the processor doesn't take the image (" in problem
    assert "absolute aspect ratio must be smaller than 200" in problem


def test_other_media_are_refused_by_their_part():
    assert refusal(ask(text("?"), {"type": "video", "video": "a.mp4"})) == (
        "message 0 has a content part (number 1) of type 'video'; only text and images can be "
        "read: train such rows with TRL's SFTTrainer or remove the part"
    )
    assert "part (number 0) of type 'input_audio'; only text and images" in refusal(
        ask({"type": "input_audio"})
    )
    assert "part (number 0) of type 'image_url'; give it as {'type': 'image'" in refusal(
        ask({"type": "image_url", "image_url": {"url": "https://a.b/c.png"}})
    )
    assert "column 'videos', but video and audio aren't supported" in refusal(
        ask(text("?")), videos=["a.mp4"]
    )


def test_answers_to_one_question_have_no_images():
    processor = make_processor("qwen3_vl")
    with pytest.raises(ChatFormatError, match="several answers to one question can only be traine"):
        render_answers(ask(part(A))[:1], [answer("Yes."), answer("No.")], processor)
    with pytest.raises(ChatFormatError, match="images can only be trained in a conversation"):
        read_question({"prompt": "a", "completions": ["b"], "images": [A]})


def test_assistants_have_no_images():
    messages = ask(text("?"))
    messages[1]["content"] = [part(A)]
    assert "message 1 is the assistant's and has an image" in refusal(messages)


def test_templates_must_write_one_place_for_each_image():
    messages = [{"role": "system", "content": [part(A)]}, *ask(part(B))]
    assert "System message cannot contain images" in refusal(messages)
    processor = make_processor("internvl")
    ignorant = processor.chat_template.replace("<IMG_CONTEXT>", "an image")
    kwargs = {"chat_template": ignorant}
    with pytest.raises(ChatFormatError, match=r"has 0 times '<IMG_CONTEXT>', .* have 1 image:"):
        render_passes(ask(part(A), text("?")), processor, chat_template_kwargs=kwargs)
    assert "has 2 times '<|image_pad|>', the place of an image, and the messages have 1" in refusal(
        ask(part(A), text("What is <|image_pad|>?"))
    )
    assert "has 1 time '<|image_pad|>'" in refusal(ask(text("What is <|image_pad|>?")))


def test_images_need_a_processor():
    tokenizer = make_processor("qwen3_vl").tokenizer
    problem = f"message 0 has an image, but {type(tokenizer).__name__} can't process images: pass"
    assert problem in refusal(ask(part(A)), tokenizer)


def test_images_are_refused_in_what_is_no_conversation():
    processor = make_processor("qwen3_vl")
    for record in (
        {"text": "<|image_pad|> a cat", "images": [A]},
        {"prompt": "a", "completion": "b", "image": A},
        {"passes": [{"input_ids": [1, 2], "labels": [-100, 2]}], "images": [A]},
    ):
        with pytest.raises(ChatFormatError, match="images can only be trained in a conversation"):
            render_record(record, processor)


def test_records_without_images_may_have_the_columns():
    processor = make_processor("qwen3_vl")
    for empty in ({"images": []}, {"image": None}, {"images": None}):
        [pass_] = render_record({"messages": ask(text("?")), **empty}, processor).passes
        assert not pass_.images
