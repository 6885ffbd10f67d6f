"""The forking tokens: their names, their place in a tokenizer and their embeddings."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from tokenizers import AddedToken

from onepass_trl.chat.errors import ChatFormatError
from onepass_trl.chat.families import family_of
from onepass_trl.chat.marks import THINK_OPEN
from onepass_trl.chat.processing import ProcessingClass, tokenizer_of
from onepass_trl.chat.template import Template

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

DEFAULT_FORMAT = "<think{i}>"
_MOST_TOKENS = 1000  # each is an embedding and, in the matching, a pass for each trace


def forking_tokens(
    num_forking_tokens: int, forking_token_format: str = DEFAULT_FORMAT
) -> list[str]:
    """Return the names of the forking tokens, numbered from 1.

    Raises:
        ValueError: if the format gives them no names, or the same one.

    >>> forking_tokens(3)
    ['<think1>', '<think2>', '<think3>']
    """
    if not 1 <= num_forking_tokens <= _MOST_TOKENS:
        raise ValueError(
            f"num_forking_tokens must be at least 1 and at most {_MOST_TOKENS:,}, got "
            f"{num_forking_tokens:,}"
        )
    try:
        names = [forking_token_format.format(i=i) for i in range(1, num_forking_tokens + 1)]
    except (KeyError, IndexError, ValueError) as error:
        raise ValueError(
            f"forking_token_format={forking_token_format!r} can't be filled in ({error!r}): it "
            f"needs {{i}} where the number stands, as in {DEFAULT_FORMAT!r}"
        ) from error
    if len({name.strip() for name in names}) < len(names) or names[0] != names[0].strip():
        raise ValueError(
            f"forking_token_format={forking_token_format!r} names the tokens "
            f"{', '.join(map(repr, names))}: they must differ and have no white space around them, "
            f"as in {DEFAULT_FORMAT!r}"
        )
    return names


def find_thinking_opener(processing_class: ProcessingClass) -> str:
    """Return the text with which the chat template begins reasoning.

    Raises:
        ValueError: if neither the template nor the vocabulary has it.
    """
    try:
        template = Template(processing_class, None, None)
    except ChatFormatError:  # without a template prompts are text
        text, opener = "", THINK_OPEN
    else:
        text, opener = template.text, family_of(template).thinking_opener
    if opener in text or opener in tokenizer_of(processing_class).get_vocab():
        return opener
    raise ValueError(
        f"the chat template has no thinking opener {opener!r} that a forking token could replace, "
        "and it is no token of the vocabulary either. Set thinking_opener to the text with which "
        "reasoning begins, or to '' if nothing is to be replaced: the forking token then stands "
        "between the prompt and the completion"
    )


def forking_token_ids(tokenizer: PreTrainedTokenizerBase, names: list[str]) -> list[int]:
    """Return the id of each forking token.

    Raises:
        ValueError: if the tokenizer splits one into several ids, or takes it for ordinary text.
    """
    ids = []
    for name in names:
        found = tokenizer(name, add_special_tokens=False)["input_ids"]
        if len(found) != 1:
            raise ValueError(
                f"the tokenizer splits the forking token {name!r} into {len(found)} ids {found}, "
                "expected one: add it with onepass_trl.setsft.add_forking_tokens, or load the "
                "tokenizer that was saved with the model"
            )
        token = tokenizer.added_tokens_decoder.get(found[0])
        if token is None or token.content != name:
            raise ValueError(
                f"the forking token {name!r} is ordinary or unknown text to the tokenizer (id "
                f"{found[0]}), which may merge with its neighbours; expected a token that was "
                "added to it: add it with onepass_trl.setsft.add_forking_tokens, or choose another "
                f"forking_token_format, such as {DEFAULT_FORMAT!r}"
            )
        ids += found
    return ids


def add_forking_tokens(
    model: PreTrainedModel,
    tokenizer: ProcessingClass,
    num_forking_tokens: int,
    *,
    forking_token_format: str = DEFAULT_FORMAT,
    thinking_opener: str | None = None,
    noise: float = 0.0,
    seed: int = 0,
) -> list[int]:
    """Return the ids of the forking tokens, having added those that the tokenizer lacks.

    A new token becomes a special token. Its input and output embeddings are those of the thinking
    opener (the mean of its tokens, where it has several), and the model's grow where they have none
    for it. Tokens that exist are left as they are.

    Args:
        model: a causal language model, changed in place; not yet wrapped by PEFT.
        tokenizer: its tokenizer or processor, changed in place.
        num_forking_tokens: K.
        forking_token_format: their names, with ``{i}`` for the number from 1.
        thinking_opener: the text whose embeddings they start from. None: the template's own; "":
            the mean of all embeddings.
        noise: standard deviation of what is added to a new token's input embedding, relative to
            its root mean square: equal ones could not be told apart by the first matching.
        seed: of that noise.

    Raises:
        ValueError: if a name is no single token, there is no thinking opener, or tokens are missing
            from a model that can't grow.
    """
    names = forking_tokens(num_forking_tokens, forking_token_format)
    if thinking_opener is None:
        thinking_opener = find_thinking_opener(tokenizer)
    tokenizer = tokenizer_of(tokenizer)
    if thinking_opener in names:
        raise ValueError(
            f"thinking_opener {thinking_opener!r} is itself a forking token; choose another "
            "forking_token_format"
        )
    missing = [name for name in names if name not in tokenizer.get_vocab()]
    if missing:
        _check_can_grow(model, missing)
        _add_to_tokenizer(tokenizer, missing)
    ids = forking_token_ids(tokenizer, names)
    num_embeddings = model.get_input_embeddings().weight.shape[0]
    if max(ids) >= num_embeddings:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    new = [
        id_
        for id_, name in zip(ids, names, strict=True)
        if name in missing or id_ >= num_embeddings
    ]
    if new:
        source = tokenizer(thinking_opener, add_special_tokens=False)["input_ids"]
        _initialize(model, new, source or list(range(min(num_embeddings, min(new)))), noise, seed)
        logger.info(
            "new forking tokens %s, which start from %s",
            ", ".join(tokenizer.convert_ids_to_tokens(new)),
            repr(thinking_opener) if thinking_opener else "the mean of all tokens",
        )
    return ids


def _add_to_tokenizer(tokenizer: PreTrainedTokenizerBase, names: list[str]) -> None:
    tokens = [AddedToken(name, special=True, normalized=False) for name in names]
    tokenizer.add_tokens(tokens, special_tokens=True)


def _check_can_grow(model: PreTrainedModel, missing: list[str]) -> None:
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    problem = None
    if hasattr(model, "peft_config"):
        problem = "the model is wrapped by PEFT already. Give the trainer the base model and a "
        problem += "peft_config"
    elif is_deepspeed_zero3_enabled():
        problem = "ZeRO-3 has cut up the embeddings. Add the tokens beforehand in one process"
    if problem:
        raise ValueError(
            f"the forking tokens {', '.join(missing)} are not in the tokenizer and can't be added: "
            f"{problem}, or call onepass_trl.setsft.add_forking_tokens(model, tokenizer, ..) first "
            "and save both"
        )


def _initialize(
    model: PreTrainedModel, new: list[int], source: list[int], noise: float, seed: int
) -> None:
    """Set the embeddings of the tokens `new` to the mean of those of `source`, plus noise."""
    generator = torch.Generator().manual_seed(seed)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    with torch.no_grad():
        if head is not None and head.weight is not embeddings.weight:
            head.weight[new] = head.weight[source].mean(dim=0)
            if getattr(head, "bias", None) is not None:
                head.bias[new] = head.bias[source].mean()
        start = embeddings.weight[source].float().mean(dim=0)
        draws = torch.randn((len(new), start.numel()), generator=generator).to(start.device)
        scale = noise * start.square().mean().sqrt()
        embeddings.weight[new] = (start + scale * draws).to(embeddings.weight.dtype)
