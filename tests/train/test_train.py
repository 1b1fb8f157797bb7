import json
from pathlib import Path

import numpy as np
import pytest
import torch

from embedcache.arrays import Inputs
from embedcache.dataset.pairs import Pairs
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
from embedcache.projectors.pair import AlignedPair
from embedcache.projectors.saved import load_pair, project, read_config
from embedcache.store.cache import Cache
from embedcache.train import train as train_module
from embedcache.train.batches import Batches
from embedcache.train.initialization import start
from embedcache.train.losses import LOSSES
from embedcache.train.settings import (
    LossSettings,
    MachineSettings,
    ModelSettings,
    OptimizerSettings,
    SplitSettings,
    TrainSettings,
)
from embedcache.train.train import TrainReport, train
from embedcache.train.trainer import lr, make_optimizer
from embedcache.train.validation import Validation

IMAGE, TEXT = "open_toy/cls", "open_toy/mean"
SPLIT = SplitSettings(kind="key")


def run(cache_path: Path, run_path: Path, *, epochs: int = 3, **settings: object) -> TrainReport:
    given = {
        "model": ModelSettings(shared_width=16),
        "optimizer": OptimizerSettings(epochs=epochs, batch_size=64),
        "split": SPLIT,
        **settings,
    }
    return train(cache_path, run_path, image=IMAGE, text=TEXT, settings=TrainSettings(**given))  # type: ignore[arg-type]


def test_a_run_leaves_all_that_says_what_it_is(cache_path: Path, tmp_path: Path) -> None:
    report = run(cache_path, tmp_path / "run")
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
    lines = [json.loads(line) for line in (tmp_path / "run" / "losses.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert len(losses) == 3 * 4
    assert sum(losses[-4:]) < sum(losses[:4])  # of whole epochs: batches differ
    assert [line["epoch"] for line in lines if "validation" in line] == [0, 1, 2, 3]
    config = read_config(tmp_path / "run")
    assert config.image.feature == IMAGE
    assert config.index_digest == Cache(cache_path).info.index_digest
    assert report.num_parameters == sum(p.numel() for p in load_pair(tmp_path / "run")[0].parameters())


@pytest.mark.parametrize("projector", ["linear", "mlp"])
@pytest.mark.parametrize("start", ["cca", "procrustes", "ridge", "random"])
def test_it_learns_what_pictures_and_captions_share(
    cache_path: Path, tmp_path: Path, projector: str, start: str
) -> None:
    model = ModelSettings(projector=projector, initialization=start, shared_width=16, shrinkage=0.01)  # type: ignore[arg-type]
    run(cache_path, tmp_path / "run", epochs=20, model=model)
    report = evaluate_retrieval(cache_path, [tmp_path / "run"])
    assert report.recalls["i2t"]["r@5"].value > 2 * report.chance["i2t"]["r@5"].high


@pytest.mark.parametrize("loss", LOSSES.paths)
def test_it_learns_with_every_loss(cache_path: Path, tmp_path: Path, loss: str) -> None:
    model = ModelSettings(initialization="random", shared_width=16)
    report = run(cache_path, tmp_path / "run", epochs=20, model=model, loss=LossSettings(name=loss))
    assert report.best_epoch > 0
    found = evaluate_retrieval(cache_path, [tmp_path / "run"])
    assert found.recalls["i2t"]["r@5"].value > 2 * found.chance["i2t"]["r@5"].high


@pytest.mark.slow
@pytest.mark.parametrize("projector", ["fusemix", "glu", "identity+sharelock", "mlp+linear"])
def test_it_learns_with_every_projector(cache_path: Path, tmp_path: Path, projector: str) -> None:
    model = ModelSettings(projector=projector, shared_width=48, shrinkage=0.01)
    run(cache_path, tmp_path / "run", epochs=8, model=model)
    report = evaluate_retrieval(cache_path, [tmp_path / "run"])
    assert report.recalls["i2t"]["r@5"].value > 2 * report.chance["i2t"]["r@5"].high


def test_a_closed_form_that_a_projector_cannot_start_from_is_refused(cache_path: Path, tmp_path: Path) -> None:
    model = ModelSettings(projector="glu", initialization="cca", shared_width=16)
    with pytest.raises(
        SettingError, match="a projector of glu has no linear branch that --initialization cca could set"
    ):
        run(cache_path, tmp_path / "run", model=model)


def test_an_unknown_loss_is_refused(cache_path: Path, tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown loss 'siglib'; did you mean 'siglip'"):
        run(cache_path, tmp_path / "run", loss=LossSettings(name="siglib"))


def test_pairs_that_were_shuffled_teach_nothing(cache_path: Path, tmp_path: Path) -> None:
    run(cache_path, tmp_path / "run", epochs=5, shuffle_pairs=True)
    report = evaluate_retrieval(cache_path, [tmp_path / "run"])
    assert report.recalls["i2t"]["r@5"].value < report.chance["i2t"]["r@5"].high + 0.1


def test_the_same_seed_gives_the_same_weights(cache_path: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        torch.manual_seed(len(name) * seed)  # what the caller's generator holds does not matter
        run(cache_path, tmp_path / name, seed=seed)
    a, b, c = ((tmp_path / name / "model.safetensors").read_bytes() for name in "abc")
    assert a == b != c


def test_no_epochs_keep_the_closed_form(cache_path: Path, tmp_path: Path) -> None:
    assert run(cache_path, tmp_path / "run", epochs=0).best_epoch == 0
    cache = Cache(cache_path)
    pair, _ = load_pair(tmp_path / "run")
    vectors = cache.feature("image", IMAGE).load()
    unit = vectors.astype(np.float32) / np.linalg.norm(vectors.astype(np.float32), axis=1, keepdims=True)
    linear = (unit - pair.image.mean.numpy()) @ pair.image.projector.linear.weight.detach().numpy().T
    linear /= np.linalg.norm(linear, axis=1, keepdims=True)
    np.testing.assert_allclose(project(pair.image, Inputs(vectors)), linear, atol=1e-5)


def test_mapped_features_train_the_same(cache_path: Path, tmp_path: Path) -> None:
    run(cache_path, tmp_path / "a")
    run(cache_path, tmp_path / "b", machine=MachineSettings(memory_gb=0.0), block_rows=1)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_bfloat16_trains(cache_path: Path, tmp_path: Path) -> None:
    report = run(
        cache_path,
        tmp_path / "run",
        machine=MachineSettings(precision="bfloat16"),
        model=ModelSettings(initialization="random", shared_width=16),
    )
    assert report.best_epoch > 0


def test_a_finished_run_is_used_again_and_another_is_refused(cache_path: Path, tmp_path: Path) -> None:
    first = run(cache_path, tmp_path / "run")
    again = run(cache_path, tmp_path / "run", machine=MachineSettings(memory_gb=1.0))
    assert not first.reused
    assert again.reused
    assert again.recalls == first.recalls
    with pytest.raises(FingerprintError, match=r"training\.seed: 0 there, 1 asked; give the path"):
        run(cache_path, tmp_path / "run", seed=1)


def test_a_folder_with_other_things_is_refused_and_untouched(cache_path: Path, tmp_path: Path) -> None:
    for name in ("model.safetensors", "thesis.tex"):
        (tmp_path / name).write_text("mine")
    with pytest.raises(PathError, match=r"is not a run and not empty: it holds model\.safetensors, thesis\.tex"):
        run(cache_path, tmp_path)
    assert {path.read_text() for path in tmp_path.iterdir()} == {"mine"}
    (tmp_path / "config.json").write_text('{"hidden_size": 3}')
    with pytest.raises(ArtifactError, match=r"config\.json was not written by embedcache"):
        run(cache_path, tmp_path)


def test_a_device_that_is_not_there_is_named(cache_path: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingError, match="no device 'cuda:77' here"):
        run(cache_path, tmp_path / "run", machine=MachineSettings(device="cuda:77"))


def test_a_run_that_was_stopped_is_trained_again(cache_path: Path, tmp_path: Path) -> None:
    run(cache_path, tmp_path / "run")
    weights = (tmp_path / "run/model.safetensors").read_bytes()
    (tmp_path / "run/config.json").unlink()
    with pytest.raises(PathError, match=r"is not a finished run: it has no config\.json"):
        load_pair(tmp_path / "run")
    assert not run(cache_path, tmp_path / "run").reused
    assert (tmp_path / "run/model.safetensors").read_bytes() == weights


def test_weights_that_were_exchanged_are_refused(cache_path: Path, tmp_path: Path) -> None:
    run(cache_path, tmp_path / "a")
    run(cache_path, tmp_path / "b", seed=1)
    (tmp_path / "a/model.safetensors").write_bytes((tmp_path / "b/model.safetensors").read_bytes())
    with pytest.raises(CorruptError, match="not the file that config.json was written for"):
        load_pair(tmp_path / "a")


def test_mistakes_are_named(cache_path: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UnknownNameError, match=r"'open_toy/clss'; did you mean 'open_toy/cls'\?; known: .*open_toy/patches"
    ):
        train(cache_path, tmp_path / "run", image="open_toy/clss", text=TEXT)
    with pytest.raises(UnknownNameError, match="or --feature: open_toy/cls, open_toy/patches"):
        train(cache_path, tmp_path / "run")
    with pytest.raises(
        DataError, match="open_toy/patches has several vectors an item, and the projector mlp takes one"
    ):
        train(cache_path, tmp_path / "run", image="open_toy/patches", text=TEXT)
    with pytest.raises(UnknownNameError, match="unknown projector 'lineal'; did you mean 'linear'"):
        run(cache_path, tmp_path / "run", model=ModelSettings(projector="lineal"))
    with pytest.raises(UnknownNameError, match="name no language; leave --language out"):
        run(cache_path, tmp_path / "run", language="xx")
    with pytest.raises(SettingError, match="batch size is 1"):
        OptimizerSettings(batch_size=1)


def test_the_split_of_another_run_is_taken_over(cache_path: Path, tmp_path: Path) -> None:
    run(cache_path, tmp_path / "a", split=SplitSettings(kind="key", seed=3))
    taken = SplitSettings(kind=str(tmp_path / "a" / "split.parquet"))
    run(cache_path, tmp_path / "b", split=taken)
    assert (tmp_path / "a/split.parquet").read_bytes() == (tmp_path / "b/split.parquet").read_bytes()
    assert run(cache_path, tmp_path / "b", split=taken).reused
    run(cache_path, tmp_path / "c", split=SplitSettings(kind="key", seed=4))
    (tmp_path / "a/split.parquet").write_bytes((tmp_path / "c/split.parquet").read_bytes())
    with pytest.raises(FingerprintError, match=r"given\.split: '.*' there, '.*' asked"):
        run(cache_path, tmp_path / "b", split=taken)


def test_training_sees_its_own_part_only(cache_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[int]] = {"start": set(), "validation": set(), "batches": set()}
    monkeypatch.setattr(
        train_module,
        "start",
        lambda pair, pairs, *rest, **more: (seen["start"].update(pairs.samples), start(pair, pairs, *rest, **more)),
    )

    class Watched(Validation):
        def __init__(self, pairs: Pairs, *rest: object, **more: object) -> None:
            seen["validation"].update(pairs.samples)
            super().__init__(pairs, *rest, **more)  # type: ignore[arg-type]

    class WatchedBatches(Batches):
        def __init__(self, pairs: Pairs, **more: int) -> None:
            seen["batches"].update(pairs.samples)
            super().__init__(pairs, **more)

    monkeypatch.setattr(train_module, "Validation", Watched)
    monkeypatch.setattr(train_module, "Batches", WatchedBatches)
    run(cache_path, tmp_path / "run")
    split = read_split(tmp_path / "run/split.parquet", [Cache(cache_path)])
    assert seen["start"] == seen["batches"] == set(split.rows("train"))
    assert seen["validation"] == set(split.rows("val"))


def test_the_weights_of_the_best_epoch_are_kept(cache_path: Path, tmp_path: Path) -> None:
    optimizer = OptimizerSettings(epochs=6, batch_size=64, lr=0.5)  # far too high: recall falls at once
    report = run(cache_path, tmp_path / "run", optimizer=optimizer)
    lines = [json.loads(line) for line in (tmp_path / "run/losses.jsonl").read_text().splitlines()]
    scores = {line["epoch"]: line["validation"] for line in lines if "validation" in line}
    best = max(scores, key=lambda epoch: sum(scores[epoch].values()))
    assert report.best_epoch == best != 6
    found = evaluate_retrieval(cache_path, [tmp_path / "run"], part="val").recalls
    assert {f"{way} {name}": found[way][name].value for way in found for name in found[way]} == pytest.approx(
        scores[best]
    )


def test_the_learning_rate_warms_up_and_falls_to_zero_and_vectors_do_not_decay() -> None:
    pair = AlignedPair("mlp", image_width=8, text_width=6, shared_width=4)
    settings = OptimizerSettings(epochs=10, warmup_fraction=0.2, weight_decay=0.3)
    optimizer = make_optimizer(pair, settings)
    rates = [lr(settings, step, 100) for step in range(100)]
    assert rates[0] < rates[10] < rates[19] == max(rates) == 1e-3
    assert rates[20:] == sorted(rates[20:], reverse=True)
    assert rates[-1] < 1e-5
    decayed = {id(parameter) for parameter in optimizer.param_groups[0]["params"]}
    for name, parameter in pair.named_parameters():
        assert (id(parameter) in decayed) == (parameter.ndim > 1), name
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]


def test_the_temperature_stays_in_its_range() -> None:
    pair = AlignedPair("linear", image_width=2, text_width=2, shared_width=2)
    assert pair.temperature.item() == pytest.approx(0.07)
    for log_scale, expected in ((50.0, 0.001), (-50.0, 0.5)):
        torch.nn.init.constant_(pair.log_scale, log_scale)
        assert pair.temperature.item() == pytest.approx(expected)


def test_weights_that_are_no_numbers_are_refused(cache_path: Path, tmp_path: Path) -> None:
    run(cache_path, tmp_path / "run")
    pair, _ = load_pair(tmp_path / "run")
    assert not pair.training
    torch.nn.init.constant_(pair.image.projector.linear.weight, float("nan"))
    with pytest.raises(DataError, match="the projected feature holds NaN or infinity in 3 of 3 rows"):
        project(pair.image, Inputs(np.ones((3, 48))))


def test_a_loss_that_is_no_number_stops_with_step_and_temperature(cache_path: Path, tmp_path: Path) -> None:
    optimizer = OptimizerSettings(epochs=5, batch_size=64, lr=1e30)
    with pytest.raises(DataError, match=r"the loss is nan at step \d+ with temperature .*lower --lr"):
        run(cache_path, tmp_path / "run", optimizer=optimizer)
