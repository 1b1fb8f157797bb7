"""Training runs: what they learn, what they write, what they reuse and what they refuse."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from embedcache.arrays import Inputs
from embedcache.cli.config_files import read_config as read_options
from embedcache.dataset.pairs import Items, Pairs
from embedcache.dataset.splits import read_split
from embedcache.errors import (
    ArtifactError,
    CorruptError,
    DataError,
    FingerprintError,
    PathError,
    SettingError,
    UnknownNameError,
)
from embedcache.evaluate.retrieval import evaluate_retrieval
from embedcache.inference import load
from embedcache.modalities import noun
from embedcache.projectors.heads import ShareLockProjector
from embedcache.projectors.pair import AlignedPair
from embedcache.projectors.saved import load_pair, project, read_config, split_path
from embedcache.reports.summary import summarize
from embedcache.store.cache import Cache
from embedcache.train import train as train_module
from embedcache.train.batches import RowBatches
from embedcache.train.initialization import initialize
from embedcache.train.pair import PairTask, Validation
from embedcache.train.pair_batches import PairBatches
from embedcache.train.parts import source_digests
from embedcache.train.settings import train_settings
from embedcache.train.train import TrainReport
from tests.cli.run import embedcache
from tests.edits import edit_record, flip
from tests.recorded import RecordedProgress
from tests.train.runs import IMAGE, TEXT, beats_chance, log_lines, run


@pytest.fixture(scope="module")
def finished(cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with all defaults of `run`. Not to be changed."""
    path = tmp_path_factory.mktemp("finished") / "run"
    run(cache_path, path)
    return path


def test_split_that_was_just_written_is_not_read(
    cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("embedcache.train.data.read_split", None)
    assert run(cache_path, tmp_path / "run", epochs=1).num_samples == {"train": 195, "val": 30, "test": 75}


@pytest.mark.parametrize(("given", "is_noted"), [({}, True), ({"split": "strict"}, False), ({"split": "key"}, False)])
def test_column_that_no_split_follows_is_noted(
    labeled: Path, tmp_path: Path, given: dict[str, str], is_noted: bool
) -> None:
    progress = RecordedProgress()
    settings = train_settings({"epochs": 0, "cosine": 1.0, **given})
    train_module.train(labeled, tmp_path / "run", settings=settings, progress=progress)
    assert [note for note in progress.notes if note.endswith("; --split column follows it")] == progress.notes
    assert bool(progress.notes) == is_noted


@pytest.mark.slow
def test_run_folder_is_complete(cache_path: Path, tmp_path: Path) -> None:
    report = run(cache_path, tmp_path / "run", epochs=3)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        ".claims",
        "config.json",
        "last.safetensors",
        "losses.jsonl",
        "model.safetensors",
        "record.json",
        "split.parquet",
        "started.json",
    }
    assert report.num_samples == {"train": 195, "val": 30, "test": 75}
    losses = [line["loss"] for line in log_lines(tmp_path / "run") if "loss" in line]
    assert len(losses) == 3 * 4
    assert sum(losses[-4:]) < sum(losses[:4])  # of whole epochs: batches differ
    assert [line["epoch"] for line in log_lines(tmp_path / "run") if "validation" in line] == [0, 1, 2, 3]
    config = read_config(tmp_path / "run")
    assert config.tower_input("image").feature == IMAGE
    assert config.index_digest == Cache(cache_path).info.index_digest
    assert config.training["block_rows"] == 1
    assert report.num_parameters == sum(p.numel() for p in load_pair(tmp_path / "run")[0].parameters())


RANDOM = {"initialization": "random", "epochs": 6, "lr": 1e-2}
RECIPES: dict[str, dict[str, Any]] = {
    "cca mlp": {"initialization": "cca", "projector": "mlp"},
    "procrustes linear": {"initialization": "procrustes", "projector": "linear"},
    "ridge mlp": {"initialization": "ridge", "projector": "mlp"},
    "info_nce": {**RANDOM, "loss": "info_nce"},
    "multi_positive": {**RANDOM, "loss": "multi_positive", "projector": "linear"},
    "siglip": {**RANDOM, "loss": "siglip"},
    "sail": {**RANDOM, "loss": "sail", "epochs": 10},
    "mixup and structure": {**RANDOM, "mixup": 0.3, "structure": 2.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_training_beats_chance(cache_path: Path, tmp_path: Path, recipe: str) -> None:
    report = run(cache_path, tmp_path / "run", shrinkage=0.01, **{"epochs": 4, **RECIPES[recipe]})
    assert beats_chance(evaluate_retrieval(cache_path, [tmp_path / "run"]))
    if RECIPES[recipe]["initialization"] == "random":
        assert report.best_epoch > 0


@pytest.mark.slow
@pytest.mark.parametrize("projector", ["fusemix", "glu", "identity+sharelock"])
def test_every_projector_beats_chance(
    cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, projector: str
) -> None:
    monkeypatch.setattr(ShareLockProjector, "HIDDEN_WIDTH", 256)  # 4,096 is slow on a CPU
    run(cache_path, tmp_path / "run", projector=projector, shared_width=48, shrinkage=0.01, epochs=8)
    assert beats_chance(evaluate_retrieval(cache_path, [tmp_path / "run"]))


@pytest.mark.slow
def test_shuffled_control_stays_at_chance(cache_path: Path, tmp_path: Path) -> None:
    run(cache_path, tmp_path / "run", epochs=5, shuffle_pairs=True)
    report = evaluate_retrieval(cache_path, [tmp_path / "run"])
    assert report.recalls["i2t"]["r@5"].value < report.chance["i2t"]["r@5"].high + 0.1


@pytest.mark.slow
def test_same_seed_gives_the_same_weights(cache_path: Path, finished: Path, tmp_path: Path) -> None:
    for name, seed in (("b", 0), ("c", 4)):
        torch.manual_seed(seed + 1)  # the caller's generator must not matter
        run(cache_path, tmp_path / name, seed=seed, split_seed=0)
    b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "bc")
    assert (finished / "model.safetensors").read_bytes() == b != c


def test_zero_epochs_keep_the_closed_form(cache_path: Path, tmp_path: Path) -> None:
    assert run(cache_path, tmp_path / "run", epochs=0).best_epoch == 0
    pair, _ = load_pair(tmp_path / "run")
    vectors = Cache(cache_path).feature("image", IMAGE).load()
    unit = vectors.astype(np.float32) / np.linalg.norm(vectors.astype(np.float32), axis=1, keepdims=True)
    linear = (unit - pair.tower("image").mean.numpy()) @ pair.tower("image").projector.linear.weight.detach().numpy().T
    linear /= np.linalg.norm(linear, axis=1, keepdims=True)
    np.testing.assert_allclose(project(pair.tower("image"), Inputs(vectors)), linear, atol=1e-5)


@pytest.mark.slow
def test_mapped_features_train_the_same(cache_path: Path, finished: Path, tmp_path: Path) -> None:
    run(cache_path, tmp_path / "run", memory=1, block_rows=1)
    assert (finished / "model.safetensors").read_bytes() == (tmp_path / "run/model.safetensors").read_bytes()
    run(cache_path, tmp_path / "blocks", memory=1, epochs=0)
    assert read_config(tmp_path / "blocks").training["block_rows"] == 64


@pytest.mark.slow
def test_bfloat16_trains(cache_path: Path, tmp_path: Path) -> None:
    report = run(cache_path, tmp_path / "run", precision="bfloat16", initialization="random", epochs=3)
    assert report.best_epoch > 0


def test_finished_run_is_reused(cache_path: Path, finished: Path) -> None:
    before = {path: path.read_bytes() for path in finished.iterdir()}
    again = run(cache_path, finished, memory=2**30)
    assert again.reused
    assert again.recalls == json.loads((finished / "record.json").read_text())["outcome"]["recalls"]
    assert before == {path: path.read_bytes() for path in finished.iterdir()}
    with pytest.raises(FingerprintError, match=r"training\.seed: .*0.*1.*; give the path"):
        run(cache_path, finished, seed=1, split_seed=0)


@pytest.mark.parametrize("name", ["model.safetensors", "split.parquet"])
def test_damaged_run_is_not_reused(cache_path: Path, finished: Path, tmp_path: Path, name: str) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    flip(copy / name, position=100)
    with pytest.raises(CorruptError, match=f"{name}.*config.json was written for"):
        run(cache_path, copy)
    (copy / name).unlink()
    with pytest.raises(CorruptError, match=f"{name}.*config.json was written for"):
        run(cache_path, copy)


def test_foreign_record_is_refused(cache_path: Path, finished: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(finished, tmp_path / "copy"))
    for outcome in ({}, {"reused": False, "later_figure": 1}):
        edit_record(copy / "record.json", outcome=outcome)
        with pytest.raises(CorruptError, match=r"record\.json"):
            run(cache_path, copy)
    run(cache_path, tmp_path / "other", epochs=0, seed=7)
    shutil.copy(tmp_path / "other" / "record.json", copy)
    with pytest.raises(CorruptError, match="another"):
        run(cache_path, copy)


def test_foreign_folder_is_refused_and_untouched(cache_path: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", "thesis.tex"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(PathError, match=r"model\.safetensors, thesis\.tex"):
        run(cache_path, tmp_path)
    assert {path.read_text() for path in tmp_path.iterdir()} == {"mine"}
    (tmp_path / "config.json").write_text('{"hidden_size": 3}')
    with pytest.raises(ArtifactError, match=r"config\.json was not written by embedcache"):
        run(cache_path, tmp_path)


@pytest.mark.slow
def test_unfinished_run_is_trained_again(cache_path: Path, finished: Path, tmp_path: Path) -> None:
    shutil.copytree(finished, tmp_path / "run")
    weights = (tmp_path / "run/model.safetensors").read_bytes()
    (tmp_path / "run/config.json").unlink()
    with pytest.raises(PathError, match=r"it has no config\.json"):
        load_pair(tmp_path / "run")
    assert not run(cache_path, tmp_path / "run").reused
    assert (tmp_path / "run/model.safetensors").read_bytes() == weights


def test_changed_config_is_refused(cache_path: Path, finished: Path, tmp_path: Path) -> None:
    """By each way to read it."""
    changed = Path(shutil.copytree(finished, tmp_path / "run"))
    path = changed / "config.json"
    path.write_text(path.read_text().replace('"shuffle_pairs": false', '"shuffle_pairs": true '))
    readers: list[Callable[[], object]] = [
        lambda: read_config(changed),
        lambda: load(changed),
        lambda: summarize(changed),
        lambda: source_digests([str(changed)]),
        lambda: read_options(path),
        lambda: run(cache_path, changed),
        lambda: read_split(changed / "split.parquet", [Cache(cache_path)]),
    ]
    for read in readers:
        with pytest.raises(CorruptError, match=r"config\.json has changed since it was written; restore the file"):
            read()
    assert "written; restore" in embedcache("inspect", changed, cwd=tmp_path).stderr
    edit_record(path)
    assert read_config(changed).training["shuffle_pairs"]
    record = changed / "record.json"
    record.write_text(record.read_text().replace('"best_epoch": ', '"best_epoch": 1'))
    with pytest.raises(CorruptError, match=r"record\.json has changed since it was written; restore the file"):
        summarize(changed)
    for name, text in (("record.json", "[]"), ("config.json", "{"), ("config.json", '{"format": 1}')):
        (changed / name).write_text(text)
        result = embedcache("inspect", changed, cwd=tmp_path)
        assert (result.code, result.stderr.count("\n")) == (1, 1), result.stderr


def test_swapped_weights_are_refused(cache_path: Path, finished: Path, tmp_path: Path) -> None:
    run(cache_path, tmp_path / "a", seed=1, epochs=0)
    (tmp_path / "a/model.safetensors").write_bytes((finished / "model.safetensors").read_bytes())
    with pytest.raises(CorruptError, match=r"not the file that config\.json was written for"):
        load_pair(tmp_path / "a")


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"image": "open_toy/clss"}, UnknownNameError, "clss"),
        ({"image": None}, UnknownNameError, "patches"),
        ({"image": "open_toy/patches"}, DataError, "vector"),
        ({"image": "open_toy/patches", "projector": "token+mlp", "mixup": 1.0}, SettingError, "mixup"),
        ({"image": "open_toy/cls+open_toy/patches", "projector": "cls_token+mlp"}, DataError, "48"),
        ({"projector": "lineal"}, UnknownNameError, "lineal"),
        ({"loss": "siglib"}, UnknownNameError, "siglib"),
        ({"loss": "info_nce", "captions": "all"}, SettingError, "captions"),
        ({"loss": "embedcache.train.losses:InfoNce", "captions": "all"}, SettingError, "captions"),
        ({"language": "xx"}, UnknownNameError, "language"),
        ({"device": "cuda:77"}, SettingError, "cuda:77"),
        ({"batch_size": 196}, SettingError, "195"),
        ({"batch_size": 3, "mixup": 1.0}, SettingError, "at least 4"),
        ({"projector": "glu", "initialization": "cca"}, SettingError, "glu"),
    ],
)
def test_invalid_options_raise(
    cache_path: Path, tmp_path: Path, options: dict[str, Any], error: type[Exception], word: str
) -> None:
    with pytest.raises(error, match=word):
        run(cache_path, tmp_path / "run", **options)


@pytest.mark.slow
def test_split_of_another_run_is_used(cache_path: Path, tmp_path: Path) -> None:
    run(cache_path, tmp_path / "a", epochs=0, split_seed=3)
    given = {"split": str(tmp_path / "a" / "split.parquet"), "epochs": 0}
    run(cache_path, tmp_path / "b", **given)
    assert (tmp_path / "a/split.parquet").read_bytes() == (tmp_path / "b/split.parquet").read_bytes()
    assert run(cache_path, tmp_path / "b", **given).reused
    run(cache_path, tmp_path / "c", epochs=0, split_seed=4)
    (tmp_path / "a/split.parquet").write_bytes((tmp_path / "c/split.parquet").read_bytes())
    with pytest.raises(FingerprintError, match=r"file_digests\.split: "):
        run(cache_path, tmp_path / "b", **given)


@pytest.mark.slow
def test_files_of_a_run_may_move(cache_path: Path, tmp_path: Path) -> None:
    """The run of a copied study, whose split and selection are then at other paths."""
    run(cache_path, tmp_path / "first", epochs=0)
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        shutil.copy(split_path(tmp_path / "first"), tmp_path / name / "split.parquet")
        (tmp_path / name / "keys.txt").write_text("".join(f"{number:05d}\n" for number in range(250)))

    def again(folder: str) -> TrainReport:
        given = {"split": str(tmp_path / folder / "split.parquet"), "selection": str(tmp_path / folder / "keys.txt")}
        return run(cache_path, tmp_path / "run", epochs=0, **given)

    again("here")
    assert again("there").reused
    with (tmp_path / "there" / "keys.txt").open("a") as file:
        file.write("00250\n")
    with pytest.raises(FingerprintError, match="was made with other settings: file_digests.selection: stored"):
        again("there")


def test_file_named_like_a_split_is_not_read(cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "key").write_text("a file that happens to have this name")
    run(cache_path, tmp_path / "run", epochs=0, split="key")
    assert read_config(tmp_path / "run").file_digests == {}


def test_training_uses_only_its_part(cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[int]] = {"initialization": set(), "validation": set(), "batches": set()}
    flops: list[float] = []

    def watched_initialize(pair: AlignedPair, pairs: Pairs, *rest: Any, **more: Any) -> None:
        seen["initialization"].update(pairs.samples)
        initialize(pair, pairs, *rest, **more)

    def watched_validation(pairs: Pairs, *rest: Any, **more: Any) -> Validation:
        seen["validation"].update(pairs.samples)
        return Validation(pairs, *rest, **more)

    def watched_batches(pairs: Pairs, **more: Any) -> PairBatches:
        seen["batches"].update(pairs.samples)
        return PairBatches(pairs, **more)

    def watched_task(*, forward_flops: float, **more: Any) -> PairTask:
        flops.append(forward_flops)
        return PairTask(forward_flops=forward_flops, **more)

    monkeypatch.setattr(train_module, "PairTask", watched_task)
    monkeypatch.setattr(train_module, "initialize", watched_initialize)
    monkeypatch.setattr(train_module, "Validation", watched_validation)
    monkeypatch.setattr(train_module, "PairBatches", watched_batches)
    report = run(cache_path, tmp_path / "run", epochs=1)
    assert flops == [64 * report.flops_per_pair]  # of a batch
    split = read_split(tmp_path / "run/split.parquet", [Cache(cache_path)])
    assert seen["initialization"] == seen["batches"] == set(split.rows("train"))
    assert seen["validation"] == set(split.rows("val"))


@pytest.mark.slow
@pytest.mark.parametrize("split", ["key", "strict"])
def test_progress_begins_before_the_first_step(cache_path: Path, tmp_path: Path, split: str) -> None:
    progress, cache = RecordedProgress(), Cache(cache_path)
    report = run(cache_path, tmp_path / "run", split=split, cosine=0.9999, progress=progress)
    features = [cache.feature("image", IMAGE), cache.feature("text", TEXT)]
    loading = [(f"loading {feature.name}", feature.num_items, noun(feature.modality)) for feature in features]
    pairing, splitting = ("pairing", 2 * len(cache), "items"), ("splitting", len(cache), "samples")
    sides = zip(("image", "text"), loading, strict=True)
    comparing = [(f"comparing {name} items for the split", count, "items") for name, (_, count, _) in sides]
    steps = [splitting, *loading] if split == "key" else [*loading, *comparing, splitting]
    assert progress.started[:-2] == [pairing, *steps]
    assert [what for what, *_ in progress.started[-2:]] == ["initializing", "training"]
    assert progress.started[-2][1] >= report.num_samples["train"]
    assert progress.counts == {what: total for what, total, _ in progress.started}


@pytest.mark.slow
def test_weights_of_the_best_epoch_are_kept(cache_path: Path, tmp_path: Path) -> None:
    report = run(cache_path, tmp_path / "run", epochs=6, lr=0.5)  # far too high: recall falls at once
    scores = {line["epoch"]: line["validation"] for line in log_lines(tmp_path / "run") if "validation" in line}
    best = max(scores, key=lambda epoch: sum(scores[epoch].values()))
    assert report.best_epoch == best != 6
    pair, _ = load_pair(tmp_path / "run")
    cache = Cache(cache_path)
    pairs = train_module.open_data(cache_path, {"image": IMAGE, "text": "open_toy/mean"}, memory_bytes=10**9)
    split = read_split(tmp_path / "run/split.parquet", [cache])
    validation = Validation(pairs.pairs(None).select(split.rows("val")), *pairs.readers.values(), device="cpu")
    assert validation.recalls(pair) == pytest.approx(scores[best])


@pytest.mark.parametrize(
    ("count", "given", "expected"), [(1025, None, [513, 512]), (1024, None, [1024]), (9, 9, [9]), (9, 2, [3, 2, 2, 2])]
)
def test_a_batch_has_1024_samples_or_all(count: int, given: int | None, expected: list[int]) -> None:
    rows = np.arange(count)
    items = Items(rows=rows, samples=rows, contents=rows)
    settings = train_settings({"batch_size": given, "block_rows": 1})
    batches = train_module._make_batches(Pairs(first=items, second=items), settings, [None, None], None)
    assert [len(batch.samples) for batch in batches.epoch(0)] == expected


def test_each_process_has_an_item_of_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = np.arange(9)
    items = Items(rows=rows, samples=rows, contents=rows)
    pairs = Pairs(first=items, second=items)
    settings = train_settings({"batch_size": 3, "block_rows": 1})
    for processes in (1, 3, 4):
        monkeypatch.setattr("embedcache.train.distributed.num_processes", lambda processes=processes: processes)
        plans: list[Callable[[], Any]] = [
            lambda: train_module._make_batches(pairs, settings, [None, None], None),
            lambda: RowBatches(rows, batch_size=3, seed=0),
        ]
        for plan in plans:
            if processes <= 3:
                assert plan().num_steps == 3
                continue
            with pytest.raises(SettingError, match="4 processes"):
                plan()


def test_towers_without_parameters_are_not_trained(cache_path: Path, tmp_path: Path) -> None:
    report = run(cache_path, tmp_path / "run", projector="asif", shared_width=40)
    assert (report.best_epoch, report.pairs_per_s) == (0, 0.0)
    assert [list(line) for line in log_lines(tmp_path / "run")] == [["epoch", "validation"]]


@pytest.mark.slow
def test_patience_stops_training(cache_path: Path, tmp_path: Path) -> None:
    report = run(cache_path, tmp_path / "run", epochs=50, lr=0.05, batch_size=32, patience=2)
    epochs = [line["epoch"] for line in log_lines(tmp_path / "run") if "validation" in line]
    assert max(epochs) == report.best_epoch + 2 < 50


def test_nan_weights_are_refused(finished: Path) -> None:
    pair, _ = load_pair(finished)
    assert not pair.training
    torch.nn.init.constant_(pair.tower("image").projector.linear.weight, float("nan"))
    with pytest.raises(DataError, match="the projected feature .*NaN"):
        project(pair.tower("image"), Inputs(np.ones((3, 48))))


def test_nan_loss_names_step_and_temperature(cache_path: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="loss is nan"):
        run(cache_path, tmp_path / "run", epochs=5, lr=1e30)


def test_projections_that_overflow_after_the_last_step_name_it(cache_path: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="after step 0"):
        run(cache_path, tmp_path / "run", epochs=1, batch_size=195, lr=1e30)


@pytest.mark.slow
def test_several_threads_give_the_same_weights(cache_path: Path, tmp_path: Path) -> None:
    options = {"threads": 2, "batch_size": 195, "initialization": "random", "epochs": 1}
    for name in "ab":
        run(cache_path, tmp_path / name, **options)
    a, b = ((tmp_path / name / "last.safetensors").read_bytes() for name in "ab")
    assert a == b
