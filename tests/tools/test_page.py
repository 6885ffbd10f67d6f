"""The page in a real browser: what is lit is what is seen, and a conversation runs nothing."""

import json
import re

import numpy as np
import pytest

from onepass_trl import Pass
from onepass_trl.tools.flops import AttentionLayers, model_cost
from onepass_trl.tools.inspection import inspect_passes, inspect_record
from onepass_trl.tools.page import to_html
from onepass_trl.visibility import count_tiles, dense_mask
from tests.browser import CHROMIUM, NO_CHROMIUM, chromium
from tests.chats import CHAT
from tests.images import A, B, answer, make_image, make_image_model, make_processor, part, text
from tests.models import WINDOW

in_browser = pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)

HOSTILE = (
    "</script><script>window.ran = 1</script><img src=x onerror='window.ran = 2'>"
    "<!-- <script> $DATA $TITLE \u2028 \x1b[31m \u202e & &lt; \\u003c ]]>"
)
LIT = """[...document.querySelectorAll(".token")]
    .filter(token => token.closest(".lit")).map(token => Number(token.dataset.index))"""


@pytest.fixture(scope="module")
def browser():
    with chromium() as browser:
        yield browser


@pytest.fixture
def open_page(browser, tmp_path):
    """A function that opens an inspected row in the browser; scripts must not fail there."""
    context = browser.new_context(viewport={"width": 1200, "height": 800})
    errors, requests = [], []
    context.on("weberror", lambda error: errors.append(error.error))
    context.on("request", lambda request: requests.append(request.url))

    def opened(found, title="a row", layers=()):
        path = tmp_path / "row.html"
        path.write_text(to_html(found, title, layers), encoding="utf-8")
        page = context.new_page()
        page.goto(path.as_uri())
        return page

    yield opened
    context.close()
    assert not errors
    assert {url.split(":")[0] for url in requests} <= {"file", "data"}  # thumbnails are data


def hover(page, index):
    page.locator(f'.token[data-index="{index}"]').first.scroll_into_view_if_needed()
    x, y = page.evaluate(
        f"(box => [box.x + box.width / 2, box.y + box.height / 2])"
        f"(tokens[{index}].getClientRects()[0])"
    )
    page.mouse.move(x, y)


def lit(page):
    return sorted(page.evaluate(LIT))


def seen(found, index, window=None):
    row = found.row
    mask = dense_mask(row.visible_end, row.position_ids, window, found.begins.get(window))
    return np.flatnonzero(mask[index]).tolist()


@in_browser
def test_hovering_a_token_of_a_branch_lights_its_trunk_prefix_and_its_branch(
    open_page, tiny_tokenizer
):
    found = inspect_record({"messages": CHAT}, tiny_tokenizer)
    page = open_page(found)
    first_turn = np.flatnonzero(found.trained & (found.row.visible_end == len(found.row)))[0]
    index = int(first_turn + 3)
    assert seen(found, index) != list(range(index + 1))  # the other turn's branch is before it
    hover(page, index)
    assert lit(page) == seen(found, index)
    details = page.evaluate("document.querySelector('#details').textContent")
    assert f"{found.row.position_ids[index]} (row index {index})" in details
    assert f"id {found.row.shift_labels[index]}" in details
    page.mouse.move(1, 1)
    assert lit(page) == []


@in_browser
def test_every_token_of_a_row_with_fork_copies_and_long_runs(open_page, tiny_tokenizer):
    shared = [5] * 150
    passes = [Pass([*shared, tail, *[9] * 70], [0] * 150 + [1] * 71) for tail in (6, 7, 8)]
    found = inspect_passes(passes, tiny_tokenizer)
    page = open_page(found)
    for index in [0, 64, 149, 150, 151, 152, 153, 200, len(found.row) - 1]:
        page.evaluate(f"show({index}, false)")
        assert lit(page) == seen(found, index), index


@in_browser
def test_the_keyboard_is_enough(open_page, tiny_tokenizer):
    found = inspect_record({"messages": CHAT}, tiny_tokenizer)
    page = open_page(found)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "tokens"
    assert lit(page) == [0]
    page.keyboard.press("End")
    assert lit(page) == seen(found, len(found.row) - 1)
    page.keyboard.press("ArrowLeft")
    assert lit(page) == seen(found, len(found.row) - 2)
    page.keyboard.press("Escape")
    assert lit(page) == []
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.matches('summary, button')")


@in_browser
def test_a_hostile_conversation_is_text_and_runs_nothing(open_page, tiny_tokenizer):
    chat = [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": HOSTILE}]
    page = open_page(inspect_record({"messages": chat}, tiny_tokenizer), title=HOSTILE)
    assert page.evaluate("window.ran") is None
    assert page.evaluate("document.querySelectorAll('script').length") == 2
    assert page.evaluate("document.querySelectorAll('img').length") == 0
    text = page.evaluate("document.getElementById('tokens').textContent")
    assert text.count("</script><script>window.ran = 1</script><img src=x onerror=") == 2
    # A token that is a part of a character is shown as a dot.
    assert "$DATA $TITLE ⟨2028⟩ ␛[31m ⟨202E⟩ & &lt; \\u003c ]]>" in text.replace("·", "")


@in_browser
def test_images_are_shown_once_where_they_are_in_the_row(open_page, tmp_path):
    hostile = tmp_path / "<img src=x onerror='window.ran = 1'>&lt;\u202e.png"
    A.save(hostile)
    chat = [
        {"role": "user", "content": [part(hostile), text("What is it?")]},
        answer("A cat."),
        {"role": "user", "content": [part(B), text("And now?")]},
        answer("A dog."),
        {"role": "user", "content": [part(hostile)]},
        answer("The cat."),
    ]
    found = inspect_record({"messages": chat}, make_processor("qwen3_vl"))
    page = open_page(found, title="images")
    assert page.evaluate("window.ran") is None
    sizes = "[...document.querySelectorAll('img')].map(i => [i.naturalWidth, i.naturalHeight])"
    page.wait_for_function("[...document.querySelectorAll('img')].every(i => i.complete)")
    assert page.evaluate(sizes) == [[40, 24], [16, 16], [40, 24]]
    captions = page.evaluate(
        "[...document.querySelectorAll('figcaption')]"
        ".map(caption => [...caption.children].map(line => line.textContent))"
    )
    first, second, again = (f"{span.begin}..{span.end - 1}" for span in found.row.images)
    name = f"image 0: {str(hostile)!r}"
    assert captions == [
        [name, "40 x 24", "in 3 passes, encoded once", f"also at row indices {again}"],
        [f"image 1: {found.images[1]}", "16 x 16", "in 2 passes, encoded once"],
        [name, "40 x 24", "in 1 pass", f"also at row indices {first}"],
    ]
    last = found.row.images[1].end - 1
    hover(page, last)
    assert lit(page) == seen(found, last)
    details = page.evaluate("document.querySelector('#details').textContent")
    assert "number 3 of 4 of image 1, id " in details
    assert f", image 1 · 4 tokens at {second}" in page.evaluate(
        "document.querySelector('#outline').textContent"
    )


@in_browser
def test_a_page_has_no_more_than_64_thumbnails(open_page):
    images = [part(make_image(8, 8, seed)) for seed in range(66)]
    chat = [{"role": "user", "content": images}, answer("Many.")]
    page = open_page(inspect_record({"messages": chat}, make_processor("qwen3_vl")))
    count = "document.querySelectorAll('{}').length"
    assert page.evaluate(count.format("figure")) == 66
    assert page.evaluate(count.format("figure img")) == 64
    texts = page.evaluate("[...document.querySelectorAll('figure')].map(f => f.textContent)")
    assert ["no thumbnail: the first 64 images have one" in text for text in texts] == (
        [False] * 64 + [True] * 2
    )


@in_browser
def test_tiles_of_the_picture_are_those_of_the_plan_and_a_phone_is_wide_enough(
    open_page, tiny_tokenizer
):
    chat = [dict(m, content=m["content"] * 40) for m in CHAT]
    found = inspect_record({"messages": chat}, tiny_tokenizer)
    page = open_page(found)
    legend = page.evaluate("document.querySelector('.legend').textContent")
    assert tuple(map(int, re.findall(r"(\d+) (?:skipped|partial|full)", legend))) == found.tiles
    page.set_viewport_size({"width": 390, "height": 844})
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


@in_browser
def test_layers_with_a_window_light_what_it_leaves(open_page, tiny_tokenizer):
    chat = [dict(m, content=m["content"] * 20) for m in CHAT]
    found = inspect_record({"messages": chat}, tiny_tokenizer)
    layers = [AttentionLayers(2, None, 8), AttentionLayers(2, 70, 8), AttentionLayers(1, 3, 8)]
    page = open_page(found, layers=layers)
    names = page.evaluate("[...document.querySelectorAll('#layer option')].map(o => o.text)")
    assert names == ["without a window", "with a window of 3", "with a window of 70"]
    branch = int(np.flatnonzero(found.trained)[-1])
    hover(page, branch)
    for number, window in [(2, 70), (1, 3), (0, None)]:
        page.evaluate(
            f"(s => {{ s.selectedIndex = {number}; s.dispatchEvent(new Event('change')); }})"
            "(document.querySelector('#layer select'))"
        )
        legend = page.evaluate("document.querySelector('.legend').textContent")
        tiles = count_tiles(found.row.visible_end, found.row.position_ids, window)
        assert tuple(map(int, re.findall(r"(\d+) (?:skipped|partial|full)", legend))) == tiles
        for index in (branch, len(found.row) - 1):
            page.evaluate(f"hold({index})")
            assert lit(page) == seen(found, index, window)
    texts = page.evaluate("[...document.querySelectorAll('#figures li')].map(li => li.textContent)")
    assert sum(" with a window of" in text for text in texts) == 2


@in_browser
@pytest.mark.parametrize("is_gemma3", [True, False])
def test_images_that_are_seen_in_both_directions_light_so(open_page, is_gemma3):
    """In which layers, and across the border of a tile."""
    name = "gemma3" if is_gemma3 else "gemma4"
    layers = model_cost(make_image_model(name).config).attention
    chat = [
        {"role": "user", "content": [text("Look! " * 26), part(A), text("What is it?")]},
        answer("A cat."),
        {"role": "user", "content": [part(B), text("And now?")]},
        answer("A dog."),
    ]
    found = inspect_record({"messages": chat}, make_processor(name), layers=layers)
    assert found.begins.keys() == ({None, WINDOW} if is_gemma3 else {WINDOW})
    page = open_page(found, layers=layers)
    first, second = found.row.images
    block = np.flatnonzero(found.begins[WINDOW] < np.arange(len(found.row)))
    assert {*range(first.begin, first.end)} & {*block.tolist()}
    indices = [0, *range(first.begin, first.end), *range(second.begin, second.end), first.end + 3]
    for number, window in [(0, None), (1, WINDOW)]:
        page.evaluate(
            f"(s => {{ s.selectedIndex = {number}; s.dispatchEvent(new Event('change')); }})"
            "(document.querySelector('#layer select'))"
        )
        legend = page.evaluate("document.querySelector('.legend').textContent")
        row, begins = found.row, found.begins.get(window)
        tiles = count_tiles(row.visible_end, row.position_ids, window, begins)
        assert tuple(map(int, re.findall(r"(\d+) (?:skipped|partial|full)", legend))) == tiles
        for index in indices:
            page.evaluate(f"hold({index})")
            assert lit(page) == seen(found, index, window)
            details = page.evaluate("document.querySelector('#details').textContent")
            assert f"sees{len(lit(page))} of {len(row)} tokens" in details
            begin = index if begins is None else begins[index]
            assert f"seen byrow indices {begin}..{row.visible_end[index] - 1}" in details


@in_browser
def test_a_model_without_windows_offers_no_choice(open_page, tiny_tokenizer):
    page = open_page(inspect_record({"messages": CHAT}, tiny_tokenizer))
    assert page.evaluate("getComputedStyle(document.getElementById('layer')).display") == "none"


def test_the_page_grows_with_the_tokens_and_not_with_their_pairs(tiny_tokenizer):
    sizes = [
        len(to_html(inspect_passes([Pass([5] * n, [0] + [1] * (n - 1))], tiny_tokenizer), ""))
        for n in (1000, 2000, 4000)
    ]
    assert sizes[2] - sizes[1] < 2.2 * (sizes[1] - sizes[0])


def test_the_data_means_nothing_to_html(tiny_tokenizer):
    chat = [{"role": "user", "content": HOSTILE}, {"role": "assistant", "content": "Yes."}]
    page = to_html(inspect_record({"messages": chat}, tiny_tokenizer), HOSTILE)
    data = re.search(r'id="data">(.*?)</script>', page)[1]
    assert not set(data) & set("<>&")
    assert data.isascii()
    assert "window.ran = 1</script>" in "".join(json.loads(data)["texts"])
    assert "http" not in page.replace("http-equiv", "")
