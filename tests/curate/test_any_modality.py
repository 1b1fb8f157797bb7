"""Curation of recordings, videos and point clouds: each command does for them what it does for images."""

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from embedcache.curate.dedup import dedup
from embedcache.curate.outliers import find_outliers
from embedcache.curate.select.select import select
from embedcache.errors import DataError, EmbedcacheError, PathError, UnknownNameError
from embedcache.extract.extract import extract
from embedcache.search.index import build_index
from embedcache.search.queries import Queries
from embedcache.search.search import OpenIndex
from embedcache.sources import open_source
from embedcache.train.settings import train_settings
from embedcache.train.train import train
from tests.cli.run import succeed
from tests.media_files import encode_audio, encode_video, npz, tone, wav
from tests.media_toy import MEDIA
from tests.toy import TEXT

NUM = 18


@dataclass(frozen=True)
class Case:
    """A modality: its items by a number, two files that hold the same item, and what the pages call them."""

    modality: str
    feature: str
    noun: str
    suffix: str
    write: Callable[[int], bytes]
    other_suffix: str
    write_again: Callable[[int], bytes]


def _color(number: int) -> np.ndarray:
    return np.full((3, 16, 16, 3), np.array([250, 12 * number, 250 - 12 * number]), np.uint8)


def _cloud(number: int) -> dict[str, np.ndarray]:
    xyz = np.array([[0, 0, 0], [10, number, 20 - number]], np.float32)
    return {"xyz": xyz, "uv": np.zeros((2, 2), np.float32), "label": np.zeros(2, np.int16)}


def _tone(number: int) -> np.ndarray:
    return tone(0.1, 137.0 + 190.0 * number)


def _stored(arrays: dict[str, np.ndarray]) -> bytes:
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]
    return file.getvalue()


CASES = [
    Case(
        "audio", "mean", "recordings", "wav", lambda n: wav(_tone(n)), "flac", lambda n: encode_audio(_tone(n), "flac")
    ),
    Case(
        "video",
        "mean",
        "videos",
        "mp4",
        lambda n: encode_video(_color(n)),
        "mkv",
        lambda n: encode_video(_color(n), kind="mkv"),
    ),
    Case(
        "points",
        "extent",
        "point clouds",
        "npz",
        lambda n: npz(_cloud(n)),
        "npz",
        lambda n: _stored(_cloud(n)),
    ),
]


@dataclass(frozen=True)
class Made:
    """Caches of one modality with captions and labels; in `train` item 3 recurs as a copy, item 5 in another file."""

    case: Case
    train: Path
    test: Path  # item 3 as a copy, item 7 in another file, and two of its own

    @property
    def feature(self) -> str:
        return f"open_media/{self.case.feature}"


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.modality)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    case, folder = request.param, tmp_path_factory.mktemp("any")
    for part, numbers, again in (("train", (*range(NUM), 3), 5), ("test", (3, 30, 31), 7)):
        (folder / part).mkdir()
        for place, number in enumerate((*numbers, again)):
            is_again = place == len(numbers)
            suffix = case.other_suffix if is_again else case.suffix
            data = case.write_again(number) if is_again else case.write(number)
            (folder / part / f"{place:02d}.{suffix}").write_bytes(data)
            (folder / part / f"{place:02d}.txt").write_text(f"item {chr(97 + number % 26)} {part}")
            (folder / part / f"{place:02d}.json").write_text(f'{{"label": "{"low" if number < 9 else "high"}"}}')
        extract(
            open_source(folder / part), folder / f"{part}-cache", encoder={case.modality: [MEDIA]}, text_encoder=[TEXT]
        )
    return Made(case, folder / "train-cache", folder / "test-cache")


def test_search_by_file(made: Made, tmp_path: Path) -> None:
    modality, case = made.case.modality, made.case
    build_index(made.train, tmp_path / "index", feature=made.feature, modality=modality)
    one, other = tmp_path / f"one.{case.suffix}", tmp_path / f"other.{case.other_suffix}"
    one.write_bytes(case.write(4))
    other.write_bytes(case.write_again(5))
    options = [word for path in (one, other) for word in ("--query-file", f"{modality}={path}")]
    found = json.loads(succeed("search", "index", *options, "-k", 2, "--json", cwd=tmp_path))
    assert [result["query"] for result in found] == [str(one), str(other)]
    assert [result["hits"][0]["key"] for result in found] == ["04", "05"]
    assert all(result["hits"][0]["score"] > 0.9999 for result in found)
    opened = OpenIndex(tmp_path / "index")
    data = case.write(4)
    assert opened.search(Queries(items={modality: data}), k=1)[0][0].key == "04"
    calls: list[tuple[dict[str, Any], type[EmbedcacheError], str]] = [
        ({modality: tmp_path / f"no.{case.suffix}"}, PathError, "does not exist"),
        ({"image": tmp_path / "x.png"}, DataError, "image query"),
        ({"text": "a dog"}, UnknownNameError, "text"),
        ({modality: b"nothing"}, DataError, f"{modality} 0: "),
    ]
    for items, error, word in calls:
        with pytest.raises(error, match=word):
            opened.search(Queries(items=items))


def test_dedup(made: Made, tmp_path: Path) -> None:
    succeed("curate", "dedup", made.train, "kept.parquet", "--cosine", 0.99999, cwd=tmp_path)
    removed = pq.read_table(tmp_path / "kept.removed.parquet").to_pylist()
    assert [(row["key"], row["kept_key"], row["is_copy"]) for row in removed] == [
        ("18", "03", True),
        ("19", "05", False),
    ]


def test_outliers(made: Made, tmp_path: Path) -> None:
    words = ("curate", "outliers", made.train, "odd.parquet", "-k", 3, "--modality", made.case.modality)
    succeed(*words, cwd=tmp_path)
    table = pq.read_table(tmp_path / "odd.parquet")
    assert {"typicality", "label_margin"} <= set(table.column_names)


SELECTIONS = {
    "random": ["--budget", 5],
    "k-center": ["--budget", 5],
    "hierarchical": ["--budget", 5],
    "image-based:clusters=4": ["--target", "TEST"],
    "top-score": ["--budget", 5, "--concepts", "TEST", "--modality", "MODALITY"],
    "rare-first": ["--budget", 5, "--concepts", "TEST", "--modality", "MODALITY"],
}
"""Method -> options; of these methods each compares the items alone, or with labeled ones."""


@pytest.mark.parametrize("method", SELECTIONS)
def test_select(made: Made, method: str, tmp_path: Path) -> None:
    values = {"TEST": made.test, "MODALITY": made.case.modality}
    options = [values.get(str(word), word) for word in SELECTIONS[method]]
    succeed("curate", "select", made.train, "some.parquet", "--method", method, *options, cwd=tmp_path)
    record = succeed("inspect", "some.parquet", "--json", cwd=tmp_path)
    assert f'"modality": "{made.case.modality}"' in record
    assert f'"feature": "{made.feature}"' in record


def test_modality_of_a_run(tmp_path: Path) -> None:
    """A cache of recordings, videos and texts, and a run that has no recordings: videos are compared."""
    (tmp_path / "items").mkdir()
    for number in range(6):
        (tmp_path / "items" / f"{number}.wav").write_bytes(wav(_tone(number)))
        (tmp_path / "items" / f"{number}.mp4").write_bytes(encode_video(_color(number)))
        (tmp_path / "items" / f"{number}.txt").write_text(f"item {number}")
    encoders = {"audio": [MEDIA], "video": [MEDIA]}
    extract(open_source(tmp_path / "items"), tmp_path / "cache", encoder=encoders, text_encoder=[TEXT])
    settings = train_settings({"projector": "linear", "epochs": 0, "split": "key", "shared_width": 2})
    features = {"video": "open_media/mean", "text": "open_toy/mean"}
    train(tmp_path / "cache", tmp_path / "run", feature=features, settings=settings)

    table = dedup(tmp_path / "cache", tmp_path / "kept.parquet", cosine=0.9, run=tmp_path / "run")
    scores = find_outliers(tmp_path / "cache", run=tmp_path / "run", k=3)
    select(tmp_path / "cache", tmp_path / "some.parquet", method="k-center", run=tmp_path / "run", budget=2)
    assert table.analysis.feature.modality == scores.vectors.modality == "video"
    record = succeed("inspect", "some.parquet", "--json", cwd=tmp_path)
    assert '"modality": "video"' in record


def test_coverage_by_examples(made: Made, tmp_path: Path) -> None:
    options = ("--modality", made.case.modality, "-k", 2, "--json")
    record = json.loads(succeed("curate", "coverage", made.train, made.test, *options, cwd=tmp_path))
    assert record["pool"]["feature"] == made.feature
    assert [(concept["name"], concept["examples"]) for concept in record["concepts"]] == [("high", 2), ("low", 2)]
    best = {found["key"] for found in record["concepts"][1]["nearest"]}
    assert best <= {f"{number:02d}" for number in (*range(9), 18, 19)}


def test_leaks_of_near_duplicates(made: Made, tmp_path: Path) -> None:
    named = ("--feature", f"{made.case.modality}={made.feature}", "--cosine", f"{made.case.modality}=0.99999")
    words = ("curate", "leaks", made.train, made.test, "clean.parquet", *named, "--cosine", "text=1", "--overwrite")
    succeed(*words, "--output", "leaks.json", cwd=tmp_path)
    leak = json.loads((tmp_path / "leaks.json").read_text())["by"][made.case.modality]
    assert (leak["num_samples_copied"], leak["num_samples_leaked"], leak["num_train_samples"]) == (1, 2, 3)
    assert leak["feature"] == made.feature
    kept = pq.read_table(tmp_path / "clean.parquet")["key"].to_pylist()
    assert {"03", "18", "07"}.isdisjoint(kept)
