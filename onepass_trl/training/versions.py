"""The oldest packages that the trainer works with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

OLDEST = {
    "trl": "1.16.0",
    "transformers": "5.23.0",
    "accelerate": "1.15.0",
    "datasets": "5.2.0",
}


def check_versions() -> None:
    """Raise ImportError if one of the packages is missing or older than supported.

    The message names every package that has to be installed or upgraded.
    """
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
        raise ImportError(
            f"OnePassSFTTrainer needs newer packages: {found}. Run: pip install {needed}"
        )
