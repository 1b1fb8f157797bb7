"""Uploads to the Hugging Face Hub: a folder as one commit, and a cache as a dataset, in commits that resume."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embedcache.arrays import blocks
from embedcache.errors import EmbedcacheError, FingerprintError, PathError, SettingError, UnfinishedError, pluralize
from embedcache.export.settings import HubSettings, check_repository
from embedcache.files import AnyPath, is_remote
from embedcache.io_errors import io_reason, is_io_error
from embedcache.modalities import MODALITIES, count_items
from embedcache.progress import AnyProgress, to_progress
from embedcache.provenance import digest_file
from embedcache.settings import merge_settings
from embedcache.store.cache import Cache
from embedcache.store.feature import Feature
from embedcache.store.layout import INTERRUPTED_REMOVAL, info_path, read_info, removed_path, removing_path

CARD = "README.md"
_RECORDS = "records"
_PER_COMMIT = 256  # files; huggingface_hub asks about so many in one request
_MESSAGE = "Add a cache of embeddings"


@dataclass(frozen=True, kw_only=True)
class HubReport:
    """An uploaded cache.

    Args:
        url: page of the dataset.
        location: `hf://` URL of this version of the cache.
        num_files: number of its files.
        num_uploaded: number of files that the repository did not have.
    """

    url: str
    location: str
    num_files: int
    num_uploaded: int


def push_cache(
    cache_path: AnyPath,
    repository: str,
    settings: HubSettings | None = None,
    *,
    progress: AnyProgress = None,
    **options: Any,
) -> HubReport:
    """Upload a cache to a dataset of the Hub, where `hf://datasets/OWNER/NAME` opens it.

    New files are committed 256 at a time. The last commit has everything that a reader of an earlier version would
    miss or confuse: changed and removed files, the tables and `cache.json`. So each commit holds the earlier cache, or
    none, or this one. The same command resumes an interrupted upload: files that the repository has are compared by
    their hashes and left out. The raw items are not uploaded; their paths and all captions are. Memory: the names of
    the files.

    Args:
        cache_path: a local cache.
        repository: `OWNER/NAME`.
        settings: visibility, and the license for the card.
        progress: progress in files.
        options: settings by their names on the command line, which replace those of `settings`.

    Raises:
        PathError: the cache is behind a URL or holds a link, or the Hub refuses the upload or cannot be reached.
        UnfinishedError: a removal of samples was interrupted.
        FingerprintError: the repository has another cache, or this one has changed during the upload.
        SettingError: the repository has another form than `OWNER/NAME`, or has other files.
    """
    from huggingface_hub import HfApi

    settings, progress = merge_settings(HubSettings, settings, options), to_progress(progress)
    check_repository("repository", repository)
    cache, api = Cache(cache_path), HfApi()
    _check_local(cache)
    files = _files(cache.path)
    with _hub_errors(repository, f"the cache is in {cache.path}"):
        url = str(api.create_repo(repository, repo_type="dataset", private=not settings.public, exist_ok=True))
        remote = _list_files(api, repository)
        _check_same_cache(api, repository, cache, remote)
        new, changed = _find_changes(cache, files, remote)
        progress.start("uploading", len(new) + len(changed), "files")
        for block in blocks(len(new), _PER_COMMIT):
            _commit(api, repository, {name: cache.path / name for name in new[block]})
            progress.advance(len(new[block]))
        if read_info(cache.path).index_digest != cache.info.index_digest:
            raise FingerprintError(f"{cache.path}: expected no change during the upload, got new samples; run it again")
        last: dict[str, Path | bytes] = {name: cache.path / name for name in changed}
        if CARD not in remote:
            last[CARD] = _dataset_card(cache, repository, settings).encode()
        _commit(api, repository, last, removed=_removed(remote, files))
        progress.advance(len(changed))
        progress.finish()
        revision = api.repo_info(repository, repo_type="dataset").sha
    return HubReport(
        url=url,
        location=f"hf://datasets/{repository}@{revision}",
        num_files=len(files),
        num_uploaded=len(new) + len(changed),
    )


def push_folder(folder: Path, repository: str, *, is_public: bool) -> str:
    """Upload an export to the hub as one commit and return its URL; an existing repository keeps its visibility."""
    from huggingface_hub import HfApi

    api = HfApi()
    with _hub_errors(repository, f"the export is in {folder}"):
        url = api.create_repo(repository, private=not is_public, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Export a trained pair with embedcache"
        )
    return str(url)


@contextmanager
def _hub_errors(repository: str, kept: str) -> Iterator[None]:
    """Raise what the Hub refuses, and what keeps it from being reached, as a `PathError`; `kept` says what is kept."""
    try:
        yield
    except EmbedcacheError:
        raise
    except Exception as error:
        if not is_io_error(error) and not isinstance(error, ValueError | RuntimeError):
            raise
        raise PathError(
            f"cannot upload to {repository}: {io_reason(error)}; {kept}: run `hf auth login`, check the name and the "
            "network, and run the same command again"
        ) from error


def _check_local(cache: Cache) -> None:
    if is_remote(cache.path):
        raise PathError(f"{cache.path}: expected a local cache to upload, got a URL; copy it to a folder first")
    if removing_path(cache.path).is_file():  # its files still hold the samples
        raise UnfinishedError(f"{cache.path}: {INTERRUPTED_REMOVAL}")


def _files(folder: Path) -> list[str]:
    """Return the files of a cache, without locks and what killed processes left.

    A link is refused: in a stranger's cache it may name any file of this machine.
    """
    found = []
    for path in folder.rglob("*"):
        name = path.relative_to(folder)
        if any(part.startswith(".") for part in name.parts):
            continue
        if path.is_symlink():
            raise PathError(
                f"{path}: expected a file of the cache, got a link to {path.resolve()}; remove it, or copy that file "
                "here if it belongs to the cache"
            )
        if path.is_file():
            found.append(str(name))
    return sorted(found)


def _list_files(api: Any, repository: str) -> dict[str, Any]:
    """Return the files of the repository by their paths."""
    tree = api.list_repo_tree(repository, recursive=True, repo_type="dataset")
    return {item.path: item for item in tree if hasattr(item, "blob_id")}


def _commit(api: Any, repository: str, additions: Mapping[str, Path | bytes], *, removed: Sequence[str] = ()) -> None:
    """Commit files, given by paths or contents, and removals; without any nothing is committed."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    operations = [
        *(CommitOperationAdd(name, file) for name, file in additions.items()),
        *(CommitOperationDelete(name) for name in removed),
    ]
    if operations:
        api.create_commit(repository, operations, commit_message=_MESSAGE, repo_type="dataset")


def _last(cache: Cache) -> list[str]:
    """Return the files of the last commit: that which makes a cache of the others, and its tables."""
    tables = [f"{modality}/items.parquet" for modality in cache.info.num_items]
    return [*tables, "samples.parquet", removed_path(cache.path).name, info_path(cache.path).name]


def _find_changes(cache: Cache, files: Sequence[str], remote: Mapping[str, Any]) -> tuple[list[str], list[str]]:
    """Return the files that the repository does not have, and those to replace or to write last."""
    last = _last(cache)
    is_new = {name: name not in remote and name not in last for name in files}
    new = [name for name in files if is_new[name]]
    changed = [name for name in files if not is_new[name] and not _is_uploaded(cache.path / name, remote.get(name))]
    return new, changed


def _is_uploaded(path: Path, remote: Any) -> bool:
    """Return whether the repository has these bytes: compared by SHA-256, or as Git does for small files."""
    if remote is None or remote.size != path.stat().st_size:
        return False
    if remote.lfs is not None:
        return bool(remote.lfs.sha256 == digest_file(path))
    data = path.read_bytes()
    return bool(remote.blob_id == hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest())


def _removed(remote: Mapping[str, Any], files: Sequence[str]) -> list[str]:
    """Return the files in folders of a cache that the cache no longer has, such as those of a removed feature."""
    folders, kept = {*MODALITIES, _RECORDS}, set(files)
    return [name for name in remote if name.partition("/")[0] in folders and "/" in name and name not in kept]


def _check_same_cache(api: Any, repository: str, cache: Cache, remote: Mapping[str, Any]) -> None:
    name = info_path(cache.path).name
    if name not in remote:
        others = [
            path for path in remote if path.partition("/")[0] not in (*MODALITIES, _RECORDS, CARD, ".gitattributes")
        ]
        if others:
            raise SettingError(
                f"repository: expected a new one or one with this cache, got {repository} with other files, such as "
                f"{others[0]}; name a new one"
            )
        return
    path = Path(api.hf_hub_download(repository, name, repo_type="dataset"))
    theirs = read_info(path.parent)
    if not cache.info.has_rows_of(theirs.index_digest):
        raise FingerprintError(
            f"repository: expected a new one or one with the samples of {cache.path}, got {repository} with the cache "
            f"of {theirs.num_samples:,} others; name a new one"
        )


def _shape(shape: Sequence[int]) -> str:
    return " × ".join("any" if size < 0 else f"{size:,}" for size in shape)


def _dataset_card(cache: Cache, repository: str, settings: HubSettings) -> str:
    """Return the Markdown of the dataset card: what the cache holds, what made it, and how to open it."""
    features = {name: cache.features(name) for name in MODALITIES if name in cache.info.num_items}
    tables = [("samples", "samples.parquet"), *((name, f"{name}/items.parquet") for name in features)]
    configs = [line for name, path in tables for line in (f"- config_name: {name}", f"  data_files: {path}")]
    counts = ", ".join(f"{count_items(cache.info.num_items[name], name)}" for name in features)
    source = cache.info.source
    return "\n".join(
        [
            "---",
            f"license: {settings.license}",
            "tags:",
            "- embedcache",
            "- embeddings",
            "configs:",
            *configs,
            "---",
            "",
            f"# {repository.partition('/')[2]}",
            "",
            f"Embeddings of {pluralize(cache.info.num_samples, 'sample')} ({counts}), computed by frozen encoders and "
            "cached with embedcache. The raw items are not here: the tables have their keys, paths and captions.",
            "",
            f"- source: `{source.get('type')}:{Path(str(source.get('path'))).name}`",
            f"- rows: `{cache.info.index_digest}`",
            f"- license of the data: {settings.license}; that of the encoders is their authors' to say",
            "",
            *_feature_table(features),
            "",
            '`pip install "embedcache[remote]"`, then:',
            "",
            "```python",
            "import embedcache",
            "",
            f'cache = embedcache.Cache("hf://datasets/{repository}")',
            *(f'{name} = cache.feature("{name}", "{found[0].name}")' for name, found in features.items() if found),
            "```",
            "",
        ]
    )


def _feature_table(features: Mapping[str, Sequence[Feature]]) -> list[str]:
    """Return the lines of a table of the features of each modality."""
    return [
        "| feature | modality | encoder | shape | dtype |",
        "| --- | --- | --- | --- | --- |",
        *(
            f"| `{feature.name}` | {name} | `{feature.group.spec}` | {_shape(feature.item_shape)} | {feature.dtype} |"
            for name, found in features.items()
            for feature in found
        ),
    ]
