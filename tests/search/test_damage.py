"""Random damage to every file of a cache, a run and an index: readers give the same numbers or a clear error."""

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from embedcache.dataset.selections import Selection, read_selection_table, write_selection
from embedcache.errors import EmbedcacheError
from embedcache.evaluate.runs import load_runs, read_run_split
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.provenance import DIGEST, add_digest
from embedcache.registry import trust_code
from embedcache.reports.summary import summarize
from embedcache.search.index import build_index
from embedcache.search.search import OpenIndex
from embedcache.search.settings import IndexSettings
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from embedcache.store.verify import verify
from tests.crash import start_call
from tests.evaluate.test_retrieval import train_run
from tests.images import write_images
from tests.toy import IMAGE, TEXT

FEATURES = (
    ("image", "open_toy/cls"),
    ("image", "open_toy/patches"),
    ("text", "open_toy/mean"),
    ("text", "open_toy/tokens"),
)
SELECTION = "kept.parquet"
"""Is not replaced by another table of keys: that would be another selection."""
KINDS = ("flip", "flip", "flip", "flip", "cut", "zeros", "append", "delete", "swap", "copy")
NOT_READ = ("losses.jsonl", "last.safetensors")
"""Files of a run from which no reader takes numbers."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of 120 images in two chunks, a run on it, and an index of that run."""
    folder = tmp_path_factory.mktemp("damage")
    settings = ExtractSettings(features=("cls", "patches", "mean", "tokens"), chunk_size=64)
    source = open_source(write_images(folder / "source", 120))
    extract(source, folder / "cache", image_encoder=[IMAGE], text_encoder=[TEXT], settings=settings)
    train_run(folder / "cache", folder / "run")
    build_index(folder / "cache", folder / "index", IndexSettings(run=folder / "run"))
    selection = Selection(rows=np.arange(4) * 28, columns={"reason": ["a", "b", "a", "c"]})
    write_selection(folder / SELECTION, Cache(folder / "cache"), selection, {})
    shutil.rmtree(folder / "source")
    return folder


def read_all(folder: Path) -> Iterator[bytes]:
    """Read everything that a reader uses, as bytes."""
    cache = Cache(folder / "cache")
    yield repr(cache.samples.to_pydict()).encode()
    for modality in cache.info.num_items:
        yield repr(cache.items(modality).to_pydict()).encode()
        yield repr(cache.items(modality, chunk=1, columns=["sample"]).to_pydict()).encode()
    for modality, name in FEATURES:
        feature = cache.feature(modality, name)
        feature.require_complete()
        yield repr((feature.failures, feature.shape, feature.dtype, feature.fingerprint, list(feature.hashes))).encode()
        yield feature.lengths().tobytes()
        yield b"".join(item.tobytes() for item in feature.gather_tokens(np.flatnonzero(feature.valid)[::7]))
    (run,) = load_runs([folder / "run"])
    yield repr(run.seed).encode()
    yield repr(run.info).encode()
    yield b"".join(parameter.detach().numpy().tobytes() for parameter in run.pair.parameters())
    split = read_run_split(run, cache)
    yield repr([list(values) for values in (split.parts, split.groups)]).encode()
    index = OpenIndex(folder / "index", run=folder / "run", cache=folder / "cache")
    queries_QP = np.eye(index.card.width, dtype=np.float32)[:2]
    yield repr(index.search_vectors(queries_QP, k=5)).encode()
    selection = read_selection_table(folder / SELECTION, [cache])
    yield repr((selection.rows.tolist(), selection.columns.to_pydict())).encode()
    yield repr(summarize(folder / SELECTION).sections).encode()
    summaries = [summarize(folder / name) for name in ("run", "index")]
    yield repr([(summary.lines[:2], summary.sections) for summary in summaries]).encode()


def damage(path: Path, other: Path, kind: str, rng: np.random.Generator) -> None:
    """Damage one file; `other` is one of the same name or suffix."""
    data = path.read_bytes()
    place = int(rng.integers(max(len(data), 1)))
    if kind == "delete":
        path.unlink()
    elif kind == "swap":
        path.write_bytes(other.read_bytes())
        other.write_bytes(data)
    elif kind == "copy":
        path.write_bytes(other.read_bytes())
    elif kind == "append":
        path.write_bytes(data + rng.bytes(8))
    elif kind == "cut":
        path.write_bytes(data[:place])
    elif kind == "zeros":
        path.write_bytes(data[:place] + bytes(len(data[place : place + 16])) + data[place + 16 :])
    else:
        flipped = bytes([data[place] ^ 1 << int(rng.integers(8))]) if data else b"x"
        path.write_bytes(data[:place] + flipped + data[place + 1 :])


def must_be_found(path: Path) -> bool:
    """Return whether `verify` promises to find any change of a file of a cache: chunks, and metadata of arrays."""
    return path.name != "zarr.json" and "c" in path.parts


def find_damage(cache: Path) -> list[str]:
    """Return what `verify` finds, or why it cannot read the cache."""
    try:
        return [finding.line() for finding in verify(Cache(cache))]
    except EmbedcacheError as error:
        return [str(error)]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, pytest.param(11, marks=pytest.mark.no_mutants)])
def test_same_numbers_or_a_clear_error(folder: Path, seed: int) -> None:
    rng, expected = np.random.default_rng(seed), list(read_all(folder))
    assert verify(Cache(folder / "cache")) == []
    files = [
        path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
        and not path.name.startswith(".")
        and path.name not in NOT_READ
        and path.parent.name != "records"
    ]
    num_refused = 0
    for number in range(100 if seed else 16):
        path, kind = files[rng.integers(len(files))], KINDS[rng.integers(len(KINDS))]
        alike = [other for other in files if other.suffix == path.suffix and other not in (path, folder / SELECTION)]
        other = alike[rng.integers(len(alike))] if alike and path.name != SELECTION else path
        before = {file: file.read_bytes() for file in (path, other)}
        damage(path, other, kind, rng)
        what = f"{number}: {kind} {path.relative_to(folder)}, {other.relative_to(folder)}"
        try:
            found = list(read_all(folder))
        except EmbedcacheError as error:
            found, num_refused = [], num_refused + (1 if "\n" not in str(error) else -99)
        assert found in ([], expected), what
        changed = [file for file in before if not file.is_file() or file.read_bytes() != before[file]]
        in_cache = [file.relative_to(folder / "cache") for file in changed if file.is_relative_to(folder / "cache")]
        findings = find_damage(folder / "cache") if in_cache else []
        if any(map(must_be_found, in_cache)) or (not found and len(in_cache) == len(changed) > 0):
            assert findings, what
        for file, content in before.items():
            file.write_bytes(content)
    assert num_refused > 5
    assert list(read_all(folder)) == expected


OTHER_TYPES = [
    ("cache/cache.json", ("parts",), 1.5),
    ("cache/cache.json", ("source", "path"), []),
    ("cache/image/open_toy/zarr.json", ("attributes",), "x"),
    ("cache/image/open_toy/zarr.json", ("attributes", "embedcache", "fingerprint"), "x"),
    ("cache/image/open_toy/zarr.json", ("attributes", "embedcache", "fingerprint", "family"), "\ud800"),
    ("cache/image/open_toy/cls/zarr.json", ("attributes", "embedcache", "dtype"), {}),
    ("run/run.json", ("arguments", "widths", "image"), 7),
    ("run/run.json", ("arguments", "shared_width"), 2**80),
    ("run/run.json", ("settings", "seed"), []),
    ("run/run.json", ("caches",), "x"),
    ("index/card.json", ("search",), {"nprobe": "x"}),
]
"""File, keys in it, and a value of a type that the format does not have there."""


@pytest.mark.parametrize(("name", "keys", "value"), OTHER_TYPES)
def test_other_types_in_json_are_a_clear_error(folder: Path, name: str, keys: tuple[str, ...], value: object) -> None:
    """Also where the digest of the file is that of its content, as in a file of a stranger."""
    path, before = folder / name, (folder / name).read_bytes()
    record = json.loads(before)
    inner = record
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    unchecked = {"cache.json": ("source",), "run.json": ("caches",), "card.json": ("cache", "run")}
    if DIGEST in record:
        record = add_digest({**record, DIGEST: None}, unchecked=unchecked.get(path.name, ()))
    if keys[:3] == ("attributes", "embedcache", "fingerprint") and value != "\ud800":  # which cannot be signed
        own = record["attributes"]["embedcache"]
        own |= add_digest({name: each for name, each in own.items() if name != DIGEST})
    path.write_text(json.dumps(record))
    try:
        with pytest.raises(EmbedcacheError) as raised:
            list(read_all(folder))
    finally:
        path.write_bytes(before)
    assert path.name in str(raised.value)
    assert "changed since" not in str(raised.value)


PIPES = (
    *("cache/samples-0.parquet", "cache/image/open_toy/zarr.json", "cache/image/open_toy/chunks/00001.json"),
    *("cache/image/open_toy/cls/c/1/0", "cache/text/open_toy/tokens/lengths/c/0"),
    *("run/run.json", "run/model.safetensors", "index/card.json"),
)


@pytest.mark.slow
def test_pipes_and_devices_are_not_read(folder: Path) -> None:
    process = start_call(refuse_pipes, folder)  # reading one would never end
    process.join(120)
    process.kill()
    assert process.exitcode == 0


def refuse_pipes(folder: Path) -> None:
    """Replace each of these files by a pipe or a device, which no reader must read and `verify` must find."""
    trust_code("tests")
    for number, name in enumerate(PIPES):
        path = folder / name
        content = path.read_bytes()
        path.unlink()
        os.mkfifo(path) if number % 2 else path.symlink_to("/dev/zero")
        with pytest.raises(EmbedcacheError):
            list(read_all(folder))
        if name.startswith("cache/"):
            assert verify(Cache(folder / "cache"))
        path.unlink()
        path.write_bytes(content)
