"""Write a run in another library's format: whole, checked there, with a card; or refuse with the reason.

An export on the Hugging Face hub.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedcache.errors import CorruptError, PathError, SettingError
from embedcache.export.base import Run, Written
from embedcache.export.card import write_card
from embedcache.files import building, remove_folder
from embedcache.projectors.saved import config_path
from embedcache.provenance import check_same, digest, digest_file, read_json, read_manifest, write_json
from embedcache.registry import Registry

FORMAT_VERSION = 1
RECORD, CARD = "embedcache_export.json", "README.md"

FORMS = Registry(
    "export format",
    {
        "onnx": "embedcache.export.onnx:write_onnx",
        "open-clip": "embedcache.export.open_clip:write_open_clip",
        "safetensors": "embedcache.export.safetensors:write_safetensors",
        "sentence-transformers": "embedcache.export.sentence_transformers:write_sentence_transformers",
        "transformers": "embedcache.export.transformers:write_transformers",
    },
)
"""Each is a function of a run, a folder to fill, and options: `write(run, folder, **options) -> Written`."""


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What came out.

    Args:
        differences: what was compared in the other library -> the largest difference in one number.
        url: where it was pushed to; None: it was not.
        is_new: whether it was written now; else it was there already.
    """

    differences: Mapping[str, float]
    url: str | None
    is_new: bool


def export(
    form: str,
    run_path: Path,
    folder: Path,
    *,
    metrics: Path | None = None,
    push_to: str | None = None,
    is_public: bool = False,
    **options: Any,
) -> Exported:
    """Export a run, and push it where asked.

    An export of the same run with the same options that is there already is used again, once its files have been found
    unchanged; its card may have been edited.

    Args:
        form: a name in `FORMS`.
        run_path: the run.
        folder: where it goes; it must be empty, or not there, or hold that export.
        metrics: a JSON file of `embedcache evaluate`, for the card.
        push_to: `OWNER/NAME` on the Hugging Face hub.
        is_public: whether a repository that is made for it can be seen by all.
        options: the format's own.

    Raises:
        UnknownNameError: there is no such format.
        PathError: there is no such run, or something else is in the folder, or the hub does not take it.
        SettingError: the format cannot hold the run; says why.
        FingerprintError: the folder holds an export of another run or of other options.
        CorruptError: a file of the export that is there was changed.
        ArtifactError: the other library computes other vectors.
        MissingExtraError: that library is not installed.
    """
    write = FORMS.load(form)
    if push_to is not None:
        check_repository(push_to)
    run = Run.open(run_path)
    figures = None if metrics is None else read_json(metrics)
    if form == "open-clip":  # its config names the folder, or the repository, that it lies in
        options = {**options, "final": str(folder.absolute()), "hub_name": push_to}
    asked = {"form": form, "run": digest(read_json(config_path(run_path))), "metrics": digest(figures), **options}
    differences, is_new = _again(folder, asked), False
    if differences is None:
        differences, is_new = _write(write, run, folder, asked, figures, options), True
    url = None if push_to is None else push(folder, push_to, is_public=is_public)
    return Exported(differences=differences, url=url, is_new=is_new)


def _write(
    write: Callable[..., Written],
    run: Run,
    folder: Path,
    asked: Mapping[str, Any],
    figures: Any,
    options: Mapping[str, Any],
) -> Mapping[str, float]:
    with building(folder) as temporary:
        written = write(run, temporary, **options)
        for cached in temporary.rglob("__pycache__"):
            remove_folder(cached)
        write_card(temporary / CARD, run, written, str(asked["form"]), figures)
        files = sorted(path for path in temporary.rglob("*") if path.is_file() and path.name != CARD)
        record = {
            "format": FORMAT_VERSION,
            **asked,
            "differences": dict(written.differences),
            "files": {str(path.relative_to(temporary)): digest_file(path) for path in files},
        }
        write_json(temporary / RECORD, record)
    return written.differences


def _again(folder: Path, asked: Mapping[str, Any]) -> Mapping[str, float] | None:
    """Get the differences of the export that is there; None where there is nothing."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return None
    if not (folder / RECORD).is_file():
        what = "is no export and not empty" if folder.is_dir() else "is a file"
        raise PathError(f"{folder} {what}; give the path of a new folder")
    record = read_manifest(folder / RECORD, kind="export", latest_format=FORMAT_VERSION, make="embedcache export")
    found = {name: record.get(name) for name in record if name not in ("format", "differences", "files")}
    check_same(f"the export {folder}", found, asked, next_step="give the path of a new folder")
    for name, sha in record["files"].items():
        if not (folder / name).is_file() or digest_file(folder / name) != sha:
            raise CorruptError(f"{folder / name} is missing or was changed after the export; give a new folder")
    differences: Mapping[str, float] = record["differences"]
    return differences


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
