"""Eigen-features of points, on shapes whose features are known, and copies of arrays."""

import numpy as np
import pytest

from embedcache.encoders.open import open_encoder
from embedcache.errors import ItemError
from embedcache.testing.encoders import PointsEncoderContract, example_points
from pipelines.summit.encoders import CELL_SIZES_M, FIELDS, GEOMETRY, PER_SCALE, SCALES, eigen_features

LINEARITY, PLANARITY, SCATTERING, VARIATION, VERTICALITY, LOG_RADIUS, Z_RANGE, Z_ABOVE = range(len(PER_SCALE))


class TestGeometry(PointsEncoderContract):
    has_weights = False

    @pytest.fixture
    def spec(self) -> str:
        return GEOMETRY


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


class TestFields(PointsEncoderContract):
    has_weights = False

    @pytest.fixture
    def spec(self) -> str:
        return FIELDS


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
