"""Model folders on the Hugging Face Hub."""

from pathlib import Path

from pyqemb.data.machine import raise_if_machine
from pyqemb.errors import ConfigError

_WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]


def check_push(repo_id: str, token: str | None = None) -> None:
    """Check whether a model can be pushed to `repo_id`, without using the network.

    Raises:
        ConfigError: the id is not ORG/NAME, or there is no token.
    """
    from huggingface_hub import get_token
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ConfigError(f"{repo_id}: not an id of a model on the hub: {error}") from error
    if repo_id.count("/") != 1:
        raise ConfigError(f"{repo_id}: expected an id of the hub, ORG/NAME")
    if token is None and get_token() is None:
        raise ConfigError(f"{repo_id}: pushing to the hub needs a token: hf auth login, or HF_TOKEN")


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    token: str | None = None,
) -> str:
    """Upload a model folder to the Hugging Face Hub, in one commit.

    Weights of the repository that the folder does not have are deleted, so that the repository never mixes two models.

    Args:
        folder: the model folder.
        repo_id: the repository, "ORG/NAME"; it is created if it does not exist.
        private: whether a new repository is private (default: the default of the account or organization).
        revision: the branch (default: main).
        commit_message: the message of the commit (default: "Upload model").
        token: a token with write access (default: that of `hf auth login` or HF_TOKEN).

    Returns:
        The URL of the commit.

    Raises:
        ConfigError: `repo_id` is not an id, there is no token, or the hub rejects the upload.
        MachineError: the network or the disk fails.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    check_push(repo_id, token)
    api = HfApi(token=token)
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message=commit_message or "Upload model",
            delete_patterns=_WEIGHTS,
        )  # fmt: skip
    except (HfHubHTTPError, OSError) as error:
        raise_if_machine(repo_id, error)
        raise ConfigError(f"{repo_id}: the hub refused the upload: {error}") from error
    return str(commit.commit_url)
