"""Results on the Hugging Face hub. The token comes from the environment, and goes nowhere but to the hub."""

import os
from pathlib import Path

from equipoise.errors import EquipoiseError, InputError

TOKEN = "HF_TOKEN"


def token() -> str:
    """Raises InputError where the environment has none: files and caches are not searched for another."""
    if found := os.environ.get(TOKEN, "").strip():
        return found
    raise InputError(
        f"--push-to-hub: needs a token with write access in the environment variable {TOKEN}; "
        "https://huggingface.co/settings/tokens makes one."
    )


def push(folder: Path, repo: str, private: bool, message: str) -> str:
    """Uploads a folder as a model repository, which is made if it is not there; returns its address.

    Args:
        folder: what it is to hold; files that it has besides stay.
        repo: "owner/name", or a name alone for the token's owner.
        private: whether a new repository is visible to its owner alone.
        message: of the commit.

    Raises:
        InputError: there is no token, or the repository's name is none.
        EquipoiseError: the hub refused, or did not answer.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import disable_progress_bars

    secret = token()
    disable_progress_bars()
    hub = HfApi(token=secret)
    try:
        made = hub.create_repo(repo, private=private or None, exist_ok=True)
        hub.upload_folder(folder_path=folder, repo_id=made.repo_id, commit_message=message)
    except HFValidationError as error:
        raise InputError(f"--push-to-hub: {repo}: {_reason(error, secret)}") from None
    except Exception as error:  # of the hub's client, the HTTP client below it, or the upload's library
        raise EquipoiseError(
            f"--push-to-hub: {repo}: {hub.endpoint} did not take it: {_reason(error, secret)}"
        ) from None
    return str(made)


def _reason(error: Exception, secret: str) -> str:
    return " ".join(str(error).replace(secret, "…").split())[:300]
