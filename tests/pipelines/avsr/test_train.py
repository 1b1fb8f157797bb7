"""Training of speech recognizers: one stream, then the fusion on both complete runs with their encoders frozen."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from embedcache.derive.derive import derive_from_run
from embedcache.errors import FingerprintError
from embedcache.runs import is_finished
from embedcache.store.cache import Cache
from pipelines.avsr.network import load_network
from pipelines.avsr.train import encode_utterances, train_speech
from pipelines.avsr.utterances import (
    SpeechAugmentation,
    Utterances,
    mask_spans,
    open_utterances,
)
from tests.crash import crash_function
from tests.pipelines.avsr.cases import MODEL, QUIET, fit_settings, make_cache, recipe, utterances

pytestmark = pytest.mark.slow

PARTS = "fusion+ctc+attention"


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("speech")
    return make_cache(folder / "train", 40), make_cache(folder / "valid", 12, first=100)


@pytest.fixture(scope="module")
def runs(caches: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each stream, and the states of its encoder in both caches."""
    found = {}
    for name in ("audio", "video"):
        found[name] = tmp_path_factory.mktemp("runs") / name
        train_speech(*(utterances(cache, name) for cache in caches), found[name], recipe(), fit_settings())
        for cache in caches:
            derive_from_run(cache, found[name], f"{name}-states", dtype="float32")
    return found


def states(cache: Path) -> Utterances:
    names = {name: f"{name}-{name}-states/{name}-states" for name in ("audio", "video")}
    return open_utterances(Cache(cache), names)


def train_fusion(caches: tuple[Path, Path], run: Path, runs: dict[str, Path], *, on_states: bool) -> Path:
    both = [utterances(cache, "audio", "video") for cache in caches]
    derived = tuple(states(cache) for cache in caches) if on_states else None
    settings = fit_settings(init_from=tuple(f"{name}={start}" for name, start in runs.items()), trainable=PARTS)
    train_speech(both[0], both[1], run, recipe(model={**MODEL, "fusion_layers": 1}), settings, states=derived)  # type: ignore[arg-type]
    return run


@pytest.mark.no_mutants
def test_a_recognizer_learns_letters_from_sound_or_lips(caches: tuple[Path, Path], tmp_path: Path) -> None:
    for name, epochs, seed in (("audio", 40, 0), ("video", 20, 2)):
        data = [utterances(cache, name) for cache in caches]
        settings = fit_settings(epochs=epochs, lr=1e-2, batch_size=4, seed=seed)
        report = train_speech(*data, tmp_path / name, recipe(ctc_weight=1.0), settings)
        assert report.measures["WER plain"] < 0.35
        assert set(report.measures) == {"WER plain"}


def train_with_views(caches: tuple[Path, Path], run: Path, checkpoint_s: float) -> None:
    """Train on drawn views, in a process of its own."""
    augmentation = SpeechAugmentation(views={"audio": {"plain": 0.5, QUIET: 0.5}}, masked=0.2)
    data = [utterances(cache, "audio", views={"audio": ["plain", QUIET]}) for cache in caches]
    train_speech(*data, run, recipe(augmentation=augmentation), fit_settings(checkpoint_s=checkpoint_s))


def test_an_interrupted_run_resumes_to_the_same_bytes(caches: tuple[Path, Path], tmp_path: Path) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train_with_views(caches, whole, 60.0)
    crash_function(train_with_views, (caches, killed, 0.0), "after", "checkpoint.pt", 7)
    assert not is_finished(killed)
    train_with_views(caches, killed, 0.0)
    for name in ("model.safetensors", "losses.jsonl"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


def test_training_on_derived_states_is_training_through_the_frozen_encoders(
    caches: tuple[Path, Path], runs: dict[str, Path], tmp_path: Path
) -> None:
    losses = []
    for name, on_states in (("through", False), ("states", True)):
        run = train_fusion(caches, tmp_path / name, runs, on_states=on_states)
        lines = [json.loads(line) for line in (run / "losses.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)
    outputs = []
    data = utterances(caches[1], "audio", "video")
    for name in ("through", "states"):
        module, _ = load_network(tmp_path / name)
        parts = encode_utterances(module, data)
        outputs.append(torch.cat([module.ctc_log_probs(part)[part.is_valid_BT] for part in parts]))
        for stream, start in runs.items():
            own = {key: value for key, value in load_file(start / "model.safetensors").items() if stream in key}
            assert len(own) > 10
            assert all(torch.equal(module.state_dict()[key], value) for key, value in own.items())
    torch.testing.assert_close(outputs[0], outputs[1], atol=1e-3, rtol=1e-3)


def test_states_of_another_run_are_refused(caches: tuple[Path, Path], runs: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "audio"
    train_speech(*(utterances(cache, "audio") for cache in caches), other, recipe(), fit_settings(seed=1))
    with pytest.raises(FingerprintError, match="audio encoder: expected states that were derived from the run"):
        train_fusion(caches, tmp_path / "av", {**runs, "audio": other}, on_states=True)


@pytest.mark.parametrize("length", [12, 70, 300])
@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.5, 0.8])
def test_masked_spans_cover_the_fraction_in_the_mean(fraction: float, length: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(5, 1, (1000, length + 10, 1)).astype(np.float32)
    is_masked = (mask_spans(values, np.full(1000, length), fraction, rng) != values)[..., 0]
    assert not is_masked[:, length:].any()
    assert is_masked[:, :length].mean() == pytest.approx(fraction, abs=0.02)
    assert is_masked[:, :length].mean(axis=1).max() <= min(1, 2 * fraction) + 1 / length
