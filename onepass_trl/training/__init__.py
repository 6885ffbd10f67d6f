"""TRL's ``SFTTrainer`` and ``SFTConfig``, trained one pass per conversation."""

from onepass_trl.versions import check_versions

check_versions()

from onepass_trl.training.config import OnePassSFTConfig  # noqa: E402 (older packages lack names)
from onepass_trl.training.trainer import OnePassSFTTrainer  # noqa: E402

__all__ = ["OnePassSFTConfig", "OnePassSFTTrainer"]
