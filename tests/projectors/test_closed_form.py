import numpy as np
import pytest
import scipy.linalg
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cross_decomposition import CCA
from sklearn.linear_model import Ridge

from embedcache.projectors.closed_form import Moments, cca, ridge, solve


def aligned(rows: int, *, seed: int, widths: tuple[int, int] = (6, 5)) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    shared = rng.standard_normal((rows, 3))
    images = shared @ rng.standard_normal((3, widths[0])) + 0.5 * rng.standard_normal((rows, widths[0])) + 2
    texts = shared @ rng.standard_normal((3, widths[1])) + 0.5 * rng.standard_normal((rows, widths[1])) - 1
    return images, texts


def moments(images: np.ndarray, texts: np.ndarray) -> Moments:
    result = Moments(images.shape[1], texts.shape[1])
    result.add(images, texts)
    return result


@given(st.integers(2, 40), st.integers(1, 39), st.integers(0, 100))
def test_moments_are_the_same_for_any_batches(rows: int, cut: int, seed: int) -> None:
    images, texts = aligned(rows, seed=seed)
    parts = Moments(6, 5)
    for part in (slice(cut), slice(cut, None)):
        parts.add(images[part].astype(np.float32), texts[part].astype(np.float32))
    for found, expected in zip(parts.covariances(), moments(images, texts).covariances(), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4)
    np.testing.assert_allclose(parts.first_mean, images.mean(axis=0), atol=1e-5)


def test_cca_matches_scikit_learn() -> None:
    images, texts = aligned(500, seed=1)
    image_DP, text_DP = cca(moments(images, texts), 3, shrinkage=1e-9)
    ours = [
        np.corrcoef((images - images.mean(0)) @ image_DP[:, axis], (texts - texts.mean(0)) @ text_DP[:, axis])[0, 1]
        for axis in range(3)
    ]
    theirs_image, theirs_text = CCA(3, tol=1e-9, max_iter=5000).fit(images, texts).transform(images, texts)
    theirs = [np.corrcoef(theirs_image[:, axis], theirs_text[:, axis])[0, 1] for axis in range(3)]
    np.testing.assert_allclose(ours, theirs, atol=1e-3)


def test_csa_weights_each_direction_once() -> None:
    images, texts = aligned(300, seed=4)
    found = solve("csa", moments(images, texts), 5, shrinkage=0.2)
    squared = solve("cca", moments(images, texts), 5, shrinkage=0.2)
    for side, rows in enumerate((images, texts)):
        norms = [np.linalg.norm(weights[side], axis=0) for weights in (found, squared)]
        correlations = (norms[1] / norms[0]) ** 2
        np.testing.assert_allclose(found[side] * np.sqrt(correlations), squared[side], atol=1e-10)
        variance = np.var(rows @ (found[side] / np.sqrt(correlations)), axis=0)
        assert (variance < 1).all()
        assert (np.diff(correlations) <= 1e-12).all()


def test_ridge_matches_scikit_learn() -> None:
    images, texts = aligned(200, seed=2)
    image_DP, text_DP = ridge(moments(images, texts), 5, shrinkage=0.3)
    penalty = 0.3 * np.trace(np.cov(images.T, bias=True)) / 6 * len(images)
    theirs = Ridge(alpha=penalty).fit(images, texts)
    predicted = (images - images.mean(0)) @ image_DP @ text_DP.T + texts.mean(0)
    np.testing.assert_allclose(predicted, theirs.predict(images), atol=1e-8)


def test_procrustes_matches_scipy() -> None:
    images, texts = aligned(50, seed=1, widths=(5, 5))
    rotation, _ = scipy.linalg.orthogonal_procrustes(images - images.mean(axis=0), texts - texts.mean(axis=0))
    image_DP, text_DP = solve("procrustes", moments(images, texts), 5, shrinkage=1.0)
    np.testing.assert_allclose(image_DP @ text_DP.T, rotation, atol=1e-8)


def test_two_pairs_are_enough() -> None:
    images, texts = np.array([[1.0, 0], [3, 0]]), np.array([[0.0, 2], [0, 1]])
    image, text, cross = moments(images, texts).covariances()
    assert (image.tolist(), text.tolist(), cross.tolist()) == (
        [[1, 0], [0, 0]],
        [[0, 0], [0, 0.25]],
        [[0, -0.5], [0, 0]],
    )


@pytest.mark.parametrize("name", ["cca", "csa"])
def test_constant_feature_is_projected_to_zero(name: str) -> None:
    images, texts = aligned(20, seed=0)
    for image_DP, text_DP in (
        solve(name, moments(np.ones_like(images), texts), 3, shrinkage=0.1),
        solve(name, moments(images, np.ones_like(texts)), 3, shrinkage=0.1),
    ):
        np.testing.assert_allclose(image_DP, 0, atol=1e-6)
        np.testing.assert_allclose(text_DP, 0, atol=1e-6)
