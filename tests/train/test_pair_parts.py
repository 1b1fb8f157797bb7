"""A pair that starts from other runs and trains some of its parts."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from embedcache.errors import DataError, SettingError
from embedcache.runs import Run, is_finished
from embedcache.train.initialization import find_sources
from tests.train.runs import log_lines, run

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


def test_run_with_other_shapes_is_refused(cache_path: Path, finished: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="part image"):
        run(cache_path, tmp_path / "narrow", init_from=(f"image={finished}",), shared_width=8)
    with pytest.raises(DataError, match="part text"):
        run(cache_path, tmp_path / "glu", init_from=(f"text={finished}",), projector="mlp+glu", initialization="random")
    assert not is_finished(tmp_path / "glu")
