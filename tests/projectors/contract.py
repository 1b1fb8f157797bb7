"""What every projector keeps to."""

import numpy as np
import pytest
import torch

from embedcache.projectors.contract import PROJECTORS, Startable


class ProjectorContract:
    """Subclass it with the projector's name."""

    name: str
    widths = (24, 10)

    @pytest.fixture
    def projector(self) -> torch.nn.Module:
        torch.manual_seed(0)
        module: torch.nn.Module = PROJECTORS.load(self.name)(*self.widths)
        return module

    def test_gives_one_float32_row_for_each(self, projector: torch.nn.Module) -> None:
        projector.eval()
        for batch in (0, 1, 7):
            out = projector(torch.randn(batch, self.widths[0]))
            assert out.shape == (batch, self.widths[1])
            assert out.dtype == torch.float32

    def test_starts_as_the_linear_map_it_is_given(self, projector: torch.nn.Module) -> None:
        if not isinstance(projector, Startable):
            return
        weights = torch.randn(*self.widths, dtype=torch.float64)
        projector.start_from(weights)
        rows = torch.randn(5, self.widths[0])
        np.testing.assert_allclose(projector.eval()(rows).detach(), rows.double() @ weights, atol=1e-4)

    def test_every_parameter_learns_within_two_steps(self, projector: torch.nn.Module) -> None:
        if isinstance(projector, Startable):
            projector.start_from(torch.randn(*self.widths))
        before = {name: parameter.detach().clone() for name, parameter in projector.named_parameters()}
        if not before:
            return
        optimizer = torch.optim.SGD(projector.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.zero_grad()
            projector(torch.randn(16, self.widths[0])).pow(2).sum().backward()
            optimizer.step()
        assert [name for name, value in projector.named_parameters() if torch.equal(value, before[name])] == []

    def test_rows_do_not_depend_on_their_neighbours(self, projector: torch.nn.Module) -> None:
        rows = torch.randn(6, self.widths[0])
        projector.eval()
        np.testing.assert_allclose(projector(rows)[2:3].detach(), projector(rows[2:3]).detach(), atol=1e-6)
