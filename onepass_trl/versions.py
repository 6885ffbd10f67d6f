"""Which versions of other packages work, and from which on they have what older ones lack.

Code that differs with a version asks here, so that this file says what each of them is for. When
`OLDEST` passes a version below, what it names can go, and with it the code for older packages.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import NamedTuple

from packaging.version import Version

OLDEST = {
    "torch": "2.11",  # its stable ABI, for which the kernels are built
    "transformers": "5.16.1",
    "trl": "1.9.2",
    "accelerate": "1.13",  # an Accelerator whose parallelism was configured before
    "datasets": "4.7",  # TRL's own floor
}
"""What the package needs, as ``pyproject.toml`` asks for it."""

TESTED = {"torch": "2.14", "transformers": "5.24", "trl": "1.16"}
"""The newest that the tests have run with. Newer ones are neither refused nor warned of."""


class Since(NamedTuple):
    """What a package has from a version on."""

    package: str
    version: str

    @property
    def installed(self) -> bool:
        """Whether the installed package has it."""
        return Version(version(self.package)) >= Version(self.version)


class Between(NamedTuple):
    """Versions of a package whose inside is known, from the oldest up to one that is not."""

    package: str
    oldest: str
    before: str

    def __str__(self) -> str:
        return f"{self.package}>={self.oldest},<{self.before}"

    def includes(self, installed: str) -> bool:
        """Return whether a version is one of these."""
        return Version(self.oldest) <= Version(installed) < Version(self.before)


FLA = Between("flash-linear-attention", "0.6", "0.7")
"""Of these `attention.branching.fla_backend` calls kernels that are no public interface."""

FUSED_LM_HEAD = Since("trl", "1.16")
"""`add_fused_lm_head` for every device; 1.15 needs Triton. For older ones, `training.lm_head`."""

NO_FLASH_ATTENTION_ADVICE = Since("trl", "1.16")
"""`SFTTrainer` takes packed and padding-free rows with any attention. Before, it warned of
cross-contamination unless the attention was FlashAttention; see `training.trl_advice`."""

ROUTER_AUX_LOSS_COEF = Since("trl", "1.14")
"""`SFTTrainer.router_aux_loss_coef`, by default the model's. Before, only the option, 0.001."""

ACTIVATION_CHECKPOINTING = Since("transformers", "5.23")
"""The option `activation_checkpointing`. Before, it is called `gradient_checkpointing`."""

FLEX_FLASH = Since("torch", "2.13")
"""FlexAttention's backend FLASH with block masks in its backward and lse in natural logarithms."""

LAYERS_SINCE = {
    "NemotronHMamba2Mixer": Since("transformers", "5.17"),
    "FalconH1Mixer": Since("transformers", "5.17"),
    "Lfm2ShortConv": Since("transformers", "5.22"),
    "Lfm2MoeShortConv": Since("transformers", "5.22"),
}
"""Classes of layers to which their models hand what they get, `visible_end` with it. Before, these
layers would run through the row as if it were one sequence."""


def checkpointing_option() -> str:
    """Return what the option of ``SFTConfig`` for activation checkpointing is called."""
    since = ACTIVATION_CHECKPOINTING
    return "activation_checkpointing" if since.installed else "gradient_checkpointing"


class VersionError(ImportError):
    """Packages that are missing, or older than supported; the message says what to install."""


def check_versions() -> None:
    """Raise `VersionError` if one of the packages is missing or older than supported."""
    wanting = []
    for package, oldest in OLDEST.items():
        try:
            installed = version(package)
        except PackageNotFoundError:
            wanting.append((f"{package} is not installed", f"{package}>={oldest}"))
            continue
        if Version(installed) < Version(oldest):
            wanting.append((f"{package} is {installed}", f"{package}>={oldest}"))
    if wanting:
        found = ", ".join(text for text, _ in wanting)
        needed = " ".join(f"'{requirement}'" for _, requirement in wanting)
        raise VersionError(
            f"OnePassSFTTrainer needs newer packages: {found}. Run: pip install {needed}"
        )
