"""LoRA files of the Hugging Face hub, by a reference `hub:OWNER/NAME` or `hub:OWNER/NAME/FILE.safetensors`."""

import re
from pathlib import Path

from equipoise.errors import InputError

SIGN = "hub:"
DEFAULT = "pytorch_lora_weights.safetensors"  # as diffusers and Equipoise call them
_REFERENCE = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:/((?:[\w][\w. -]*/)*[\w][\w. -]*\.safetensors))?")
_CACHED = re.compile(r".*/models--([^/]+)--([^/]+)/snapshots/.*")


def parse(reference: str) -> tuple[str, str]:
    """A reference's repository and file.

    Raises:
        InputError: it is none.
    """
    found = _REFERENCE.fullmatch(reference.removeprefix(SIGN))
    if not found or ".." in reference:
        raise InputError(
            f"{reference[:200]!r}: a file of the hub is written OWNER/NAME or OWNER/NAME/FILE.safetensors."
        )
    return found[1], found[2] or DEFAULT


def fetch(reference: str) -> Path:
    """The file in the hub's cache on this machine, downloaded if it is not there yet.

    Raises:
        InputError: the reference is none, or the hub gave no such file.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    repository, name = parse(reference)
    if isinstance(known := try_to_load_from_cache(repository, name), str):
        return Path(known)
    try:
        return Path(hf_hub_download(repository, name))
    except Exception as error:  # OSError, ValueError, or the HTTP client's own, whichever that is
        reason = " ".join(str(error).split()).split(". ")[0]
        raise InputError(
            f"{SIGN}{repository}: the hub gave no {name} ({reason}). Check the spelling and the connection, or name "
            "the file: OWNER/NAME/FILE.safetensors."
        ) from None


def repository_of(file: Path) -> str:
    """The repository of a file in the hub's cache; "" of any other file."""
    found = _CACHED.fullmatch(file.as_posix())
    return f"{found[1]}/{found[2]}" if found else ""
