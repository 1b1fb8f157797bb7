"""Uploads to the Hugging Face Hub: an export of a run as a model, and a cache as a dataset."""

import glob
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from embedcache.errors import FingerprintError, PathError, SettingError, UnfinishedError, pluralize, quoted, summary
from embedcache.export.settings import HubSettings, check_repository
from embedcache.files import AnyPath, hub_errors, is_remote
from embedcache.modalities import MODALITIES, count_items
from embedcache.settings import merge_settings
from embedcache.store.cache import Cache
from embedcache.store.layout import INTERRUPTED_REMOVAL, info_path, read_info

if TYPE_CHECKING:
    from huggingface_hub import DatasetCard

    from embedcache.options import HubOptions

CARD = "README.md"
_LOG_IN = "run `hf auth login`, check the name and the network"
_FOLDERS = (*MODALITIES, "records")
_HIDDEN = (".*", "*/.*")  # locks, and temporary files of killed processes
_LAST = ("cache.json", "removed-*.parquet", "samples-*.parquet", "*/items-*.parquet")
"""Files without which the others are not a cache."""
_MESSAGE = "Add a cache of embeddings"


@dataclass(frozen=True, kw_only=True)
class HubReport:
    """An uploaded cache.

    Args:
        url: page of the dataset.
        location: `hf://` URL of this version of the cache.
    """

    url: str
    location: str

    __repr__ = summary

    def lines(self) -> list[str]:
        """Return the page, and the command that reads this version."""
        return [self.url, f"read it with: embedcache inspect {quoted(self.location)}"]


def push_cache(
    cache_path: AnyPath, repository: str, settings: HubSettings | None = None, **options: Unpack["HubOptions"]
) -> HubReport:
    """Upload a cache to a dataset of the Hub, where `hf://datasets/OWNER/NAME` opens it.

    The last commit has the tables and `cache.json`, so a first upload that is interrupted leaves no cache. The same
    command resumes it: huggingface_hub does not send files again that the repository has. The raw items are not
    uploaded, but their paths and all captions are.

    Args:
        cache_path: a local cache.
        repository: `OWNER/NAME`.
        settings: visibility, and the license for the card.
        options: settings by their names on the command line, which replace those of `settings`.

    Raises:
        PathError: the cache is behind a URL or contains a link, or the Hub refuses the upload or cannot be reached.
        UnfinishedError: a removal of samples was interrupted.
        FingerprintError: the repository has another cache, or this one has changed during the upload.
        SettingError: the repository has another form than `OWNER/NAME`, or has other files.
    """
    from huggingface_hub import HfApi

    settings = merge_settings(HubSettings, settings, options)
    check_repository("repository", repository)
    cache = Cache(cache_path)
    api = HfApi()
    _check_local(cache)

    with hub_errors(
        f"upload to {repository}", f"the cache is in {cache.path}: {_LOG_IN}, and run the same command again"
    ):
        url = str(api.create_repo(repository, repo_type="dataset", private=not settings.public, exist_ok=True))
        remote = api.list_repo_files(repository, repo_type="dataset")
        _check_same_cache(api, repository, cache, remote)

        upload: dict[str, Any] = {
            "repo_id": repository,
            "repo_type": "dataset",
            "folder_path": cache.path,
            "commit_message": _MESSAGE,
        }
        api.upload_folder(**upload, ignore_patterns=[*_HIDDEN, *_LAST])
        if CARD not in remote:
            _dataset_card(cache, repository, settings).push_to_hub(repository, repo_type="dataset")
        if read_info(cache.path).index_digest != cache.info.index_digest:
            raise FingerprintError(f"{cache.path}: expected no change during the upload, got new samples; run it again")

        removed = _removed_patterns(cache.path, remote)
        commit = api.upload_folder(
            **upload, allow_patterns=[*_LAST], ignore_patterns=[*_HIDDEN], delete_patterns=removed
        )
    return HubReport(url=url, location=f"hf://datasets/{repository}@{commit.oid}")


def push_folder(folder: Path, repository: str, *, is_public: bool) -> str:
    """Upload an export to the hub as one commit, and return its URL. An existing repository keeps its visibility."""
    from huggingface_hub import HfApi

    api = HfApi()
    retry = f"run `hf upload {repository} {folder}`"
    with hub_errors(f"upload to {repository}", f"the export is in {folder}: {_LOG_IN}, and {retry}"):
        url = api.create_repo(repository, private=not is_public, exist_ok=True)
        api.upload_folder(
            repo_id=repository, folder_path=folder, commit_message="Export a trained pair with embedcache"
        )
    return str(url)


def _check_local(cache: Cache) -> None:
    """Check that all files of a cache are on this machine and complete.

    A link is refused: in a stranger's cache it may name any file of this machine.
    """
    if is_remote(cache.path):
        raise PathError(f"{cache.path}: expected a local cache to upload, got a URL; copy it to a folder first")
    # After an interrupted removal, the files still contain the samples.
    if cache.info.has_interrupted_removal:
        raise UnfinishedError(f"{cache.path}: {INTERRUPTED_REMOVAL}")

    for path in cache.path.rglob("*"):
        if path.is_symlink():
            raise PathError(
                f"{path}: expected a file of the cache, got a link to {path.resolve()}; remove it, or copy that file "
                "here if it belongs to the cache"
            )


def _removed_patterns(folder: Path, remote: Collection[str]) -> list[str]:
    """Return patterns of the remote files in folders of a cache that the local cache no longer has.

    A folder that is gone, such as that of a pruned feature, is one pattern.
    """
    patterns = set()
    for path in map(Path, remote):
        if path.parts[0] in _FOLDERS and not (folder / path).is_file():
            # The outermost folder comes last.
            absent_folders = [parent for parent in path.parents if not (folder / parent).exists()]
            patterns.add(f"{glob.escape(str(absent_folders[-1]))}/*" if absent_folders else glob.escape(str(path)))
    return sorted(patterns)


def _check_same_cache(api: Any, repository: str, cache: Cache, remote: Collection[str]) -> None:
    """Check that a repository has no other files, and no other cache."""
    name = info_path(cache.path).name
    if name in remote:
        remote_info = read_info(Path(api.hf_hub_download(repository, name, repo_type="dataset")).parent)
        if not cache.info.has_rows_of(remote_info.index_digest):
            raise FingerprintError(
                f"repository: expected a new one or one with the samples of {cache.path}, got {repository} with "
                f"{remote_info.num_samples:,} others; name a new one"
            )
        return

    # A first upload that was interrupted left only folders of the cache.
    for path in remote:
        if path.partition("/")[0] not in (*_FOLDERS, CARD, ".gitattributes"):
            raise SettingError(
                f"repository: expected a new one or one with this cache, got {repository} with {path}; name a new one"
            )


def _dataset_card(cache: Cache, repository: str, settings: HubSettings) -> "DatasetCard":
    """Create the dataset card: the content of the cache, its encoders, and how to open it."""
    from huggingface_hub import DatasetCard, DatasetCardData

    # Each table is a configuration, which the dataset viewer of the Hub shows.
    features = {}
    counts = []
    configs = [{"config_name": "samples", "data_files": "samples-*.parquet"}]
    for name in MODALITIES:
        if name in cache.info.num_items:
            features[name] = cache.features(name)
            counts.append(count_items(cache.info.num_items[name], name))
            configs.append({"config_name": name, "data_files": f"{name}/items-*.parquet"})
    data = DatasetCardData(license=settings.license, tags=["embedcache", "embeddings"], configs=configs)

    source = cache.info.source
    card: DatasetCard = DatasetCard.from_template(
        data,
        template_path=str(Path(__file__).with_name("dataset_card.md.j2")),
        name=repository.partition("/")[2],
        repository=repository,
        samples=pluralize(cache.info.num_samples, "sample"),
        counts=", ".join(counts),
        source=f"{source.get('type')}:{Path(str(source.get('path'))).name}",
        rows=cache.info.index_digest,
        features=features,
    )
    return card
