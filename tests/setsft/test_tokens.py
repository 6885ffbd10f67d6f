"""Forking tokens are single ids that start from the thinking opener."""

import pytest
import torch
from tokenizers import AddedToken

from onepass_trl.setsft import add_forking_tokens, forking_tokens
from onepass_trl.setsft.tokens import find_thinking_opener, forking_token_ids
from tests.models import make_model
from tests.setsft.trainers import fresh_tokenizer


def model_for(tokenizer, name="llama", **overrides):
    return make_model(name, vocab_size=len(tokenizer), **overrides)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_new_tokens_are_special_and_start_from_the_opener(name):
    """Untied (Llama) and tied (Qwen3) embeddings."""
    tokenizer = fresh_tokenizer()
    model, size = model_for(tokenizer, name), len(tokenizer)
    opener = tokenizer.convert_tokens_to_ids("<think>")
    rows, head = (
        e.weight.detach().clone()
        for e in (model.get_input_embeddings(), model.get_output_embeddings())
    )
    ids = add_forking_tokens(model, tokenizer, 3)
    assert ids == [size, size + 1, size + 2]
    assert len(tokenizer) == model.config.vocab_size == size + 3
    assert tokenizer.decode(ids) == "".join(forking_tokens(3))
    assert tokenizer.decode(ids, skip_special_tokens=True) == ""
    embeddings, outputs = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    assert (embeddings is outputs) == model.config.tie_word_embeddings
    torch.testing.assert_close(embeddings[:size], rows)
    torch.testing.assert_close(outputs[:size], head)
    for id_ in ids:
        torch.testing.assert_close(embeddings[id_], rows[opener])
        torch.testing.assert_close(outputs[id_], head[opener])


def test_noise_is_relative_and_seeded():
    distances = []
    for noise, seed in ((0.5, 0), (0.5, 0), (0.5, 1), (0.0, 0)):
        tokenizer = fresh_tokenizer()
        model = model_for(tokenizer)
        ids = add_forking_tokens(model, tokenizer, 4, noise=noise, seed=seed)
        rows = model.get_input_embeddings().weight.detach()
        start = rows[tokenizer.convert_tokens_to_ids("<think>")]
        difference = rows[ids] - start
        distances.append(difference)
        assert difference.std() / start.square().mean().sqrt() == pytest.approx(noise, rel=0.3)
    torch.testing.assert_close(distances[0], distances[1])
    assert not torch.equal(distances[0], distances[2])


def test_existing_tokens_stay_as_they_are():
    tokenizer = fresh_tokenizer()
    tokenizer.add_tokens([AddedToken("<think2>", special=True, normalized=False)])
    model = model_for(tokenizer)
    before = model.get_input_embeddings().weight.detach().clone()
    ids = add_forking_tokens(model, tokenizer, 2, noise=1.0)
    rows = model.get_input_embeddings().weight.detach()
    assert ids == [before.shape[0], before.shape[0] - 1]
    torch.testing.assert_close(rows[ids[1]], before[ids[1]])
    assert add_forking_tokens(model, tokenizer, 2) == ids
    torch.testing.assert_close(model.get_input_embeddings().weight, rows)


def test_tokens_of_the_tokenizer_alone_start_from_the_opener_too():
    tokenizer = fresh_tokenizer()
    model = model_for(tokenizer)
    tokenizer.add_tokens([AddedToken("<think1>", special=True, normalized=False)])
    [id_] = add_forking_tokens(model, tokenizer, 1)
    rows = model.get_input_embeddings().weight
    torch.testing.assert_close(rows[id_], rows[tokenizer.convert_tokens_to_ids("<think>")])


def test_spare_rows_of_the_embeddings_are_used():
    tokenizer = fresh_tokenizer()
    model = make_model("llama", vocab_size=len(tokenizer) + 10)
    ids = add_forking_tokens(model, tokenizer, 3)
    rows = model.get_input_embeddings().weight
    assert rows.shape[0] == len(tokenizer) + 7
    torch.testing.assert_close(rows[ids[2]], rows[tokenizer.convert_tokens_to_ids("<think>")])


def test_an_opener_of_several_tokens_gives_their_mean():
    tokenizer = fresh_tokenizer("gptoss")
    model = model_for(tokenizer)
    opener = find_thinking_opener(tokenizer)
    source = tokenizer(opener, add_special_tokens=False)["input_ids"]
    assert len(source) > 2
    [id_] = add_forking_tokens(model, tokenizer, 1)
    rows = model.get_input_embeddings().weight
    torch.testing.assert_close(rows[id_], rows[source].mean(dim=0))


def test_without_an_opener_they_start_from_the_mean_of_all():
    tokenizer = fresh_tokenizer("llama3_1")
    model, size = model_for(tokenizer), len(tokenizer)
    [id_] = add_forking_tokens(model, tokenizer, 1, thinking_opener="")
    rows = model.get_input_embeddings().weight
    torch.testing.assert_close(rows[id_], rows[:size].mean(dim=0))


@pytest.mark.parametrize(
    ("num", "form", "message"),
    [
        (0, "<think{i}>", "must be at least 1 and at most 1,000, got 0"),
        (2, "<think>", "they must differ"),
        (2, " <think{i}>", "no white space"),
        (2, "<think{n}>", r"needs \{i\}"),
        (2, "<think{i", "can't be filled in"),
    ],
)
def test_names_that_are_none_are_errors(num, form, message):
    with pytest.raises(ValueError, match=message):
        forking_tokens(num, form)


def test_tokens_that_are_no_single_ids_are_errors():
    tokenizer = fresh_tokenizer()
    with pytest.raises(ValueError, match=r"splits the forking token '<think1>' into \d+ ids"):
        forking_token_ids(tokenizer, ["<think1>"])
    with pytest.raises(ValueError, match="ordinary or unknown text"):
        forking_token_ids(tokenizer, ["d"])
    with pytest.raises(ValueError, match="is itself a forking token"):
        add_forking_tokens(model_for(tokenizer), tokenizer, 2, thinking_opener="<think1>")


def test_unknown_tokens_of_a_word_vocabulary_are_errors():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    with pytest.raises(ValueError, match="ordinary or unknown text"):
        forking_token_ids(tokenizer, ["<think1>", "<think2>"])


def test_a_wrapped_model_cannot_grow():
    from peft import LoraConfig, get_peft_model

    tokenizer = fresh_tokenizer()
    model = get_peft_model(model_for(tokenizer), LoraConfig(r=2, task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match="wrapped by PEFT already"):
        add_forking_tokens(model, tokenizer, 2)
    assert "<think1>" not in tokenizer.get_vocab()
