"""Heads, towers, the pair, and closed forms."""

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cross_decomposition import CCA
from sklearn.linear_model import Ridge
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm

from embedcache.errors import DataError, SettingError, UnknownNameError
from embedcache.modeling.heads import AsifProjector, Dropout
from embedcache.projectors.base import PROJECTORS, Moments, bind_projector, cca, ridge, solve
from embedcache.projectors.pair import AlignedPair
from embedcache.testing.projectors import ProjectorContract, TokenProjectorContract


class TestLinear(ProjectorContract):
    name = "linear"


class TestMlp(ProjectorContract):
    name = "mlp"


class TestGlu(ProjectorContract):
    name = "glu"


class TestFuseMix(ProjectorContract):
    name = "fusemix"


@pytest.mark.slow
class TestShareLock(ProjectorContract):
    name = "sharelock"


class TestIdentity(ProjectorContract):
    name = "identity"
    widths = (24, 24)


class TestAsif(ProjectorContract):
    name = "asif"


class TestOpenClipLinear(ProjectorContract):
    name = "openclip-linear"


class TestOpenClipImageMlp(ProjectorContract):
    name = "openclip-mlp-image"


class TestOpenClipTextMlp(ProjectorContract):
    name = "openclip-mlp-text"


class TestToken(TokenProjectorContract):
    name = "token"


class TestClsToken(TokenProjectorContract):
    name = "cls_token"


class TestTokenMlp(TokenProjectorContract):
    name = "token_mlp"


class TestPlugIn(ProjectorContract):
    name = "embedcache.modeling.heads:LinearProjector"


def test_every_projector_has_a_contract_test() -> None:
    tested = [*ProjectorContract.__subclasses__(), *TokenProjectorContract.__subclasses__()]
    assert {kind.name for kind in tested} >= set(PROJECTORS.paths)


@pytest.mark.parametrize(
    ("name", "widths", "millions"),
    [
        ("glu", [(2048, 1024), (4096, 1024)], 386.0),
        ("fusemix", [(1536, 512), (1024, 512)], 110.4),
        ("sharelock", [(4096, 1024)], 54.6),
    ],
)
def test_head_sizes_match_the_papers(name: str, widths: list[tuple[int, int]], millions: float) -> None:
    with torch.device("meta"):
        projectors = [PROJECTORS.load(name)(*some) for some in widths]
    count = sum(parameter.numel() for projector in projectors for parameter in projector.parameters())
    assert round(count / 1e6, 1) == millions


@pytest.mark.parametrize(
    ("projector", "text_width", "shared_width", "count"),
    [
        ("cls_token+token_mlp", 1024, 1024, 11_553_793),  # DINOv2-L and all-roberta-large-v1
        ("cls_token+token_mlp", 768, 768, 7_290_113),  # and mpnet
        ("cls_token+token", 768, 768, 6_107_393),  # and CLIP's texts, without the head
    ],
)
def test_pair_sizes_match_the_paper(projector: str, text_width: int, shared_width: int, count: int) -> None:
    with torch.device("meta"):
        pair = AlignedPair(projector, widths={"image": 1024, "text": text_width}, shared_width=shared_width)
    assert sum(parameter.numel() for parameter in pair.parameters() if parameter.requires_grad) == count


def test_vector_heads_compute_their_formulas() -> None:
    torch.manual_seed(0)
    rows = torch.randn(5, 6)
    mlp, glu, fusemix = (PROJECTORS.load(name)(6, 4).eval() for name in ("mlp", "glu", "fusemix"))
    nn.init.normal_(mlp.output.weight)
    hidden = gelu(mlp.hidden[1](layer_norm(rows, (6,))))
    assert hidden.shape == (5, 512)
    torch.testing.assert_close(mlp(rows), rows @ mlp.linear.weight.T + hidden @ mlp.output.weight.T)
    normed = layer_norm(rows, (6,))
    gated = glu.gate(normed).clamp(0, 6) * glu.value(normed)
    torch.testing.assert_close(glu(rows), gated @ glu.output.weight.T + glu.output.bias)
    summed = rows
    for block in fusemix.blocks:
        hidden = gelu(layer_norm(summed, (6,)) @ block.hidden[1].weight.T + block.hidden[1].bias)
        summed = summed + hidden @ block.output.weight.T + block.output.bias
    torch.testing.assert_close(fusemix(rows), summed @ fusemix.linear.weight.T + fusemix.linear.bias)


def test_wrong_projectors_raise() -> None:
    for name, error, word in (
        ("identity", ValueError, "24"),
        ("embedcache.modeling.heads:Tower", SettingError, "output_width"),  # takes a projector too
        ("mpl", UnknownNameError, "mpl"),
    ):
        with pytest.raises(error, match=word):
            bind_projector(name)(24, 10)


def plain_token(projector: torch.nn.Module, token: Tensor) -> Tensor:
    """The paper's T of one token."""
    normed = layer_norm(token, token.shape, projector.norm[0].weight, projector.norm[0].bias)
    hidden = gelu(projector.hidden.weight @ normed + projector.hidden.bias)
    linear = projector.linear.weight @ normed + projector.linear.bias
    return linear + projector.output.weight @ hidden + projector.output.bias


def test_token_heads_match_the_paper() -> None:
    torch.manual_seed(1)
    tokens, lengths = torch.randn(4, 5, 6), torch.tensor([5, 3, 1, 2])
    token, cls_token, token_mlp = (PROJECTORS.load(name)(6, 3).eval() for name in ("token", "cls_token", "token_mlp"))
    for number, length in enumerate(lengths.tolist()):
        item = tokens[number, :length]
        mean = torch.stack([plain_token(token, row) for row in item]).mean(dim=0)
        torch.testing.assert_close(token(tokens, lengths)[number], mean)
        expected = plain_token(cls_token.cls, item[0])
        if length > 1:
            expected = expected + torch.stack([plain_token(cls_token.patches, row) for row in item[1:]]).mean(dim=0)
        torch.testing.assert_close(cls_token(tokens, lengths)[number], expected)
        linear = token_mlp.linear(torch.stack([plain_token(token_mlp.tokens, row) for row in item]).mean(dim=0))
        head = layer_norm(
            token_mlp.residual[1](gelu(linear)) + linear, (3,), token_mlp.norm.weight, token_mlp.norm.bias
        )
        torch.testing.assert_close(token_mlp(tokens, lengths)[number], head)


def test_towers_prepare_their_input() -> None:
    """Check lengths of 1 minus the mean, vectors divided by one number, and tokens as they are."""
    torch.manual_seed(0)
    rows, mean = 3 * torch.randn(5, 6), torch.randn(6)
    linear, raw, token = (
        AlignedPair(name, widths={"image": 6, "text": 6}, shared_width=4).tower("image").eval()
        for name in ("linear", "openclip-linear", "token")
    )
    linear.mean.copy_(mean)
    raw.length.fill_(2.5)
    lengths = rows.norm(dim=1, keepdim=True)
    torch.testing.assert_close(linear(rows), (rows / lengths - mean) @ linear.projector.linear.weight.T)
    torch.testing.assert_close(raw(rows.double()), rows / 2.5 @ raw.projector.layers[0].weight.T)
    torch.testing.assert_close(token(rows), token.projector(rows[:, None], None))  # one token per item
    tokens, lengths = torch.randn(2, 3, 6), torch.tensor([3, 1])
    torch.testing.assert_close(token(tokens, lengths), token.projector(tokens, lengths))


def test_temperature_is_clamped_and_scale_its_inverse() -> None:
    pair = AlignedPair("linear", widths={"image": 6, "text": 5}, shared_width=4)
    for temperature, expected in ((None, 0.07), (0.2, 0.2), (1e-4, 0.001), (2.0, 0.5)):
        if temperature is not None:
            nn.init.constant_(pair.log_scale, -np.log(temperature))
        assert pair.temperature.item() == pytest.approx(expected)
        assert pair.scale.item() == pytest.approx(1 / expected)
    assert pair.towers == (pair.tower("image"), pair.tower("text"))
    with pytest.raises(DataError, match="audio"):
        pair.tower("audio")


def make_asif(num_anchors: int, num_rows: int) -> tuple[AsifProjector, np.ndarray, np.ndarray, np.ndarray]:
    """Return a projector, its anchors, rows and their cosines."""
    rng = np.random.default_rng(0)
    anchors_PD = rng.standard_normal((num_anchors, 6)).astype(np.float32)
    rows_BD = 3 * rng.standard_normal((num_rows, 6)).astype(np.float32)
    projector = AsifProjector(6, num_anchors)
    projector.set_anchors(torch.from_numpy(anchors_PD))
    lengths_BP = np.linalg.norm(rows_BD, axis=1)[:, None] * np.linalg.norm(anchors_PD, axis=1)
    return projector, anchors_PD, rows_BD, rows_BD @ anchors_PD.T / lengths_BP


def test_asif_keeps_the_800_largest() -> None:
    projector, _, rows_BD, cosines_BP = make_asif(2000, 4)
    assert not list(projector.parameters())
    found_BP = projector(torch.from_numpy(rows_BD)).numpy()
    for found_P, cosines_P in zip(found_BP, cosines_BP, strict=True):
        largest = np.argsort(-cosines_P)[:800]
        assert cosines_P[largest].min() > 0
        assert set(np.flatnonzero(found_P)) == set(largest)
        np.testing.assert_allclose(found_P[largest], cosines_P[largest] ** 8, atol=1e-6)


@pytest.mark.parametrize("fraction", [0.1, 0.5, 0.6])
def test_dropout_fraction_and_scale(fraction: float) -> None:
    torch.manual_seed(0)
    dropped = Dropout(fraction)(torch.ones(1000, 500))
    assert dropped.unique().tolist() == pytest.approx([0, 1 / (1 - fraction)])
    assert dropped.mean().item() == pytest.approx(1, abs=0.01)
    is_dropped = dropped == 0
    assert is_dropped.double().mean().item() == pytest.approx(fraction, abs=0.003)
    for step in range(1, 9):  # neighboring numbers are drawn from one random word, yet independent
        both = (is_dropped[:, step:] & is_dropped[:, :-step]).double().mean().item()
        assert both == pytest.approx(fraction**2, abs=0.005)


def test_dropout_draws_as_in_finished_runs() -> None:
    torch.manual_seed(5)
    dropped = Dropout(0.3)(torch.full((3, 5), 2.0))
    assert dropped.ravel().nonzero().ravel().tolist() == [0, 1, 3, 4, 5, 6, 7, 8, 9, 11, 12, 13, 14]
    assert dropped.unique().tolist() == [0, (torch.tensor(2.0) * torch.tensor(1.0).div(0.7)).item()]
    assert Dropout(0.5)(torch.ones(9)).nonzero().ravel().tolist() == [1, 3, 5, 6]  # where the next layer goes on
    values = torch.randn(5, 7)
    assert torch.equal(Dropout(0.5).eval()(values), values)
    for fraction in (0.0, 1.0):
        assert torch.equal(Dropout(fraction)(values), nn.Dropout(fraction)(values))


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
def test_few_pairs_have_the_solution_of_their_covariances(name: str) -> None:
    """Check against the same pairs repeated until they are many."""
    rng = np.random.default_rng(0)
    images, texts = rng.standard_normal((9, 40)), rng.standard_normal((9, 12))
    solutions = [
        solve(name, moments(np.tile(images, (count, 1)), np.tile(texts, (count, 1))), 16, shrinkage=0.3)
        for count in (1, 50)
    ]
    for first, second in ((0, 0), (0, 1), (1, 1)):  # a direction may be negative on both sides
        few, many = (solution[first] @ solution[second].T for solution in solutions)
        np.testing.assert_allclose(few, many, atol=1e-9)


@pytest.mark.parametrize("name", ["cca", "csa"])
def test_constant_feature_is_projected_to_zero(name: str) -> None:
    images, texts = aligned(20, seed=0)
    for image_DP, text_DP in (
        solve(name, moments(np.ones_like(images), texts), 3, shrinkage=0.1),
        solve(name, moments(images, np.ones_like(texts)), 3, shrinkage=0.1),
    ):
        np.testing.assert_allclose(image_DP, 0, atol=1e-6)
        np.testing.assert_allclose(text_DP, 0, atol=1e-6)


def test_another_population_is_centered_on_its_own_mean() -> None:
    rng = np.random.default_rng(0)
    first = [rng.standard_normal((count, 11)) + count for count in (40, 30)]
    ours, theirs = (moments(rows[:, :6], rows[:, 6:]) for rows in first)
    mean = ours.first_mean.copy()
    ours.add_population(theirs, 2.0)
    centered = [rows - rows.mean(axis=0) for rows in first]
    expected = (centered[0].T @ centered[0] + 2 * centered[1].T @ centered[1]) / (40 + 2 * 30)
    np.testing.assert_allclose(ours.covariances().first, expected[:6, :6], atol=1e-9)
    np.testing.assert_allclose(ours.covariances().cross, expected[:6, 6:], atol=1e-9)
    np.testing.assert_allclose(ours.first_mean, mean)
