"""The trained model on the Hugging Face hub: asked for before anything is loaded, pushed when all is written.

The repository is made at the start, so that what is not allowed is said before a run's hours, not after them. A push
that fails loses nothing: the run's folder is whole by then, and the same command pushes again without training.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from distill.config import TrainingConfig

if TYPE_CHECKING:
    from huggingface_hub import HfApi

KEY = "training.hub_id"


class HubError(ValueError):
    """A repository that cannot be pushed to, with the reason and the way out."""


def prepare_repository(training: TrainingConfig) -> None:
    """Makes the repository that `training.hub_id` names, if it is not there. Raises `HubError`."""
    name, private = training.hub_id, training.hub_private
    from huggingface_hub import constants  # which takes a part of a second, and few runs

    if constants.is_offline_mode():
        raise HubError(f"{KEY}: {name} cannot be pushed to, as HF_HUB_OFFLINE is set: unset it, or leave {KEY} out")
    with _asking("the run has not begun; leave it out to run without") as api:
        account = api.whoami()["name"]
        api.create_repo(name, private=private, exist_ok=True)
        if private and not api.model_info(name).private:
            raise HubError(
                f"{KEY}: {name} is there and public, and training.hub_private is true: set it to false, or take "
                f"another name (you are {account})"
            )


def push(name: str, folder: Path, message: str) -> str:
    """Uploads a folder as one commit; returns where it is then. Raises `HubError`."""
    remedy = (
        f"the run itself is done and whole, its model is {folder}: give the same command again, which only pushes, or: "
        f"hf upload {name} {folder}"
    )
    with _asking(remedy) as api:
        found = api.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
    return str(found.repo_url)


@contextlib.contextmanager
def _asking(remedy: str) -> Iterator["HfApi"]:
    """Turns what the hub's library raises, which has no common class, into a `HubError`."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import LocalTokenNotFoundError

    api = HfApi(library_name="distill-on-policy")
    try:
        yield api
    except HubError:
        raise
    except LocalTokenNotFoundError:
        raise HubError(f"{KEY}: nobody is logged in to {api.endpoint}: run `hf auth login` or set HF_TOKEN") from None
    except Exception as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        hint = "; does the token allow writing there?" if status in (401, 403) else ""
        reason = " ".join(str(error.__cause__ or error).split())[:400]
        raise HubError(f"{KEY}: {api.endpoint}: {type(error).__name__}: {reason}{hint}; {remedy}") from None
