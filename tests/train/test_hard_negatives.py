"""Hard negatives, and parts that start from other runs."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from embedcache.curate.negatives import mine_negatives
from embedcache.dataset.selections import read_negatives
from embedcache.dataset.splits import read_split
from embedcache.errors import DataError, FingerprintError, PathError, SettingError
from embedcache.runs import Run
from embedcache.store.cache import Cache
from embedcache.train.batches import PairBatches
from embedcache.train.initialization import find_sources
from tests.recorded import RecordedProgress
from tests.train.runs import IMAGE, TEXT, log_lines, run
from tests.train.test_resume import assert_same_run, run_interrupted
from tests.train.test_resume import run as run_whole


@pytest.fixture(scope="module")
def table(cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hard negatives of all samples, also of those that are held out. Not to be changed."""
    path = tmp_path_factory.mktemp("mined") / "negatives-0.parquet"
    options = {"modality": "image", "cosine": 0.999, "num_negatives": 5}
    mine_negatives(cache_path, path, feature={"image": IMAGE, "text": TEXT}, **options)
    return path


@pytest.mark.slow
def test_hard_negatives_of_the_training_part_are_added(
    cache_path: Path, table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, draw = [], PairBatches._draw_hard

    def watch(*args: object) -> np.ndarray:
        hard = draw(*args)  # type: ignore[arg-type]
        batches: PairBatches = args[0]  # type: ignore[assignment]
        seen.append((batches._samples[args[1]], batches._samples[hard]))  # type: ignore[index]
        return hard

    monkeypatch.setattr(PairBatches, "_draw_hard", watch)
    progress, path = RecordedProgress(), str(table).replace("-0", "-{seed}")
    report = run(cache_path, tmp_path / "run", negatives=path, num_negatives=2, progress=progress)
    train = set(read_split(tmp_path / "run/split.parquet", [Cache(cache_path)]).rows("train").tolist())
    negatives = read_negatives([table], [Cache(cache_path)])
    num_some = sum(bool(train & set(negatives.negatives_SK[sample].tolist())) for sample in train)
    assert progress.notes == [f"{num_some} of {len(train)} training samples have hard negatives in the training part"]
    assert {sample for _, hard in seen for sample in hard.tolist()} <= train
    for own, hard in seen:
        assert len(own) <= 22  # 64 // 3 and one
        assert np.isin(hard, negatives.negatives_SK[own]).all()
        assert not set(own.tolist()) & set(hard.tolist())
    assert sum(len(own) for own, _ in seen) == 2 * report.num_samples["train"]
    steps = [line for line in log_lines(tmp_path / "run") if "loss" in line]
    assert len(steps) == len(seen)
    assert set(Run.open(tmp_path / "run").info.digests) == {"negatives 0"}


@pytest.mark.slow
def test_resume_with_hard_negatives_is_identical(cache_path: Path, table: Path, tmp_path: Path) -> None:
    options = {"negatives": str(table), "mixup": 0.0, "epochs": 2}
    run_whole(cache_path, tmp_path / "whole", **options)
    run_interrupted(cache_path, tmp_path / "run", 5, **options)
    run_whole(cache_path, tmp_path / "run", **options)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_another_table_is_another_run(cache_path: Path, table: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.parquet"
    shutil.copy(table, copy)
    run(cache_path, tmp_path / "run", epochs=1, negatives=str(copy))
    copy.unlink()
    with pytest.raises(PathError, match="got nothing"):
        run(cache_path, tmp_path / "run", epochs=1, negatives=str(copy))
    mine_negatives(cache_path, copy, feature={"image": IMAGE, "text": TEXT}, cosine=0.999)
    with pytest.raises(FingerprintError, match="negatives 0"):
        run(cache_path, tmp_path / "run", epochs=1, negatives=str(copy))


@pytest.mark.slow
def test_useless_hard_negatives_are_refused(
    cache_path: Path, table: Path, two_caches: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(SettingError, match="mixup"):
        run(cache_path, tmp_path / "run", negatives=str(table), mixup=1.0)
    with pytest.raises(DataError, match="negatives-0"):
        run(two_caches[0], tmp_path / "other", negatives=str(table))
    assert not (tmp_path / "other").exists()
    few = tmp_path / "few.txt"  # two samples of one group have no negatives among them
    groups = read_negatives([table], [Cache(cache_path)]).groups_S
    twins = np.flatnonzero(groups == np.bincount(groups).argmax())
    few.write_text("\n".join(Cache(cache_path).column("key")[int(row)].as_py() for row in twins))
    with pytest.raises(DataError, match="got none"):
        run(cache_path, tmp_path / "few", negatives=str(table), selection=str(few), batch_size=None)


PARTS = {"image": ["image"], "text": ["text"], "temperature": ["log_scale"]}


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], {}),
        (["run"], {"image": "run", "text": "run", "temperature": "run"}),
        (["text=a"], {"text": "a"}),
        (["text=a", "run"], {"image": "run", "text": "a", "temperature": "run"}),
        (["run", "image=a", "text=b"], {"image": "a", "text": "b", "temperature": "run"}),
        (["lr=0.1"], {"image": "lr=0.1", "text": "lr=0.1", "temperature": "lr=0.1"}),
    ],
)
def test_sources_of_parts(
    words: list[str], expected: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lr=0.1").mkdir()  # a folder whose name looks like a part and its run
    assert find_sources(words, PARTS) == {name: Path(run) for name, run in expected.items()}
    for twice in (["a", "b"], ["text=a", "text=b"]):
        with pytest.raises(SettingError, match="expected one run"):
            find_sources(twice, PARTS)


@pytest.fixture(scope="module")
def finished(cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run. Not to be changed."""
    path = tmp_path_factory.mktemp("parts") / "run"
    run(cache_path, path, seed=1)
    return path


def changed_parts(found: Path, start: Path) -> set[str]:
    """Return the first names of all last weights that differ from the kept ones of another run."""
    after, before = load_file(found / "last.safetensors"), load_file(start / "model.safetensors")
    return {name.partition(".")[0] for name in before if not torch.equal(after[name], before[name])}


@pytest.mark.parametrize(
    ("trainable", "changed"),
    [("text", {"text"}), ("image+temperature", {"image", "log_scale"}), (None, {"image", "text", "log_scale"})],
)
def test_only_trainable_parts_change(
    cache_path: Path, finished: Path, tmp_path: Path, trainable: str | None, changed: set[str]
) -> None:
    report = run(cache_path, tmp_path / "run", init_from=(str(finished),), trainable=trainable, loss="siglip")
    assert changed_parts(tmp_path / "run", finished) == changed
    opened = Run.open(tmp_path / "run")
    trained = sum(value.numel() for name, value in opened.pair.named_parameters() if name.partition(".")[0] in changed)
    assert report.num_parameters == trained
    assert opened.info.digests == {"init_from *": Run.open(finished).info.weights}


@pytest.mark.slow
def test_temperature_is_set_after_that_of_another_run(cache_path: Path, finished: Path, tmp_path: Path) -> None:
    options = {"init_from": (str(finished),), "temperature": 0.2}
    run(cache_path, tmp_path / "fixed", **options, trainable="image+text")
    assert Run.open(tmp_path / "fixed").pair.temperature.item() == pytest.approx(0.2)
    run(cache_path, tmp_path / "learned", **options)
    found = [line["temperature"] for line in log_lines(tmp_path / "learned") if "temperature" in line]
    assert 0.19 < found[-1] < found[0] < 0.2


def test_closed_form_of_the_other_tower_is_kept_out(cache_path: Path, finished: Path, tmp_path: Path) -> None:
    run(cache_path, tmp_path / "run", init_from=(f"image={finished}",), epochs=0)
    run(cache_path, tmp_path / "random", initialization="random", epochs=0)
    assert changed_parts(tmp_path / "run", finished) == {"text", "log_scale"}
    assert changed_parts(tmp_path / "run", tmp_path / "random") == {"image"}
