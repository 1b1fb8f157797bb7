import numpy as np
import torch

from embedcache.projectors.heads import AsifProjector


def made(num_anchors: int, num_rows: int) -> tuple[AsifProjector, np.ndarray, np.ndarray, np.ndarray]:
    """A projector of 6 -> anchors, its anchors, rows, and their cosines."""
    rng = np.random.default_rng(0)
    anchors_PD = rng.standard_normal((num_anchors, 6)).astype(np.float32)
    rows_BD = 3 * rng.standard_normal((num_rows, 6)).astype(np.float32)
    projector = AsifProjector(6, num_anchors)
    projector.set_anchors(torch.from_numpy(anchors_PD))
    lengths_BP = np.linalg.norm(rows_BD, axis=1)[:, None] * np.linalg.norm(anchors_PD, axis=1)
    return projector, anchors_PD, rows_BD, rows_BD @ anchors_PD.T / lengths_BP


def test_few_anchors_give_the_eighth_power_of_positive_cosines() -> None:
    projector, _, rows_BD, cosines_BP = made(20, 5)
    assert (cosines_BP < -0.5).any()
    found_BP = projector(torch.from_numpy(rows_BD))
    np.testing.assert_allclose(found_BP, np.maximum(cosines_BP, 0) ** 8, atol=1e-6)


def test_only_the_800_largest_are_kept() -> None:
    projector, _, rows_BD, cosines_BP = made(2000, 4)
    found_BP = projector(torch.from_numpy(rows_BD)).numpy()
    for found_P, cosines_P in zip(found_BP, cosines_BP, strict=True):
        largest = np.argsort(-cosines_P)[:800]
        assert cosines_P[largest].min() > 0
        assert set(np.flatnonzero(found_P)) == set(largest)
        np.testing.assert_allclose(found_P[largest], cosines_P[largest] ** 8, atol=1e-6)


def test_an_anchor_is_nearest_to_itself() -> None:
    projector, anchors_PD, _, _ = made(20, 1)
    found_PP = projector(torch.from_numpy(anchors_PD))
    np.testing.assert_allclose(found_PP.diagonal(), 1, atol=1e-5)
    assert found_PP.argmax(dim=1).tolist() == list(range(20))


def test_anchors_are_kept_with_the_weights_and_not_trained() -> None:
    projector, _, rows_BD, _ = made(20, 5)
    assert not list(projector.parameters())
    other = AsifProjector(6, 20)
    assert not other(torch.from_numpy(rows_BD)).any()
    other.load_state_dict(projector.state_dict())
    assert torch.equal(other(torch.from_numpy(rows_BD)), projector(torch.from_numpy(rows_BD)))
