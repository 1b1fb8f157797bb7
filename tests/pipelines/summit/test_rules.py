"""Rules and encoders of point clouds."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.interpolate import RegularGridInterpolator

from embedcache.derive.derive import derive, derive_from_run
from embedcache.derive.rules import Derivation, Rule
from embedcache.encoders.base import EncoderSettings
from embedcache.encoders.open import open_encoder
from embedcache.errors import ItemError
from embedcache.extract.extract import extract
from embedcache.extract.repair import verify_cache
from embedcache.extract.settings import ExtractSettings
from embedcache.runs import Run, RunInfo, RunInput
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from embedcache.store.layout import Axis
from embedcache.testing.encoders import PointsEncoderContract, example_points
from pipelines.summit.encoders import CELL_SIZES_M, FIELDS, GEOMETRY, PER_SCALE, SCALES, eigen_features
from pipelines.summit.networks import RUN_KIND, PointNetworks, predict_points
from pipelines.summit.pseudo_labels import (
    CertaintyThresholds,
    ModalityPredictions,
    agree,
    fit_gaussians,
    keep_certain,
    recover_labels,
    weight_by_entropy,
)
from pipelines.summit.rules import AGREE, CERTAIN, LIFT, RECOVER, WEIGHT_BY_ENTROPY, lift_parameters, sample_grid
from pipelines.worlds.street import KIND

ENCODER = "lite:efficientnet-lite0,fit=128x64"

LAYERS = ("layer3.patches", "layer5.patches")

PATCHES = [f"efficientnet-lite0/{layer}" for layer in LAYERS]

UV = ("points", "fields/uv")

C = 7


@pytest.mark.slow
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 1000))
def test_sampling_matches_scipy(rows: int, columns: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(rows, columns, 2)).astype(np.float32)
    box = (0.1, 0.0, 0.9, 0.5)
    uv = rng.random((40, 2)).astype(np.float32)
    found = sample_grid(values.reshape(-1, 2), Axis(kind="grid", rows=rows, columns=columns, box=box), uv)
    v = np.clip((uv[:, 1] - box[1]) / (box[3] - box[1]) * rows - 0.5, 0, rows - 1)
    u = np.clip((uv[:, 0] - box[0]) / (box[2] - box[0]) * columns - 0.5, 0, columns - 1)
    padded = np.pad(values, ((0, 1), (0, 1), (0, 0)), mode="edge")  # scipy needs two points along each axis
    expected = RegularGridInterpolator((np.arange(rows + 1), np.arange(columns + 1)), padded)(np.stack([v, u], axis=1))
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A street with frames of which some have no image, lifted features, and the outputs of a random run."""
    folder = tmp_path_factory.mktemp("street")
    path = folder / "cache"
    source = open_source("world=5,frames=1,test=1,domains=night", kind=KIND)
    encoder = EncoderSettings(features=LAYERS)
    encoders = {"image": [ENCODER], "points": [GEOMETRY, FIELDS]}
    features = (*encoder.features, "points", "uv", "label")
    extract(source, path, encoder=encoders, settings=ExtractSettings(features=features, chunk_size=2))
    derive(path, lift(path))
    run = make_run(path, folder / "run")
    for output in ("image-prob", "image-hidden", "points-prob", "points-hidden"):
        derive_from_run(path, run, output, name=output)
    return path


def lift(path: Path, **changes: Any) -> Derivation:
    inputs = [UV, *(("image", name) for name in PATCHES)]
    options = {"name": "lifted", "inputs": inputs, "rule": LIFT, "parameters": lift_parameters(Cache(path), PATCHES)}
    return Derivation(**{**options, **changes})


def make_run(path: Path, run: Path) -> Path:
    """A run with random weights on the lifted features and on those of geometry."""
    sides = {}
    for name, feature in (("image", "lifted/lifted"), ("points", "eigen/points")):
        stored = Cache(path).feature("points", feature)
        sides[name] = RunInput(
            modality="points", feature=feature, spec="", fingerprint=stored.fingerprint, width=stored.item_shape[1]
        )
    widths = {name: side.width for name, side in sides.items()}
    info = RunInfo(kind=RUN_KIND, arguments={"widths": widths, "num_classes": C}, inputs=sides)
    torch.manual_seed(0)
    module = PointNetworks(widths=widths, num_classes=C)
    with torch.no_grad():
        for name in widths:
            module[name].head.weight *= 20  # predictions that are certain for some points
    return Run.create(run, info).finish(module.eval(), {}).path


def values_of(path: Path, name: str) -> dict[int, np.ndarray]:
    """Return the values of a feature of points by row, of the rows that have it."""
    feature = Cache(path).feature("points", name)
    rows = np.flatnonzero(feature.valid)
    return dict(zip(rows.tolist(), feature.gather_tokens(rows), strict=True))


@pytest.mark.slow
def test_lifted_features_are_those_of_the_pixels(cache: Path) -> None:
    lifted, uv = values_of(cache, "lifted/lifted"), values_of(cache, "fields/uv")
    samples = Cache(cache).samples
    splits = samples["split"].to_pylist()
    without_image = [row for row, split in enumerate(splits) if split == "points"]
    assert sorted(set(uv) - set(lifted)) == without_image
    failures = Cache(cache).feature("points", "lifted/lifted").failures
    assert {failures[row] for row in without_image} == {"no image in its sample"}
    image_rows = {row: number for number, row in enumerate(sorted(lifted))}
    for row, number in image_rows.items():
        parts = []
        for name in PATCHES:
            feature = Cache(cache).feature("image", name)
            assert feature.axis is not None
            parts.append(sample_grid(feature.gather(np.array([number]))[0], feature.axis, uv[row]))
        np.testing.assert_allclose(
            lifted[row], np.concatenate(parts, axis=1), atol=2e-2, rtol=2e-3
        )  # stored as float16


@pytest.mark.slow
def test_outputs_of_a_run_are_its_predictions(cache: Path) -> None:
    module = Run.open(cache.parent / "run").module
    assert isinstance(module, PointNetworks)
    for name, feature in (("image", "lifted/lifted"), ("points", "eigen/points")):
        stored = values_of(cache, feature)
        prob, hidden = values_of(cache, f"{name}-prob/{name}-prob"), values_of(cache, f"{name}-hidden/{name}-hidden")
        for row in prob:
            expected = predict_points(module[name], stored[row].astype(np.float32))
            np.testing.assert_allclose(prob[row], expected.prob_NC, atol=1e-3)
            np.testing.assert_allclose(hidden[row], expected.hidden_NP, atol=1e-2, rtol=1e-2)


@pytest.mark.slow
def test_pseudo_labels_match_the_formulas(cache: Path) -> None:
    """Check the chain of rules, chunk by chunk, against the functions on all points at once."""
    names = ("image-prob", "image-hidden", "points-prob", "points-hidden")
    inputs = {name: ("points", f"{name}/{name}") for name in names}
    stored = {name: values_of(cache, feature) for name, (_, feature) in inputs.items()}
    rows = sorted(stored["image-prob"])
    first, first_hidden, second, second_hidden = (
        np.concatenate([stored[name][row] for row in rows]).astype(np.float32) for name in names
    )

    def label(name: str, rule: Rule, *features: tuple[str, str], **parameters: float) -> tuple[str, str]:
        derive(cache, Derivation(name=name, inputs=features, rule=rule, parameters=parameters, dtype="int16"))
        return ("points", f"{name}/label")

    def labels_of(feature: tuple[str, str]) -> np.ndarray:
        found = values_of(cache, feature[1])
        assert sorted(found) == rows
        return np.concatenate([found[row] for row in rows])[:, 0]

    def certain(prob: np.ndarray) -> np.ndarray:
        return keep_certain(prob, CertaintyThresholds(C).add(prob).thresholds())

    both = [label(f"certain-{name}", CERTAIN, inputs[f"{name}-prob"]) for name in ("image", "points")]
    agreed = label("AF", AGREE, *both)
    assert np.array_equal(labels_of(agreed), agree(certain(first), certain(second)))

    weighting = {"gap": 0.5, "other_gap": 0.1}
    probs = [inputs["image-prob"], inputs["points-prob"]]
    derive(cache, Derivation(name="EW-prob", inputs=probs, rule=WEIGHT_BY_ENTROPY, parameters=weighting))
    fused = np.concatenate([values_of(cache, "EW-prob/prob")[row] for row in rows]).astype(np.float32)
    np.testing.assert_allclose(fused, weight_by_entropy(first, second, **weighting), atol=1e-3)
    weighted = label("EW", CERTAIN, ("points", "EW-prob/prob"))
    assert np.array_equal(labels_of(weighted), certain(fused))

    recovered = label("HT", RECOVER, weighted, *inputs.values(), k=0.8)
    before = certain(fused)
    modalities = [
        ModalityPredictions(hidden, prob.argmax(axis=1), fit_gaussians(hidden, before, C))
        for prob, hidden in ((first, first_hidden), (second, second_hidden))
    ]
    expected = recover_labels(before, *modalities, k=0.8)
    assert (expected != before).any()
    assert np.array_equal(labels_of(recovered), expected)
    assert Cache(cache).feature("points", "HT/label").dtype == "int16"
    assert verify_cache(cache).is_sound


LINEARITY, PLANARITY, SCATTERING, VARIATION, VERTICALITY, LOG_RADIUS, Z_RANGE, Z_ABOVE = range(len(PER_SCALE))


class TestPoints(PointsEncoderContract):
    has_weights = False

    @pytest.fixture(params=[GEOMETRY, FIELDS])
    def spec(self, request: pytest.FixtureRequest) -> str:
        spec: str = request.param
        return spec


def test_height_above_the_ground() -> None:
    """On a slope with a pole, the height of the pole's points is that above the ground near it."""
    grid = np.stack(np.meshgrid(np.arange(0, 40, 0.5), np.arange(0, 10, 0.5)), axis=-1).reshape(-1, 2)
    ground = np.column_stack([grid, 0.1 * grid[:, 0]])
    pole = np.column_stack([np.full(41, 30.0), np.full(41, 5.0), 3 + np.linspace(0, 4, 41)])
    features = eigen_features(np.concatenate([ground, pole]))
    near, far = features[:, -2], features[:, -1]
    assert CELL_SIZES_M == (2.0, 10.0)
    assert near[: len(ground)].max() < 0.1 * 4 + 1e-4  # a cell and the one beside it
    assert 4 <= near[-1] < 4.4
    assert 4 <= far[-1] < 4 + 0.1 * 20


def test_features_follow_their_definition() -> None:
    xyz = np.random.default_rng(0).normal(size=(80, 3)) * (3, 2, 1)
    point = 5
    features = eigen_features(xyz)[point]
    distances = np.linalg.norm(xyz - xyz[point], axis=1)
    for number, size in enumerate(SCALES):
        near = xyz[np.argsort(distances)[:size]]
        values, vectors = np.linalg.eigh(np.cov(near.T, bias=True))
        l3, l2, l1 = values
        expected = [
            (l1 - l2) / l1, (l2 - l3) / l1, l3 / l1, l3 / (l1 + l2 + l3), 1 - abs(vectors[2, 0]),
            np.log10(np.sort(distances)[size - 1] + 1e-3), np.ptp(near[:, 2]), xyz[point, 2] - near[:, 2].mean(),
        ]  # fmt: skip
        np.testing.assert_allclose(features[number * 8 : number * 8 + 8], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("xyz", "reason"),
    [
        (np.zeros((39, 3), np.float32), "too few points: expected at least 40, got 39"),
        (np.full((50, 3), np.nan, np.float32), "50 of 50 points have NaN or infinite coordinates"),
        (np.eye(3, dtype=np.float32).repeat(20, axis=0) * 1e9, r"extend over 1e\+09 m"),
    ],
)
def test_bad_points_fail_with_a_reason(xyz: np.ndarray, reason: str) -> None:
    with pytest.raises(ItemError, match=reason):
        open_encoder(GEOMETRY, modality="points").prepare([{"xyz": xyz}])


def test_values_are_copied_to_the_bit() -> None:
    encoder = open_encoder(FIELDS, modality="points")
    assert encoder.features == {"xyz": (-1, 3), "uv": (-1, 2), "label": (-1, 1)}
    items = example_points()
    found = encoder.encode(encoder.prepare(items), ["label", "xyz", "uv"])
    for number, item in enumerate(items):
        for name in ("xyz", "uv"):
            np.testing.assert_array_equal(found[name][number], item[name])
            assert found[name][number].dtype == np.float32
        np.testing.assert_array_equal(found["label"][number][:, 0], item["label"])
        assert found["label"][number].dtype == np.int16
