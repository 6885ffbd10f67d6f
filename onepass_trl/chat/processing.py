"""Tokenizers and processors: what a processor is given for wherever a tokenizer is needed.

A natively multimodal model has a processor: a tokenizer, what prepares images and the like, and the
chat template, which may differ from the tokenizer's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

ProcessingClass: TypeAlias = "PreTrainedTokenizerBase | ProcessorMixin"
"""A tokenizer, or a processor that has one; transformers' and TRL's word for either."""

TEMPLATE_SUFFIXES = (".jinja", ".j2")
_PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")


def tokenizer_of(processing_class: ProcessingClass) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a processor, or the tokenizer itself.

    Raises:
        ValueError: it is neither a tokenizer nor a processor that has one.
    """
    from transformers import PreTrainedTokenizerBase

    if isinstance(processing_class, PreTrainedTokenizerBase):
        return processing_class
    tokenizer = getattr(processing_class, "tokenizer", None)
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ValueError(
            f"{type(processing_class).__name__} has no tokenizer, expected a tokenizer or a "
            "processor that has one: conversations are text"
        )
    return tokenizer


def chat_templates(processing_class: ProcessingClass) -> str | dict[str, str] | None:
    """Return the chat template, or several by name; a processor's before its tokenizer's."""
    own = getattr(processing_class, "chat_template", None)
    return tokenizer_of(processing_class).chat_template if own is None else own


def find_chat_template(
    processing_class: ProcessingClass, chosen: str | None, tools: Sequence[Any] | None
) -> str:
    """Return the Jinja source of the chat template that ``apply_chat_template`` uses.

    Args:
        processing_class: a tokenizer or processor.
        chosen: a name among its templates, a template, or None for its default.
        tools: a tokenizer may have a template of its own for them.

    Raises:
        ValueError: if there is none, or several and no default.
    """
    tokenizer, templates = tokenizer_of(processing_class), chat_templates(processing_class)
    if templates is tokenizer.chat_template:
        return tokenizer.get_chat_template(chosen, tools=None if tools is None else list(tools))
    if not isinstance(templates, dict):
        return chosen or templates or ""
    if chosen is None and "default" not in templates:
        raise ValueError(
            f"the processor has the templates {', '.join(templates)}, none of them the default: "
            "choose one with chat_template_kwargs={'chat_template': name}"
        )
    return templates.get(chosen or "default", chosen or "")


def check_template_source(path: str | None, processing_class: ProcessingClass) -> None:
    """Raise for a file of a template that can't be read, and for what a processor can't be given.

    TRL would take the file for the name of a tokenizer, and its ``clone_chat_template``, which
    takes another tokenizer's template with its tokens, knows tokenizers only.

    Raises:
        OSError: there is no such file, or it may not be read.
        ValueError: the file isn't text, or a processor is to get a tokenizer's template.
    """
    if path is None:
        return
    if path.endswith(TEMPLATE_SUFFIXES):
        try:
            Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"the chat template {path} is not text in UTF-8: {error}") from None
        return
    if tokenizer_of(processing_class) is not processing_class:
        raise ValueError(
            f"chat_template_path={path!r} names a tokenizer, whose template and tokens a "
            f"{type(processing_class).__name__} can't be given: give the template as a .jinja file"
        )


def start_of_prompts(processing_class: ProcessingClass) -> str:
    """Return the text that inference puts before a prompt which doesn't begin with it, "" if none.

    Of a conversation a tokenizer encodes what the template writes. A processor, as a rule, adds the
    beginning-of-sequence token unless the template has written it.

    Raises:
        ValueError: the processor's tokenizer adds something else.
    """
    tokenizer = tokenizer_of(processing_class)
    if tokenizer is processing_class:
        return ""
    start, text = tokenizer.bos_token or "", "a"
    ids = list(map(int, processing_class(text=[text])["input_ids"][0]))
    for before in ("", start):
        if ids == tokenizer(before + text, add_special_tokens=False)["input_ids"]:
            return before
    raise ValueError(
        f"the processor encodes 'a' as {tokenizer.decode(ids)!r}: it adds more than a "
        f"beginning-of-sequence token ({start!r}) to every prompt, so no turn could follow it. "
        "Configure its tokenizer not to, or pass the tokenizer instead"
    )


def load_processing_class(model: str, **kwargs: Any) -> ProcessingClass:
    """Return a model's processor, or its tokenizer if it has no files of a processor.

    Args:
        model: its name on the Hub, or a folder.
        **kwargs: further arguments of ``from_pretrained``, such as ``revision``.

    Raises:
        MissingTorchvisionError: the processor can't be made without torchvision.
    """
    from transformers import AutoProcessor, AutoTokenizer
    from transformers.utils import cached_file, is_torchvision_available

    revision = {key: kwargs[key] for key in ("revision",) if key in kwargs}
    files = (
        cached_file(
            model,
            name,
            **revision,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        for name in _PROCESSOR_FILES
    )
    if not any(files):
        return AutoTokenizer.from_pretrained(model, **kwargs)
    try:
        return AutoProcessor.from_pretrained(model, **kwargs)
    except (AttributeError, ImportError, ValueError) as error:  # which depends on the processor
        is_another = isinstance(error, ValueError) and "torchvision" not in str(error)
        if is_another or is_torchvision_available():
            raise
        raise MissingTorchvisionError(
            f"the processor of {model} needs torchvision, which isn't installed: pip install "
            "torchvision"
        ) from error


class MissingTorchvisionError(ValueError):
    """A processor can't be made without torchvision."""
