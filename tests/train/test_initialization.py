"""Initial weights of the towers: for rows in memory, and of parts of other runs."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from embedcache.arrays import Inputs, Ints, normalize
from embedcache.dataset.inputs import Reader
from embedcache.dataset.pairs import Items, Pairs
from embedcache.errors import DataError, SettingError
from embedcache.modeling.heads import AnyTower, Tower
from embedcache.projectors.pair import AlignedPair
from embedcache.runs import Run
from embedcache.train import initialization
from embedcache.train.initialization import find_sources, initialize
from embedcache.train.settings import Initialization, ModelSettings
from tests.train.runs import log_lines, run

NUM_SAMPLES = 30
RNG = np.random.default_rng(0)
IMAGES = RNG.standard_normal((NUM_SAMPLES, 6)).astype(np.float32) + 1
TEXTS = RNG.standard_normal((2 * NUM_SAMPLES, 5)).astype(np.float32) - 1


def make_pairs(num_samples: int = NUM_SAMPLES) -> Pairs:
    """Sample k has image k and captions 2k and 2k + 1."""
    samples = np.arange(num_samples)
    texts = np.arange(2 * num_samples)
    return Pairs(
        first=Items(rows=samples, samples=samples, contents=samples),
        second=Items(rows=texts, samples=texts // 2, contents=texts),
    )


def reader(values: np.ndarray) -> Reader:
    return lambda rows: Inputs(values[rows])


READ_IMAGES, READ_TEXTS = reader(IMAGES), reader(TEXTS)


def unread(rows: Ints) -> Inputs:
    raise AssertionError("a feature of tokens was read")


def initialized(
    projector: str,
    *,
    kind: Initialization | None = None,
    shared_width: int = 8,
    pairs: Pairs | None = None,
    image: Reader = READ_IMAGES,
    text: Reader = READ_TEXTS,
    seed: int = 0,
) -> AlignedPair:
    torch.manual_seed(0)
    pair = AlignedPair(projector, widths={"image": 6, "text": 5}, shared_width=shared_width).eval()
    settings = ModelSettings(projector=projector, shared_width=shared_width, initialization=kind)
    initialize(pair, pairs or make_pairs(), {"image": image, "text": text}, settings, seed=seed)
    return pair


def anchors(tower: AnyTower) -> torch.Tensor:
    found: torch.Tensor = tower.projector.anchors
    return found


def centered(values: np.ndarray) -> np.ndarray:
    rows = normalize(values)
    return normalize(rows - rows.mean(axis=0))


def test_anchors_of_both_towers_are_the_same_pairs() -> None:
    pair = initialized("asif", shared_width=40)
    images = (anchors(pair.tower("image")).numpy() @ centered(IMAGES).T).argmax(axis=1)
    texts = (anchors(pair.tower("text")).numpy() @ centered(TEXTS).T).argmax(axis=1)
    np.testing.assert_allclose(anchors(pair.tower("image")), centered(IMAGES)[images], atol=1e-5)
    np.testing.assert_allclose(anchors(pair.tower("text")), centered(TEXTS)[texts], atol=1e-5)
    np.testing.assert_array_equal(images, texts // 2)
    assert len(set(texts)) == 40
    again, other = (anchors(initialized("asif", shared_width=40, seed=seed).text) for seed in (0, 1))
    assert torch.equal(again, anchors(pair.text))
    assert not torch.equal(other, anchors(pair.text))


def test_too_few_pairs_for_anchors_raise() -> None:
    initialized("asif", shared_width=10, pairs=make_pairs(5))
    with pytest.raises(SettingError, match="got 10"):
        initialized("asif", shared_width=11, pairs=make_pairs(5))
    initialized("linear", shared_width=11, pairs=make_pairs(5))


@pytest.mark.parametrize("kind", ["cca", "csa", "procrustes", "ridge"])
def test_one_vector_in_all_pairs_has_no_closed_form(kind: Initialization) -> None:
    for images in (np.tile(IMAGES[:1], (NUM_SAMPLES, 1)), np.zeros_like(IMAGES)):
        with pytest.raises(DataError, match="directions"):
            initialized("linear", kind=kind, image=reader(images))
    initialized("linear", kind="random", image=reader(images))
    images = IMAGES.copy()
    images[17, 2] = np.inf
    with pytest.raises(DataError, match="17"):
        initialized("linear", kind=kind, image=reader(images))


def test_token_towers_are_unchanged_and_unread() -> None:
    found = initialized("token", kind="random", image=unread, text=unread).state_dict()
    torch.manual_seed(0)
    fresh = AlignedPair("token", widths={"image": 6, "text": 5}, shared_width=8).state_dict()
    assert all(torch.equal(found[name], value) for name, value in fresh.items())
    pair = initialized("token+mlp", image=unread)
    np.testing.assert_allclose(pair.tower("text").mean, normalize(TEXTS).mean(axis=0), atol=1e-6)


def test_raw_tower_has_the_root_mean_square_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initialization, "_BLOCK", 7)
    raw = "embedcache.modeling.heads:OpenClipLinear"
    pair = initialized(f"{raw}+{raw}")
    for tower, values in ((pair.tower("image"), IMAGES), (pair.tower("text"), TEXTS)):
        np.testing.assert_allclose(tower.length, np.sqrt((values.astype(np.float64) ** 2).sum(axis=1).mean()))
    pair = initialized(f"{raw}+linear", image=reader(np.zeros_like(IMAGES)))
    assert pair.tower("image").length == 1


@pytest.mark.parametrize("projector", ["token", "token+linear", "asif", "linear+glu"])
def test_closed_form_needs_two_linear_branches(projector: str) -> None:
    with pytest.raises(SettingError, match="csa"):
        initialized(projector, kind="csa", image=unread, text=unread)


@pytest.mark.parametrize("kind", ["cca", "csa", "procrustes", "ridge"])
def test_closed_form_aligns_pairs(kind: Initialization) -> None:
    texts = np.repeat(IMAGES[:, :5], 2, axis=0)
    pair = initialized("linear", kind=kind, text=reader(texts))
    with torch.no_grad():
        image, text = pair.tower("image")(torch.from_numpy(IMAGES)), pair.tower("text")(torch.from_numpy(texts[::2]))
    np.testing.assert_allclose(image.pow(2).sum(dim=1).mean(), 1, atol=1e-3)
    sims = torch.nn.functional.normalize(image, dim=-1) @ torch.nn.functional.normalize(text, dim=-1).T
    assert (sims.argmax(dim=1) == torch.arange(NUM_SAMPLES)).float().mean() > 0.6


def test_many_pairs_are_thinned_out_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(initialization, "_BLOCK", 4)
    monkeypatch.setattr(initialization, "MAX_PAIRS", 30)
    read: list[int] = []

    def read_images(rows: Ints) -> Inputs:
        read.extend(rows.tolist())
        return Inputs(IMAGES[rows])

    pair = initialized("linear", image=read_images)
    assert sorted(set(read)) == [image for image in range(NUM_SAMPLES) if image // 2 % 2 == 0]  # 60 pairs, 2 per image
    image = pair.tower("image")
    assert isinstance(image, Tower)
    np.testing.assert_allclose(image.mean, normalize(IMAGES[sorted(set(read))]).mean(axis=0), atol=1e-6)


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
