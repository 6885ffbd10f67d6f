"""Piecewise encoding gives what the tokenizer gives, for every kind of added token."""

from __future__ import annotations

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from onepass_trl.chat import ChatFormatError, render_passes
from onepass_trl.chat.encoding import (
    added_tokens,
    encode_after,
    encode_alone,
    encode_views,
    shared_prefix,
)
from tests.chat.tokenizers import SMALL, small_tokenizer


def metaspace_tokenizer(prepend_scheme, *added):
    """A character-level tokenizer that marks spaces, where the text or every piece begins."""
    characters = {c: i for i, c in enumerate("▁abcdefghij\n<>|")}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=characters, merges=[]))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=prepend_scheme)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=model)
    tokenizer.add_tokens(list(added))
    return tokenizer


def check(tokenizer, views):
    added = added_tokens(tokenizer)
    for a, b in zip(
        encode_views(tokenizer, added, views), encode_alone(tokenizer, views), strict=True
    ):
        assert np.array_equal(a, b)


@given(data=st.data(), family=st.sampled_from(SMALL))
def test_views_are_encoded_as_alone(data, family):
    tokenizer = small_tokenizer(family)
    assert added_tokens(tokenizer).boundary is not None
    tokens = sorted(tokenizer.added_tokens_encoder)
    part = st.one_of(
        st.sampled_from([*tokens, tokens[0][:-1], " ", "\n", "a", "é"]), st.text(max_size=4)
    )
    text = st.lists(part, max_size=12).map("".join)
    start = data.draw(text)
    check(tokenizer, [start + more for more in data.draw(st.lists(text, min_size=1, max_size=5))])


@pytest.mark.parametrize(
    ("scheme", "added", "splits"),
    [
        ("always", AddedToken("<a>", normalized=False), True),
        ("never", AddedToken("<a>", normalized=False), True),
        ("first", AddedToken("<a>", normalized=False), False),
        ("never", AddedToken("<a>", normalized=False, lstrip=True), False),
        ("never", AddedToken("<a>", normalized=False, rstrip=True), False),
        ("never", AddedToken("<a>", normalized=False, single_word=True), False),
        ("never", AddedToken("<a>", normalized=True), False),
    ],
)
def test_tokenizers_that_depend_on_the_position_encode_whole_texts(scheme, added, splits):
    tokenizer = metaspace_tokenizer(scheme, added)
    assert (added_tokens(tokenizer).boundary is not None) == splits
    check(tokenizer, ["a b<a> c d <a>e", "a b<a> c d <a>ef <a>", "a b<a>\n c"])


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_a_completion_goes_on_after_its_context(scheme):
    """Llama 2 and Mistral 7B put a space before each text, which the template doesn't write."""
    tokenizer = metaspace_tokenizer(scheme, AddedToken("<|>", special=True, normalized=False))
    assert added_tokens(tokenizer).prepends == (scheme != "never")
    tokenizer.eos_token = "<|>"
    tokenizer.chat_template = (
        "{% for m in messages %}{{ 'h' if m.role == 'user' else 'i' }}\n{{ m.content }}"
        "{{ eos_token if m.role == 'assistant' }}\n{% endfor %}"
        "{% if add_generation_prompt %}i\n{% endif %}"
    )
    messages = [
        {"role": role, "content": text}
        for role, text in (("user", "ab"), ("assistant", "c d"), ("user", "e"), ("assistant", "f"))
    ]
    whole = tokenizer.apply_chat_template(messages, return_dict=False)
    first, last = render_passes(messages, tokenizer)
    assert first.token_ids.tolist() == whole[: len(first)]
    assert last.token_ids.tolist() == whole[: len(last)]
    names = tokenizer.convert_ids_to_tokens(first.token_ids[first.trained])
    assert names[:4] == ["c", "▁", "d", "<|>"]


def test_a_completion_that_begins_inside_a_token_is_encoded_after_a_newline():
    tokenizer = metaspace_tokenizer("first", AddedToken("ab", normalized=False))
    assert tokenizer.convert_ids_to_tokens(encode_after(tokenizer, "ca", "bd")) == ["b", "d"]
    tokenizer.add_tokens([AddedToken("\nb", normalized=False)])
    with pytest.raises(ChatFormatError, match="begins a text with a space"):
        encode_after(tokenizer, "ca", "bd")


def test_of_two_tokens_the_longer_is_found_in_a_longer_view():
    tokenizer = metaspace_tokenizer(
        "never", AddedToken("<a>", normalized=False), AddedToken("<a>|b", normalized=False)
    )
    assert added_tokens(tokenizer).boundary is not None
    check(tokenizer, ["c<a>", "c<a>|", "c<a>|b", "c<a>|bc", "c<a>|c"])


def test_tokens_added_later_are_seen():
    tokenizer = metaspace_tokenizer("never", AddedToken("<a>", normalized=False))
    assert added_tokens(tokenizer) is added_tokens(tokenizer)
    tokenizer.add_tokens([AddedToken("<b>", normalized=False)])
    check(tokenizer, ["a<b>c<a>", "a<b>c<a>d"])
    assert added_tokens(tokenizer).boundary.fullmatch("<b>")


@given(st.text("ab", max_size=8), st.text("ab", max_size=8))
def test_shared_prefix(a, b):
    length = shared_prefix(a, b)
    assert a[:length] == b[:length]
    assert length == min(len(a), len(b)) or a[length] != b[length]
