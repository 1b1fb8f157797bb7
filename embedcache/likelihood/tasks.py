"""Tasks of one likelihood from a TOML file, and hard negatives by a FAISS index of candidates.

    [caption]                       # the captions of the cache itself
    kind = "caption"
    weight = 2

    [color]
    kind = "answer"
    examples = "colors.parquet"     # columns key, text and target, perhaps split
    candidates = ["red", "green", "blue"]

A table has the options of `TaskTable` and those of `embedcache.train.likelihood_tasks.ExampleTask`. Paths are relative
to the file; a cache may have a URL.
"""

import tomllib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.dataset.splits import Split, column_parts
from embedcache.errors import DataError, EmbedcacheError, PathError, SettingError, one_line
from embedcache.files import expand_home, is_url, read_text, split_lines
from embedcache.io_errors import io_reason
from embedcache.modalities import MODALITIES
from embedcache.networks.candidates import MinedNegatives
from embedcache.networks.words import Vocabulary
from embedcache.registry import unknown_name
from embedcache.search.faiss_index import make_index
from embedcache.settings import check_settings, flat_settings, from_flat, setting
from embedcache.store.cache import Cache
from embedcache.store.columns import to_array
from embedcache.train.examples import (
    Media,
    TaskExamples,
    WordTable,
    open_examples,
    open_media,
    read_captions,
    read_examples,
    read_texts,
)
from embedcache.train.likelihood_tasks import ExampleTask, Kind

_ALWAYS_ABOUT_ITEMS = ("classify", "retrieve", "caption")


@dataclass(frozen=True, kw_only=True)
class TaskTable:
    """What a table of the file says of the examples and the candidates of a task."""

    kind: Kind | None = setting(None, "What is asked.", default_text="needed")
    examples: str | None = setting(
        None,
        "Parquet file with the columns key, text, target and split.",
        metavar="FILE",
        default_text="the captions of the cache",
    )
    validation: str | None = setting(
        None, "Parquet file of other examples to validate on.", metavar="FILE", default_text="the part val of examples"
    )
    cache: str | None = setting(
        None, "Cache of the items that keys name.", metavar="CACHE", default_text="that of the command"
    )
    modality: str | None = setting(None, "Modality of the items.", default_text="image, or the only one of the cache")
    feature: str | None = setting(None, "Feature of the items, as encoder/feature.", default_text="the only one")
    candidates: tuple[str, ...] | str = setting(
        (),
        "Classes, answers or words: a list, or a file with one per line.",
        metavar="LIST|FILE",
        default_text="the targets of training, or their words",
    )
    mined: int = setting(0, "Hard negatives per positive in training: the nearest candidates by their words.", ge=0)

    def __post_init__(self) -> None:
        check_settings(self)


TASK_OPTIONS = {item.name: item for item in (*flat_settings(TaskTable), *flat_settings(ExampleTask))}
"""All options of a table by name."""


class NamedTask(NamedTuple):
    """A table of the file: the name of the task, what it says, and the options of its `ExampleTask`."""

    name: str
    table: TaskTable
    options: Mapping[str, Any]


def read_task_file(path: Path | str) -> list[NamedTask]:
    """Read a TOML file of tasks, in its order, without opening what it names.

    Raises:
        PathError: there is no such file.
        SettingError: it is not TOML, has no table, or a value does not fit its declaration.
        UnknownNameError: a table has an option that tasks have not.
    """
    path = Path(path)
    try:
        text = read_text(path, SettingError)
    except OSError as error:
        raise PathError(f"expected a TOML file of tasks, got {path}: {io_reason(error)}; check the path") from error
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # invalid TOML, or a number of thousands of digits
        raise SettingError(f"{path}: expected TOML, got an error: {error}") from error
    wrong = [name for name, table in tables.items() if not isinstance(table, dict)]
    if wrong or not tables:
        found = repr(wrong[0]) if wrong else "an empty file"
        raise SettingError(f"{path}: expected one table per task, such as [color], got {found}")
    return [_parse_table(path, name, table) for name, table in tables.items()]


def _parse_table(path: Path, name: str, values: Mapping[str, Any]) -> NamedTask:
    own = {item.name for item in flat_settings(TaskTable)}
    for key in values:
        if key not in TASK_OPTIONS:
            raise unknown_name("option", key, TASK_OPTIONS, where=f"of the task {name} in {path}")
    read = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    try:
        table = from_flat(TaskTable, {key: value for key, value in read.items() if key in own})
        if table.kind is None:
            raise SettingError("kind: expected one of classify, answer, retrieve, caption, masked, got none")
    except SettingError as error:
        raise SettingError(f"{path}: {name}: {error}") from error
    return NamedTask(name, table, {key: value for key, value in read.items() if key not in own})


class TaskFile:
    """A file of tasks with what they read: caches, features and tables are opened once for all of them.

    Args:
        path: the file.
        cache: cache of the tasks that name none.
        memory_bytes: features up to this size are read into memory, others row by row.
    """

    def __init__(self, path: Path | str, cache: Cache, *, memory_bytes: float = float("inf")) -> None:
        self.tasks = read_task_file(path)
        self._folder, self._cache, self._memory_bytes = Path(path).parent, cache, memory_bytes
        self._caches: dict[str, Cache] = {}
        self._media: dict[tuple[Path, str, str | None], Media] = {}
        self._tables: dict[tuple[Path, str | None], pa.Table] = {}

    def cache_of(self, task: NamedTask) -> Cache:
        """Return the cache of a task."""
        if task.table.cache is None:
            return self._cache
        path = task.table.cache if is_url(task.table.cache) else str(self._resolve(task.table.cache))
        if path not in self._caches:
            self._caches[path] = Cache(path)
        return self._caches[path]

    def table_of(self, task: NamedTask, name: str | None) -> pa.Table:
        """Read a table of examples by its name in the file; None: the captions of the task's cache."""
        cache = self.cache_of(task)
        key = (cache.path, name)
        if key not in self._tables:
            self._tables[key] = read_captions(cache) if name is None else read_examples(self._resolve(name))
        table = self._tables[key]
        needed = {"target", "key"} if task.table.kind in _ALWAYS_ABOUT_ITEMS else {"target"}
        if not needed <= set(table.column_names):
            raise DataError(f"examples: expected the columns key, text and target, got {', '.join(table.column_names)}")
        return table

    def open(self, task: NamedTask, table: pa.Table, vocabulary: Vocabulary) -> TaskExamples:
        """Open a table of examples: about items if it has keys, else about texts alone."""
        if not len(table):
            raise DataError("expected at least one example, got none")
        return open_examples(table, vocabulary, media=self._media_of(task) if is_about_items(task, table) else None)

    def _media_of(self, task: NamedTask) -> Media:
        cache = self.cache_of(task)
        modality = task.table.modality or _only_modality(cache)
        if modality not in MODALITIES:
            raise unknown_name("modality", modality, MODALITIES)
        key = (cache.path, modality, task.table.feature)
        if key not in self._media:
            media = open_media(cache, modality, task.table.feature, in_memory=False)
            if media.feature.num_bytes <= self._memory_bytes:
                media = replace(media, read=media.feature.load())
            self._media[key] = media
        return self._media[key]

    def candidates_of(self, task: NamedTask) -> tuple[str, ...] | None:
        """Return the candidates that the file names; None: it names none."""
        names = task.table.candidates
        if isinstance(names, str):
            path = self._resolve(names)
            try:
                text = read_text(path)
            except OSError as error:
                raise PathError(
                    f"candidates: expected a list, or a text file with one per line, got {path}: {one_line(error)}"
                ) from error
            names = tuple(line.strip() for line in split_lines(text) if line.strip())
        return names or None

    def _resolve(self, name: str) -> Path:
        return self._folder / expand_home(name)


def _only_modality(cache: Cache) -> str:
    found = [name for name in MODALITIES if name != "text" and cache.info.num_items.get(name)]
    if "image" in found or len(found) == 1:
        return "image" if "image" in found else found[0]
    others = " and ".join(found) or "texts alone"
    raise SettingError(f"modality: expected items of one modality in {cache.path}, got {others}; name one")


def is_about_items(task: NamedTask, table: pa.Table) -> bool:
    """Return whether examples are about items: for some kinds always, for others if they have keys."""
    has_keys = "key" in table.column_names and table["key"].null_count < len(table)
    return has_keys or task.table.kind in _ALWAYS_ABOUT_ITEMS


def parts_of(task: NamedTask, table: pa.Table, split: Split | None) -> pa.Array:
    """Return the part of each of N examples as texts, empty for none.

    It is that of the table's own column `split`, if it has one, else that of the sample.

    Args:
        split: split of the samples of the task's cache; None: there is none.
    """
    if "split" in table.column_names:
        return column_parts(read_texts(table, "split"))
    if split is None or not is_about_items(task, table):
        return pa.repeat("", len(table))
    samples = pc.index_in(read_texts(table, "key"), value_set=to_array(split.keys, pa.large_string()))
    return pc.fill_null(to_array(split.parts, pa.string()).take(samples), "")


def open_task(file: TaskFile, task: NamedTask, words: WordTable, split: Split | None) -> ExampleTask:
    """Open a task for training.

    Args:
        file: the file.
        task: one of its tasks.
        words: the word table.
        split: split of the samples of the task's cache, for examples that do not say their part themselves.

    Raises:
        DataError: there are no examples to train or to validate on, or as `ExampleTask.check` and `open_examples`.
    """
    with naming(task):
        table = file.table_of(task, task.table.examples)
        parts = parts_of(task, table, split)
        if task.table.validation is None:
            train, validation = (_take_part(table, parts, part) for part in ("train", "val"))
        else:
            has_parts = bool(pc.any(pc.not_equal(parts, "")).as_py())
            train = _take_part(table, parts, "train") if has_parts else table
            validation = file.table_of(task, task.table.validation)
        opened = ExampleTask(
            name=task.name,
            kind=task.table.kind,  # type: ignore[arg-type]  # read_task_file has checked it
            train=file.open(task, train, words.vocabulary),
            validation=file.open(task, validation, words.vocabulary),
            candidates=file.candidates_of(task),
            **task.options,
        )
        opened.check()
        return mine_candidates(opened, words, task.table.mined) if task.table.mined else opened


def _take_part(table: pa.Table, parts: pa.Array, part: str) -> pa.Table:
    found = table.filter(pc.equal(parts, part))
    if not len(found):
        raise DataError(
            f"examples: expected some of the part {part}, got none among {len(table):,}; add a column split with train "
            "and val, or name a file of examples as validation"
        )
    return found


def mine_candidates(task: ExampleTask, words: WordTable, k: int) -> ExampleTask:
    """Return a task whose training batches have hard negatives: the candidates nearest to each positive.

    Nearness is the cosine of the mean vectors of their words, by exact search: for many more than 100,000 candidates,
    make a `MinedNegatives` with an index of your own.

    Args:
        k: negatives per positive.

    Raises:
        MissingExtraError: faiss is not installed.
    """
    vectors_CD = words.average(task.mined_texts)
    index = make_index("Flat", vectors_CD.shape[1], device="cpu")  # the same negatives on every machine
    index.add(np.arange(len(vectors_CD)), vectors_CD)
    return replace(task, mined=MinedNegatives(index, k, vectors_CD))


@contextmanager
def naming(task: NamedTask) -> Iterator[None]:
    """Prefix the message of any error of a user's with the name of a task."""
    try:
        yield
    except EmbedcacheError as error:
        if str(error).startswith(f"{task.name}: "):
            raise
        raise type(error)(f"{task.name}: {error}") from error
