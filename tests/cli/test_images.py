"""Verbs on conversations with images."""

import json

import pytest

from onepass_trl.chat import processing
from onepass_trl.tools.inspection import inspect_record
from tests.chats import CHATS
from tests.images import A, B, answer, make_image_model, make_processor, text

PLACE = {"type": "image"}


def ask(*parts):
    return {"role": "user", "content": list(parts)}


@pytest.fixture
def paths(tmp_path):
    for name, image in (("a", A), ("b", B)):
        image.save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:200])
    return {name: str(tmp_path / f"{name}.png") for name in ("a", "b", "broken", "missing")}


@pytest.fixture
def good(paths):
    messages = [ask(PLACE, text("What is it?")), answer("A cat.")]
    messages += [ask(PLACE, text("And now?")), answer("A dog.")]
    return {"messages": messages, "images": [paths["a"], paths["b"]]}


@pytest.fixture
def run(run_on_chats, image_model_dir):
    """A function that runs a verb on records, as `run_on_chats` does."""

    def run(verb, records, *flags, model=image_model_dir):
        return run_on_chats(verb, records, *flags, model=model)

    return run


def test_images_are_shown_compared_and_counted(run, good, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    only_text = {"messages": [ask(text("Hi")), answer("Yo.")], "images": []}
    page = tmp_path / "row.html"
    status, out, _ = run("inspect", [only_text, good], "--row=1", f"--html={page}")
    assert status == 0
    assert f"context  [image 1] '{tmp_path / 'b.png'}'" in out
    assert "images: one pass encodes 2, N-pass 3 = 1.50 x" in out
    assert page.read_text().count("data:image/jpeg;base64,") == 2
    status, out, _ = run("verify", [only_text, good])
    assert status == 0
    assert "One pass agrees with N-pass" in out
    json_file = tmp_path / "estimate.json"
    status, out, _ = run("estimate", [only_text, good], "--measure", f"--json={json_file}")
    assert status == 0
    assert "images encoded" in out
    value = json.loads(json_file.read_text())
    assert (value["one_pass"]["images"], value["n_pass"]["images"]) == (2, 3)


@pytest.mark.parametrize("verb", ["inspect", "verify"])
@pytest.mark.parametrize(
    ("images", "problem"),
    [
        (["a"], "the row has 1 image and its messages have 2 parts of type 'image' without"),
        (["a", "b", "b"], "the row has 3 images and its messages have 2 parts of type 'image'"),
        (["a", "missing"], "image 1 of column 'images': there is no file '"),
        (["a", "broken"], "message 2, image 0: the image ('"),
    ],
)
def test_images_that_cannot_be_used_are_named(run, good, paths, verb, images, problem):
    bad = {**good, "images": [paths[name] for name in images]}
    status, _, err = run(verb, [good, bad], *(["--row=1"] if verb == "inspect" else []))
    assert status == 2
    assert f"row 1 of the dataset: {problem}" in err


def test_an_estimate_says_what_would_stop_training(run, good, paths):
    bad = {**good, "images": [paths["a"], paths["broken"]]}
    video = {"messages": [ask({"type": "video", "video": "a.mp4"}), answer("Yes.")], "images": []}
    status, out, _ = run("estimate", [good, bad, video])
    assert status == 0
    assert "Training with invalid_turns=error would stop: " in out
    assert "row 1: message 2, image 0: the image (" in out


def test_models_that_see_no_images(run, good, tiny_model_dir):
    status, _, err = run("estimate", [CHATS[0], good], model=tiny_model_dir)
    assert status == 2
    assert (
        "row 1 of the dataset: it has images, but the model (model_type 'qwen3') doesn't s" in err
    )
    status, out, _ = run("inspect", [good], model=tiny_model_dir)
    assert status == 0
    assert "Training would stop: the model (model_type 'qwen3') doesn't see images" in out
    status, _, err = run("bench", [good], "--attention")
    assert status == 2
    assert "has images, and bench times text only" in err


def test_verbs_count_what_the_models_layers_see(run_on_chats, paths, tmp_path, monkeypatch):
    """Gemma 3 sees images in both directions: each has 4 tokens, of which a causal model has 10
    pairs and it has 16."""
    make_image_model("gemma3").config.save_pretrained(tmp_path)
    monkeypatch.setattr(
        processing, "load_processing_class", lambda *_, **__: make_processor("gemma3")
    )
    chat = {"messages": [ask(PLACE, text("What?")), answer("A cat.")], "images": [paths["a"]]}
    found = inspect_record(chat, make_processor("gemma3"))
    pairs, png = found.pairs + 6, tmp_path / "row.png"
    flags = [f"--html={tmp_path / 'row.html'}", f"--png={png}"]
    status, out, _ = run_on_chats("inspect", [chat], *flags, model=tmp_path)
    assert status == 0
    assert f"attention pairs: one pass {pairs:,}, N-pass {pairs:,} = 1.00 x" in out
    assert '"blocks":true' in (tmp_path / "row.html").read_text()
    assert png.read_bytes().startswith(b"\x89PNG")
