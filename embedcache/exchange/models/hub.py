"""An export on the Hugging Face hub."""

import re
from pathlib import Path

from embedcache.errors import PathError, SettingError

_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def check_repository(name: str) -> None:
    """Refuse what is no name of a repository.

    Raises:
        SettingError: says how one is written.
    """
    if not _REPOSITORY.fullmatch(name):
        raise SettingError(f"{name!r} names no repository of the hub; write OWNER/NAME, of letters, digits, - _ and .")


def push(folder: Path, name: str, *, is_public: bool) -> str:
    """Upload a folder, as one commit, and give its URL.

    A repository that is not there is made, private unless asked otherwise; one that is there stays as visible as it is.

    Args:
        folder: the export.
        name: `OWNER/NAME`.
        is_public: whether a new repository can be seen by all.

    Raises:
        PathError: the hub can't be reached, or does not let this user write there. The export stays where it is.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    api = HfApi()
    try:
        url = api.create_repo(name, private=not is_public, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Export a trained pair with embedcache")
    except (HfHubHTTPError, OfflineModeIsEnabled, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PathError(
            f"{name} can't be pushed to: {reason}; the export is in {folder}: run `hf auth login`, check the name and "
            "the network, and run the same command again"
        ) from error
    return str(url)
