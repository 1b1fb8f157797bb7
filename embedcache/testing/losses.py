"""Contract tests for training losses."""

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from embedcache.registry import bind
from embedcache.train.losses import LOSSES, Positives


class LossContract:
    """Tests of a loss. `name` is its name.

    Example:
        >>> class TestMine(LossContract):
        ...     name = "my_losses:MyLoss"
    """

    name: str

    @pytest.fixture
    def loss(self) -> torch.nn.Module:
        """Return the loss under test, in float64."""
        torch.manual_seed(0)
        module: torch.nn.Module = bind(LOSSES, self.name)()
        return module.double()

    def test_loss_is_a_finite_scalar(self, loss: torch.nn.Module) -> None:
        for size in (1, 2, 9):
            for scale in (2.0, 1000.0):
                first, second, positives = _batch(size, seed=size)
                value = loss(first, second, torch.tensor(scale, dtype=torch.float64), positives)
                assert value.shape == ()
                assert value.isfinite()

    def test_gradients_match_finite_differences(self, loss: torch.nn.Module) -> None:
        first, second, _ = _batch(4, seed=0)
        scale = torch.tensor(5.0, dtype=torch.float64, requires_grad=True)
        positives = Positives(first=torch.tensor([0, 0, 1, 2, 3]), second=torch.tensor([0, 2, 1, 2, 3]))

        def value(first: Tensor, second: Tensor, scale: Tensor, *_: Tensor) -> Tensor:
            result: Tensor = loss(first, second, scale, positives)
            return result

        inputs = (first.requires_grad_(), second.requires_grad_(), scale, *loss.parameters())
        assert torch.autograd.gradcheck(value, inputs, atol=1e-4)

    def test_matching_pairs_have_a_lower_loss(self, loss: torch.nn.Module) -> None:
        first, second, positives = _batch(8, seed=0)
        scale = torch.tensor(10.0, dtype=torch.float64)
        assert loss(first, first, scale, positives) < loss(first, second, scale, positives)

    def test_order_of_samples_does_not_matter(self, loss: torch.nn.Module) -> None:
        first, second, positives = _batch(7, seed=1)
        order = torch.randperm(7)
        scale = torch.tensor(3.0, dtype=torch.float64)
        permuted = loss(first[order], second[order], scale, positives)
        torch.testing.assert_close(permuted, loss(first, second, scale, positives))

    def test_excluded_pairs_do_not_count(self, loss: torch.nn.Module) -> None:
        """The similarity of a near-duplicate pair must not matter, in either direction."""
        for row, column in ((0, 1), (1, 0)):
            excluded = (torch.tensor([row]), torch.tensor([column]))
            low = self._loss_at(loss, row, column, -0.5, excluded=excluded)
            high = self._loss_at(loss, row, column, 0.3, excluded=excluded)
            torch.testing.assert_close(low, high, msg=lambda text: f"positives.excluded must count neither way: {text}")

            # A loss that ignores every negative pair would pass the check above.
            reverse = (torch.tensor([column]), torch.tensor([row]))
            low = self._loss_at(loss, row, column, -0.5, excluded=reverse)
            high = self._loss_at(loss, row, column, 0.3, excluded=reverse)
            assert low < high, "a negative pair must count"

    def test_other_positives_are_not_negatives(self, loss: torch.nn.Module) -> None:
        """An image and the caption of another one that belong together must not be pushed apart."""
        low = self._loss_at(loss, 0, 1, -0.5, positive=(0, 1))
        high = self._loss_at(loss, 0, 1, 0.0, positive=(0, 1))
        assert high <= low, "all pairs of positives are positive, or count neither way"

    @staticmethod
    def _loss_at(
        loss: torch.nn.Module,
        row: int,
        column: int,
        cosine: float,
        *,
        excluded: tuple[Tensor, Tensor] | None = None,
        positive: tuple[int, int] | None = None,
    ) -> Tensor:
        """Return the loss of four pairs with one cosine of a first and a second item set, and all others fixed."""
        cosines_BB = torch.linspace(-0.3, 0.2, 16, dtype=torch.float64).reshape(4, 4) + 0.3 * torch.eye(4)
        cosines_BB[row, column] = cosine

        # The second items get four more components, so that their length is 1 with these cosines.
        rests_B = (1 - cosines_BB.square().sum(dim=0)).sqrt()
        first_BP = torch.eye(8, dtype=torch.float64)[:4]
        second_BP = torch.cat([cosines_BB.T, torch.diag(rests_B)], dim=1)

        # Ascending by row, then by column.
        is_positive_BB = torch.eye(4, dtype=torch.bool)
        if positive is not None:
            is_positive_BB[positive] = True
        rows, columns = is_positive_BB.nonzero(as_tuple=True)
        positives = Positives(first=rows, second=columns, excluded=excluded)
        value: Tensor = loss(first_BP, second_BP, torch.tensor(5.0, dtype=torch.float64), positives).detach()
        return value

    def test_several_captions_per_image(self, loss: torch.nn.Module) -> None:
        if not getattr(loss, "has_all_captions", True):
            return

        first, second, _ = _batch(4, seed=0)
        positives = Positives(first=torch.tensor([0, 0, 1, 1, 2, 2, 3, 3]), second=torch.arange(8))
        value = loss(first, torch.cat([second, second]), torch.tensor(3.0, dtype=torch.float64), positives)
        assert value.isfinite()


def _batch(size: int, *, seed: int) -> tuple[Tensor, Tensor, Positives]:
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, size, 5, generator=generator, dtype=torch.float64)
    return (
        normalize(first, dim=1),
        normalize(second, dim=1),
        Positives(first=torch.arange(size), second=torch.arange(size)),
    )
