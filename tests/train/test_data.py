"""What a run is trained on: several caches, some of the samples, all captions, tokens."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedcache.dataset.selections import read_selection
from embedcache.dataset.splits import read_split
from embedcache.errors import CorruptError, DataError, FingerprintError, PathError, SettingError, UnfinishedError
from embedcache.evaluate.retrieval import evaluate_retrieval
from embedcache.extract.extract import extract
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from embedcache.train.data import open_data
from embedcache.train.settings import train_settings
from embedcache.train.train import TrainReport, train
from tests.pictures import write_pictures
from tests.toy import IMAGE, TEXT


def run(
    caches: Path | list[Path],
    run_path: Path,
    *,
    image: str = "open_toy/cls",
    text: str = "open_toy/mean",
    **options: object,
) -> TrainReport:
    settings = train_settings({"shared_width": 16, "epochs": 2, "batch_size": 32, "split": "key", **options})
    return train(caches, run_path, image=image, text=text, settings=settings)  # type: ignore[arg-type]


def test_two_caches_train_as_one_and_each_is_evaluated_with_the_run(two_caches: list[Path], tmp_path: Path) -> None:
    report = run(two_caches, tmp_path / "run")
    assert sum(report.num_samples.values()) == 120
    split = read_split(tmp_path / "run/split.parquet", [Cache(path) for path in two_caches])
    for path, parts in zip(two_caches, (split.parts[:40], split.parts[40:]), strict=True):
        assert evaluate_retrieval(path, [tmp_path / "run"]).num_images == [parts.count("test")]
    assert run(two_caches, tmp_path / "run").reused
    with pytest.raises(FingerprintError, match="index_digest: '.*' there, '.*' asked"):
        run(two_caches[::-1], tmp_path / "run")


def test_a_cache_that_the_run_was_not_trained_on_is_measured_whole(
    cache_path: Path, two_caches: list[Path], tmp_path: Path
) -> None:
    run(two_caches, tmp_path / "run", epochs=0)
    report = evaluate_retrieval(cache_path, [tmp_path / "run"])
    assert (report.part, report.num_images) == ("all samples", [300])


def test_caches_of_different_encoders_are_not_joined(two_caches: list[Path], tmp_path: Path) -> None:
    source = open_source(write_pictures(tmp_path / "s", 10))
    extract(source, tmp_path / "c", image_encoders=["tests.toy:open_toy,scale=2"], text_encoders=[TEXT])
    with pytest.raises(FingerprintError, match=r"open_toy/cls of .*a was made with other settings: .* asked; .*c"):
        open_data([two_caches[0], tmp_path / "c"], image="open_toy/cls", text="open_toy/mean", memory_gb=1)
    with pytest.raises(DataError, match="a and .*a hold the same samples"):
        open_data([two_caches[0], two_caches[0]], image="open_toy/cls", text="open_toy/mean", memory_gb=1)


def test_a_feature_that_is_not_finished_is_named(two_caches: list[Path], tmp_path: Path) -> None:
    source = open_source(write_pictures(tmp_path / "s", 10))
    extract(source, tmp_path / "c", image_encoders=[IMAGE], text_encoders=[TEXT])
    next((tmp_path / "c/image/open_toy/chunks").iterdir()).unlink()
    with pytest.raises(UnfinishedError, match="open_toy/cls is not finished: 1 of 1 chunks are missing"):
        run([two_caches[0], tmp_path / "c"], tmp_path / "run")


def test_a_batch_larger_than_the_data_names_both(cache_path: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="batch size is 196, and there are 195 samples to train on; use"):
        run(cache_path, tmp_path / "run", batch_size=196)
    assert run(cache_path, tmp_path / "run2", batch_size=195).best_epoch >= 0


def test_a_selection_is_what_is_trained_on_and_what_is_held_out_stays(cache_path: Path, tmp_path: Path) -> None:
    keys = Cache(cache_path).samples["key"].to_pylist()
    (tmp_path / "keys.txt").write_text("\n".join(keys[:100]) + "\n")
    pq.write_table(pa.table({"row": range(100), "key": keys[:100], "reason": ["first"] * 100}), tmp_path / "s.parquet")
    whole = run(cache_path, tmp_path / "whole")
    texts, tables = (
        run(cache_path, tmp_path / name, selection=str(tmp_path / file))
        for name, file in (("text", "keys.txt"), ("table", "s.parquet"))
    )
    split = read_split(tmp_path / "text/split.parquet", [Cache(cache_path)])
    assert texts.num_samples["train"] == split.parts[:100].count("train") < whole.num_samples["train"]
    assert {part: texts.num_samples[part] for part in ("val", "test")} == {
        part: whole.num_samples[part] for part in ("val", "test")
    }
    assert (tmp_path / "text/model.safetensors").read_bytes() == (tmp_path / "table/model.safetensors").read_bytes()
    assert tables.recalls == texts.recalls


def test_selections_that_fit_nothing_are_named(cache_path: Path, tmp_path: Path) -> None:
    caches = [Cache(cache_path)]
    (tmp_path / "other.txt").write_text("00001\nno such key\n")
    with pytest.raises(DataError, match="of 2 keys names 'no such key'; 1 are no keys of .* has 300, such as '00000'"):
        read_selection(tmp_path / "other.txt", caches)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(DataError, match="of 0 keys names nothing"):
        read_selection(tmp_path / "empty.txt", caches)
    with pytest.raises(PathError, match=r"selection .*no\.parquet does not exist"):
        read_selection(tmp_path / "no.parquet", caches)
    (tmp_path / "x.parquet").write_text("?")
    with pytest.raises(CorruptError, match="is no selection"):
        read_selection(tmp_path / "x.parquet", caches)
    pq.write_table(pa.table({"name": ["00001"]}), tmp_path / "y.parquet")
    with pytest.raises(CorruptError, match="must be Parquet with a column key"):
        read_selection(tmp_path / "y.parquet", caches)
    test_keys = [key for key, part in zip(*_parts(cache_path, tmp_path), strict=True) if part == "test"]
    (tmp_path / "test.txt").write_text("\n".join(test_keys))
    with pytest.raises(DataError, match="the training part has no sample .* that selection .*test.txt names"):
        run(cache_path, tmp_path / "run", selection=str(tmp_path / "test.txt"))


def _parts(cache_path: Path, tmp_path: Path) -> tuple[list[str], list[str]]:
    run(cache_path, tmp_path / "parts", epochs=0)
    split = read_split(tmp_path / "parts/split.parquet", [Cache(cache_path)])
    return split.keys, split.parts


@pytest.mark.parametrize("loss", ["multi_positive", "siglip", "sail"])
def test_all_captions_are_positives(tmp_path: Path, loss: str) -> None:
    folder = write_pictures(tmp_path / "s", 120)
    for path in sorted(folder.glob("*.txt"))[::2]:
        path.write_text(path.read_text() + "a picture with a " + path.read_text())
    extract(open_source(folder), tmp_path / "c", image_encoders=[IMAGE], text_encoders=[TEXT])
    report = run(tmp_path / "c", tmp_path / "run", captions="all", loss=loss, epochs=20, initialization="random")
    assert report.best_epoch > 0
    found = evaluate_retrieval(tmp_path / "c", [tmp_path / "run"])
    assert found.recalls["i2t"]["r@5"].value > 2 * found.chance["i2t"]["r@5"].high


@pytest.mark.parametrize("options", [{"mixup": 1.0}, {"structure": 1.0}, {"mixup": 0.3, "structure": 2.0}])
def test_it_learns_with_mixup_and_with_the_regularizer(
    cache_path: Path, tmp_path: Path, options: dict[str, float]
) -> None:
    run(cache_path, tmp_path / "run", initialization="random", epochs=20, **options)
    found = evaluate_retrieval(cache_path, [tmp_path / "run"])
    assert found.recalls["i2t"]["r@5"].value > 2 * found.chance["i2t"]["r@5"].high


def test_a_selection_that_changed_is_another_run(cache_path: Path, tmp_path: Path) -> None:
    keys = Cache(cache_path).samples["key"].to_pylist()
    (tmp_path / "keys.txt").write_text("\n".join(keys[:150]))
    run(cache_path, tmp_path / "run", selection=str(tmp_path / "keys.txt"))
    assert run(cache_path, tmp_path / "run", selection=str(tmp_path / "keys.txt")).reused
    (tmp_path / "keys.txt").write_text("\n".join(keys[:100]))
    with pytest.raises(FingerprintError, match=r"given\.selection: '.*' there, '.*' asked"):
        run(cache_path, tmp_path / "run", selection=str(tmp_path / "keys.txt"))


def test_a_split_that_is_given_and_read_anew_is_the_same_run(two_caches: list[Path], tmp_path: Path) -> None:
    run(two_caches, tmp_path / "both", epochs=0)
    given = {"split": str(tmp_path / "both/split.parquet"), "epochs": 0}
    run(two_caches[1], tmp_path / "one", **given)
    assert run(two_caches[1], tmp_path / "one", **given).reused


def test_several_threads_give_the_same_weights(cache_path: Path, tmp_path: Path) -> None:
    for name in "ab":
        run(cache_path, tmp_path / name, threads=2, batch_size=195, shared_width=256, initialization="random")
    a, b = ((tmp_path / name / "last.safetensors").read_bytes() for name in "ab")
    assert a == b


def test_training_stops_early_when_recall_does(cache_path: Path, tmp_path: Path) -> None:
    report = run(cache_path, tmp_path / "run", epochs=50, lr=0.05, patience=2)
    lines = [json.loads(line) for line in (tmp_path / "run/losses.jsonl").read_text().splitlines()]
    assert max(line["epoch"] for line in lines if "validation" in line) == report.best_epoch + 2 < 50


def test_tensorboard_gets_what_the_lines_say(cache_path: Path, tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(cache_path, tmp_path / "run", tensorboard=True)
    lines = [json.loads(line) for line in (tmp_path / "run/losses.jsonl").read_text().splitlines()]
    events = event_accumulator.EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    losses = [event.value for event in events.Scalars("loss")]
    np.testing.assert_allclose(losses, [line["loss"] for line in lines if "loss" in line], rtol=1e-6)
    assert len(events.Scalars("i2t r@1")) == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("image", "text", "projector"),
    [
        ("open_toy/patches", "open_toy/tokens", "token"),
        ("open_toy/patches", "open_toy/mean", "token+mlp"),
        ("open_toy/cls", "open_toy/tokens", "mlp+token_mlp"),
        ("open_toy/cls", "open_toy/mean", "token+token_mlp"),
    ],
)
def test_token_features_train_and_rank(
    cache_path: Path, two_caches: list[Path], tmp_path: Path, image: str, text: str, projector: str
) -> None:
    run(cache_path, tmp_path / "run", image=image, text=text, projector=projector, epochs=30, lr=0.01)
    found = evaluate_retrieval(cache_path, [tmp_path / "run"])
    assert found.recalls["i2t"]["r@5"].value > 2 * found.chance["i2t"]["r@5"].high
    run(two_caches, tmp_path / "two", image=image, text=text, projector=projector, epochs=1, memory_gb=0)


def test_what_does_not_fit_tokens_is_refused(cache_path: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="open_toy/tokens has several vectors an item, and the projector mlp takes one"):
        run(cache_path, tmp_path / "run", text="open_toy/tokens", projector="mlp")
    with pytest.raises(SettingError, match="--mixup is for vectors, and open_toy/patches has several vectors an item"):
        run(cache_path, tmp_path / "run", image="open_toy/patches", projector="token+mlp", mixup=1.0)
    with pytest.raises(DataError, match="open_toy/cls is 48 wide and open_toy/patches 3: only features of one encoder"):
        run(cache_path, tmp_path / "run", image="open_toy/cls+open_toy/patches", projector="cls_token+mlp")
