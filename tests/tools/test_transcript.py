import pytest

from onepass_trl.tools.transcript import token_texts, visible_text


@pytest.mark.parametrize("text", ["", "plain", "Zoë 🌳🌳 日本", " <think>\n x</think>"])
def test_texts_of_tokens_join_to_the_text(tiny_tokenizer, text):
    ids = tiny_tokenizer.encode(text)
    texts = token_texts(ids, tiny_tokenizer)
    assert len(texts) == len(ids)
    assert "".join(texts) == text


def test_the_last_token_of_a_character_has_it(tiny_tokenizer):
    ids = tiny_tokenizer.encode("🌳")
    assert token_texts(ids, tiny_tokenizer) == [""] * (len(ids) - 1) + ["🌳"]


def test_half_a_character_is_shown_as_such(tiny_tokenizer):
    ids = tiny_tokenizer.encode("🌳")
    assert token_texts(ids[:2], tiny_tokenizer)[-1] == "\ufffd"


def test_nothing_that_commands_a_terminal_stays():
    hostile = "".join(map(chr, [*range(0x20), *range(0x7F, 0xA0), *range(0x2028, 0x202F)]))
    assert all(char.isprintable() or char in "\n\t" for char in visible_text(hostile))
