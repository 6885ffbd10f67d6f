"""How differently a model answers after its forking tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from itertools import combinations, takewhile
from math import log
from typing import Any

import torch
from transformers import GenerationConfig, TrainerCallback

from onepass_trl.chat.processing import tokenizer_of
from onepass_trl.setsft.rendering import forking_prompts


def mutual_information(pairs: Sequence[tuple[Hashable, Hashable]]) -> float:
    """Return the mutual information, in nats, of the two members of the pairs as they were counted.

    0: the forking token says nothing of the way in which it was answered. ``log(K)``: each of K
    tokens, equally often used, has a way of its own.

    >>> round(mutual_information([("a", 1), ("b", 2)]), 4), mutual_information([("a", 1), ("b", 1)])
    (0.6931, 0.0)
    """
    joint, total = Counter(pairs), len(pairs)
    first, second = Counter(a for a, _ in pairs), Counter(b for _, b in pairs)
    return sum(
        count / total * log(count * total / (first[a] * second[b]))
        for (a, b), count in joint.items()
    )


def distance(a: Sequence[int], b: Sequence[int]) -> float:
    """Return the share of token bigrams that occur in only one of two completions: 0 to 1.

    The first token counts as a bigram with the beginning of the text.

    >>> distance([1, 2, 3], [1, 2, 4])
    0.5
    """
    first, second = (set(zip([None, *ids], ids, strict=False)) for ids in (a, b))
    union = first | second
    return len(first ^ second) / len(union) if union else 0.0


class ForkingDiversityCallback(TrainerCallback):
    """Reports at each evaluation how differently the model answers after its forking tokens.

    It generates one completion for each held-out prompt and forking token, greedily, and logs

    - ``eval_diversity_1`` to ``eval_diversity_K``: the mean `distance` of the completions after a
      token to those after the others, on the same prompt; and ``eval_diversity``, their mean
    - ``eval_distinct_completions``: the mean share of completions of a prompt that differ
    - ``eval_mutual_information``: with `classify`, the `mutual_information` in nats between token
      and class

    Args:
        trainer: the `SetSFTTrainer`; add the callback to it with ``trainer.add_callback``.
        prompts: messages, or texts, of questions that aren't trained.
        max_new_tokens: length of a completion, at most.
        classify: takes a prompt and the text of its completion and returns the completion's class,
            such as the method of solution.

    Raises:
        ValueError: if there are no prompts.
    """

    def __init__(
        self,
        trainer: Any,
        prompts: Sequence[Any],
        *,
        max_new_tokens: int = 256,
        classify: Callable[[Any, str], Hashable] | None = None,
    ) -> None:
        if len(prompts) == 0:
            raise ValueError("prompts is empty: diversity is measured on at least one prompt")
        self._trainer = trainer
        self._prompts = prompts
        self._max_new_tokens = max_new_tokens
        self._classify = classify

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure and log."""
        self._trainer.log(self.measure())

    def measure(self) -> dict[str, float]:
        """Return the metrics that are logged, of the model as it is."""
        trainer, config = self._trainer, self._trainer.args
        model = trainer.model
        tokenizer = tokenizer_of(trainer.processing_class)
        num_tokens = config.num_forking_tokens
        distances: list[list[float]] = [[] for _ in range(num_tokens)]
        distinct = 0.0
        classes: list[tuple[Hashable, Hashable]] = []
        for prompt in self._prompts:
            prompts = forking_prompts(
                prompt,
                trainer.processing_class,
                num_tokens,
                forking_token_format=config.forking_token_format,
                thinking_opener=config.thinking_opener,
                chat_template_kwargs=config.template_arguments,
            )
            completions = generate(model, prompts, tokenizer, self._max_new_tokens)
            distinct += len(set(map(tuple, completions))) / num_tokens
            for a, b in combinations(range(num_tokens), 2):
                apart = distance(completions[a], completions[b])
                distances[a].append(apart)
                distances[b].append(apart)
            if self._classify is not None:
                texts = tokenizer.batch_decode(completions, skip_special_tokens=True)
                classes += [(i, self._classify(prompt, text)) for i, text in enumerate(texts)]
        means = [sum(values) / max(len(values), 1) for values in distances]
        metrics = {f"eval_diversity_{i}": mean for i, mean in enumerate(means, start=1)}
        metrics["eval_diversity"] = sum(means) / num_tokens
        metrics["eval_distinct_completions"] = distinct / len(self._prompts)
        if self._classify is not None:
            metrics["eval_mutual_information"] = mutual_information(classes)
        return metrics


@torch.no_grad()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    tokenizer: Any,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
) -> list[list[int]]:
    """Return a completion of each prompt, as ids without the token that ends it.

    Args:
        model: a causal language model, which is in evaluation mode meanwhile.
        prompts: token ids.
        tokenizer: for its padding and end-of-sequence tokens; those of the model's generation
            configuration end a completion, too.
        max_new_tokens: length of a completion, at most.
        temperature: of sampling; 0 takes the likeliest token.
    """
    length = max(map(len, prompts))
    pad, ends = tokenizer.pad_token_id, _end_ids(model, tokenizer)
    padded = torch.tensor([[pad] * (length - len(ids)) + list(ids) for ids in prompts])
    mask = torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids in prompts])
    was_training = model.training
    model.eval()
    try:
        output = model.generate(
            input_ids=padded.to(model.device),
            attention_mask=mask.to(model.device),
            generation_config=GenerationConfig(
                max_new_tokens=max_new_tokens,
                do_sample=temperature > 0,
                temperature=temperature or None,
                use_cache=True,
                pad_token_id=pad,
                eos_token_id=ends,
            ),
        )
    finally:
        model.train(was_training)
    completions = output[:, length:].tolist()
    return [list(takewhile(lambda token: token not in ends, ids)) for ids in completions]


def _end_ids(model: Any, tokenizer: Any) -> list[int]:
    """Return the tokens that end a turn: the tokenizer's, and those with which the model stops."""
    own = model.generation_config.eos_token_id
    of_model = own if isinstance(own, list) else [own]
    return sorted({token for token in (tokenizer.eos_token_id, *of_model) if token is not None})
