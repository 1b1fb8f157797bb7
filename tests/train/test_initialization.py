"""Initial weights of the towers, for rows in memory."""

import numpy as np
import pytest
import torch

from embedcache.arrays import Inputs, Ints, normalize
from embedcache.dataset.inputs import Reader
from embedcache.dataset.pairs import Items, Pairs
from embedcache.errors import DataError, SettingError
from embedcache.modeling.heads import AnyTower, Tower
from embedcache.projectors.pair import AlignedPair
from embedcache.train import initialization
from embedcache.train.initialization import initialize
from embedcache.train.settings import Initialization, ModelSettings

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
