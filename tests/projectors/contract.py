"""What every projector keeps to."""

import numpy as np
import pytest
import torch

from embedcache.projectors.contract import PROJECTORS

WIDTHS = (24, 10)


class ProjectorContract:
    """Subclass it with the projector's name."""

    name: str

    @pytest.fixture
    def projector(self) -> torch.nn.Module:
        torch.manual_seed(0)
        module: torch.nn.Module = PROJECTORS.load(self.name)(*WIDTHS)
        return module

    def test_gives_one_float32_row_for_each(self, projector: torch.nn.Module) -> None:
        for batch in (0, 1, 7):
            out = projector(torch.randn(batch, WIDTHS[0]))
            assert out.shape == (batch, WIDTHS[1])
            assert out.dtype == torch.float32

    def test_starts_as_the_linear_map_it_is_given(self, projector: torch.nn.Module) -> None:
        weights = torch.randn(*WIDTHS, dtype=torch.float64)
        projector.start_from(weights)  # type: ignore[operator]
        rows = torch.randn(5, WIDTHS[0])
        np.testing.assert_allclose(projector.eval()(rows).detach(), rows.double() @ weights, atol=1e-4)

    def test_every_parameter_learns_within_two_steps(self, projector: torch.nn.Module) -> None:
        projector.start_from(torch.randn(*WIDTHS))  # type: ignore[operator]
        before = {name: parameter.detach().clone() for name, parameter in projector.named_parameters()}
        optimizer = torch.optim.SGD(projector.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            projector(torch.randn(16, WIDTHS[0])).pow(2).sum().backward()
            optimizer.step()
        assert [name for name, value in projector.named_parameters() if torch.equal(value, before[name])] == []

    def test_rows_do_not_depend_on_their_neighbours(self, projector: torch.nn.Module) -> None:
        rows = torch.randn(6, WIDTHS[0])
        projector.eval()
        np.testing.assert_allclose(projector(rows)[2:3].detach(), projector(rows[2:3]).detach(), atol=1e-6)
