"""Commands as a newcomer types them, in one folder with images, a cache, a run and an index."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from embedcache.runs import Run
from tests.cli.run import TOY, embedcache, succeed
from tests.images import write_images

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `photos`, `cache`, `run`, `index` and `concepts`."""
    folder = tmp_path_factory.mktemp("newcomer")
    write_images(folder / "photos", 100)
    (folder / "concepts.json").write_text(json.dumps({"red": ["red bar left on white", "red bar top on blue"]}))
    for line in (
        ["extract", "photos", "cache", *TOY],
        ["extract", "prompts:concepts.json", "concepts", *TOY[2:]],
        ["train", "cache", "run", "--projector", "mlp", "--split", "key", "--epochs", "3", "--batch-size", "64"],
        ["curate", "index", "cache", "index", "--run", "run"],
    ):
        succeed(*line, cwd=folder)
    return folder


@pytest.mark.parametrize(
    ("line", "key"),
    [
        (["extract", "photos", "cache", *TOY], "reused"),
        (["extract", "photos", "cache", *TOY, "--retry-failed"], "computed"),
        ("train cache run --projector mlp --split key --epochs 3 --batch-size 64", "best_epoch"),
        ("evaluate retrieval cache run", "task"),
        ("evaluate pairs cache --split key", "pairs"),
        ("search index red", "hits"),
        ("curate index cache index --run run", "factory"),
        ("curate coverage cache concepts --run run", "concepts"),
        ("curate select cache some.parquet --method random --budget 5 --feature open_toy/cls", "num_selected"),
        ("curate dedup cache --modality image --html look.html", "levels"),
        ("curate dedup cache texts.parquet --copies --modality text", "num_removed"),
        ("train cache kept-run --selection texts.parquet --split key --epochs 1", "best_epoch"),
        ("verify cache", "findings"),
        ("inspect cache", "features"),
        ("curate combine cache keys.txt and keys.txt both.parquet", "num_samples"),
        ("curate export cache keys.txt tars --format webdataset", "num_samples"),
        ("export npy cache arrays --run run", "num_rows"),
        ("export onnx run graphs", "differences"),
    ],
    ids=lambda value: value if isinstance(value, str) else value[0],
)
def test_json_is_the_only_output(folder: Path, line: str | list[str], key: str) -> None:
    words = line.split() if isinstance(line, str) else line
    (folder / "keys.txt").write_text("00001\n00002\n")
    record = json.loads(succeed(*words, "--json", "--output", "record.json", "--overwrite", cwd=folder))
    assert key in (record[0] if isinstance(record, list) else record)
    if words[:2] != ["evaluate", "retrieval"]:  # which measures the time
        written = json.loads((folder / "record.json").read_text())
        for part in written if isinstance(written, list) else [written]:
            assert len(part.pop("digest")) == 64
        assert written == record


def test_search_takes_all_kinds_of_queries(folder: Path) -> None:
    (folder / "queries.txt").write_text("red bar left on white\n\nblue bar top on red\n")
    np.save(folder / "vectors.npy", np.eye(256, dtype=np.float16)[:2])
    command = "search index --queries queries.txt --query-image photos/00007.png --query-key 00009 --concepts concepts"
    command += " --query-concept red --query-vectors vectors.npy -k 2 --json"
    answers = json.loads(succeed(*command.split(), cwd=folder))
    names = ["red bar left on white", "blue bar top on red", "photos/00007.png", "00009", "red", "vector 0", "vector 1"]
    assert [answer["query"] for answer in answers] == names
    assert answers[2]["hits"][0]["key"] == "00007"
    assert answers[3]["hits"][0]["key"] == "00009"


def test_verify_finds_damage_and_exits_with_1(folder: Path, tmp_path: Path) -> None:
    assert succeed("verify", "cache", cwd=folder).startswith("cache: 0 damaged chunks")
    shutil.copytree(folder / "cache", tmp_path / "cache")
    (tmp_path / "cache/image/open_toy/cls/c/0/0").unlink()
    damaged = embedcache("verify", "cache", cwd=tmp_path)
    assert damaged.code == 1
    assert "open_toy/cls chunk 0:" in damaged.stdout
    assert "1 damaged chunk or table," in damaged.stdout
    assert succeed("verify", "index", cwd=folder) == "index: all bytes equal their checksums\n"
    shutil.copytree(folder / "index", tmp_path / "index")
    with (tmp_path / "index" / "index-0.faiss").open("ab") as file:
        file.write(b"0")
    damaged = embedcache("verify", "index", cwd=tmp_path)
    shown, line = damaged.stderr.splitlines()
    assert (damaged.code, shown.partition(" [")[0]) == (1, "checking index-0.faiss: 100% 1/1")
    assert line.startswith("error: index/index-0.faiss: expected checksum")
    refused = embedcache("verify", "index", "--repair", cwd=folder)
    assert (refused.code, refused.stderr.count("\n")) == (1, 1)


def test_config_of_a_run_trains_it_again(folder: Path) -> None:
    again = "train cache again --config run/run.json"
    succeed(*again.split(), cwd=folder)
    first, second = (Run.open(folder / name).info for name in ("run", "again"))
    assert (first.settings, first.weights) == (second.settings, second.weights)


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("extract nowhere c --image-encoder tests.toy:open_toy", "nowhere"),
        ("extract photos c", "encoder"),
        ("extract photos c --image-encoder timm:resnet81", "resnet81"),
        ("extract photos c --image-encoder tests.toy:open_toy --feature patchs", "patches"),
        ("extract photos cache --image-encoder tests.toy:open_toy,scale=2", "weights"),
        ("extract photos photos --image-encoder tests.toy:open_toy", "not empty"),
        ("extract photos cache --image-encoder tests.toy:open_toy --retry-failed --plan", "--plan"),
        ("train cache r --projector mpl", "mlp"),
        ("train cache r --feature image=open_toy/csl", "open_toy/cls"),
        ("train cache r --split stricct", "strict"),
        ("train cache r --batch-size 1", "--batch-size"),
        ("train cache r --split key --device cuda:77", "cuda:77"),
        ("train cache run --seed 7", "settings.seed"),
        ("inspect cache --output photos", "photos"),
        ("evaluate retrieval cache run --html photos", "photos"),
        ("evaluate retrieval cache run --control-run run", "--shuffle-pairs"),
        ("evaluate retrieval cache run run", "once"),
        ("evaluate retrieval run cache", "order"),
        ("evaluate zero-shot cache run --prompts cache", "prompts"),
        ("evaluate probe cache --feature open_toy/cls --classifier rigde --label key", "ridge"),
        ("evaluate probe cache --feature open_toy/cls --shots 1,x --label key", "'x'"),
        ("curate index cache photos --run run", "not empty"),
        ("curate index cache other --run run --memory 4X", "4X"),
        ("curate index cache other --run run --memory 1K", "memory"),
        ("curate index cache other --run run --factory IVF1,PQ1x4", "recall@10"),
        ("curate dedup cache --cosine 0.9", "OUT"),
        ("curate leaks cache cache", "same samples"),
        ("search index x -k 9999", "9999"),
        ("search index", "query"),
        ("search index x --label-value cat", "label"),
        ("search index --queries nowhere.txt", "nowhere.txt"),
        ("search index --query-concept red", "--concepts"),
        ("verify cache --reencode 0", "--reencode"),
    ],
)
def test_user_error_is_one_line_and_exit_1(folder: Path, line: str, word: str) -> None:
    done = embedcache(*line.split(), cwd=folder)
    assert done.code == 1, done.stderr
    (error,) = [text for text in done.stderr.splitlines() if text.startswith("error: ")]
    assert word in error
