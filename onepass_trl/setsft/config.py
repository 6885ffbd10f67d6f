"""`SetSFTConfig`: `OnePassSFTConfig` and what set supervised fine-tuning adds to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from onepass_trl.setsft.matching import METHODS, REDUCTIONS
from onepass_trl.setsft.preparation import EXCESS_POLICIES
from onepass_trl.setsft.tokens import DEFAULT_FORMAT, forking_tokens
from onepass_trl.training import OnePassSFTConfig
from onepass_trl.training.config import option


@dataclass
class SetSFTConfig(OnePassSFTConfig):
    """Configuration of `SetSFTTrainer`.

    Every option of `OnePassSFTConfig` keeps its meaning, ``overflow`` for each trace; ``train_on``
    has none, as the completions are what is trained. These are added.

    Parameters:
        num_forking_tokens: K, the number of forking tokens.
        forking_token_format: their names, with ``{i}`` for the number from 1. Tokens that the
            tokenizer has are used as they are; the others are added to it and to the model, with
            the embeddings of the thinking opener. Under PEFT these are trained.
        forking_token_noise: standard deviation of the noise on the input embedding of an added
            token, relative to the embedding's root mean square.
        thinking_opener: the text with which reasoning begins and which the forking token replaces.
            None: the chat template's own, such as ``<think>``. "": nothing is replaced, the
            forking token is put between prompt and completion.
        matching: how the traces of a question get their forking tokens: ``"hungarian"`` (least
            total loss), ``"random"`` (drawn again at each step) or ``"fixed"`` (completion j gets
            token j). The last two are baselines and compute no costs.
        matching_tokens: how many tokens of a trace count for its cost, from the beginning of
            the reasoning. None: all.
        matching_reduction: whether the cost of a trace is the ``"mean"`` or the ``"sum"`` of the
            losses of those tokens.
        matching_batch: the most (forking token, trace) pairs that one forward of the matching
            scores. None: as many as fit into 32,768 tokens, ``max_length``, or twice the tokens
            of the rows that the batch trains, whichever is most. Lower it if matching runs out of
            memory.
        excess_traces: what happens to a question with more traces than forking tokens:
            ``"error"``, or ``"split"``: its traces are cut into groups of K that are matched by
            themselves. No trace is left out.

    Raises:
        ValueError: for an option that has no such value, or no meaning here.
    """

    _LEAST: ClassVar[dict[str, float]] = {
        **OnePassSFTConfig._LEAST,
        "forking_token_noise": 0,
        "matching_tokens": 1,
        "matching_batch": 1,
    }

    num_forking_tokens: int = option(6, "Number of forking tokens, at least one per trace.")
    forking_token_format: str = option(
        DEFAULT_FORMAT, "Names of the forking tokens, {i} being the number from 1."
    )
    forking_token_noise: float = option(
        0.1, "Relative noise on the embeddings of added forking tokens."
    )
    thinking_opener: str | None = option(
        None,
        "Text that the forking token replaces; by default the chat template's, such as <think>; "
        "'' replaces nothing.",
    )
    matching: str = option("hungarian", "How traces get their forking tokens.", METHODS)
    matching_tokens: int | None = option(
        None, "How many tokens of a trace count for its cost; by default all."
    )
    matching_reduction: str = option(
        "mean", "How the losses of a trace become its cost.", REDUCTIONS
    )
    matching_batch: int | None = option(
        None,
        "Most (forking token, trace) pairs in one forward; by default as many as fit into 32,768 "
        "tokens, max_length, or twice those of the rows it trains.",
    )
    excess_traces: str = option(
        "error",
        "What to do with a question that has more traces than forking tokens.",
        EXCESS_POLICIES,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        forking_tokens(self.num_forking_tokens, self.forking_token_format)
        if self.invalid_turns != "error":
            raise ValueError(
                f"invalid_turns={self.invalid_turns!r} leaves out turns of conversations; a set "
                "without one of its traces is another set. Leave invalid_turns unset, and remove "
                "what the error names"
            )
        if self.completion_only_loss is False:
            raise ValueError(
                "completion_only_loss=False asks for a loss on the question too; set fine-tuning "
                "trains the completions. Leave completion_only_loss unset"
            )
        if self.train_on != "all":
            raise ValueError(
                f"train_on={self.train_on!r} chooses among the turns of a conversation, but set "
                "fine-tuning trains the completions. Leave train_on unset, and put earlier turns "
                "into 'prompt'"
            )
