"""How answers to known chat templates are parsed, as TRL has it."""

from __future__ import annotations

import functools
from types import SimpleNamespace

from transformers.utils.chat_parsing.response_templates import (
    ResponseTemplate,
    load_response_template,
)
from trl.chat_template_utils import add_response_schema


@functools.lru_cache(maxsize=8)
def trl_response_template(template: str) -> ResponseTemplate | None:
    """Return TRL's response template for a chat template, by its Jinja source; None if unknown."""
    # TRL knows templates by their text and sets the attribute; the user's tokenizer is left alone.
    stand_in = SimpleNamespace(chat_template=template)
    try:
        return load_response_template(add_response_schema(stand_in).response_template)
    except ValueError:
        return None
