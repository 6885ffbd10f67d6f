"""Warnings of TRL that are wrong for trees."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from onepass_trl import versions

_ADVICE = "are known to reliably support this"


@contextmanager
def no_flash_attention_advice() -> Iterator[None]:
    """Keep ``SFTTrainer`` from saying that packed rows need FlashAttention.

    ``visible_end`` separates the rows here, whatever computes the attention.
    """
    if versions.NO_FLASH_ATTENTION_ADVICE.installed:
        yield
        return
    logger = logging.getLogger("trl.trainer.sft_trainer")
    logger.addFilter(_is_other)
    try:
        yield
    finally:
        logger.removeFilter(_is_other)


def _is_other(record: logging.LogRecord) -> bool:
    return _ADVICE not in record.getMessage()
