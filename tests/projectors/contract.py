"""What every projector keeps to."""

import numpy as np
import pytest
import torch

from embedcache.projectors.base import PROJECTORS, Anchored, Startable
from embedcache.projectors.pair import takes_tokens


class ProjectorContract:
    """Subclass it with the projector's name."""

    name: str
    widths = (24, 10)

    @pytest.fixture
    def projector(self) -> torch.nn.Module:
        torch.manual_seed(0)
        module: torch.nn.Module = PROJECTORS.load(self.name)(*self.widths)
        if isinstance(module, Anchored):
            module.set_anchors(torch.randn(*self.widths[::-1]))
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

    def test_rows_do_not_depend_on_their_neighbors(self, projector: torch.nn.Module) -> None:
        rows = torch.randn(6, self.widths[0])
        projector.eval()
        np.testing.assert_allclose(projector(rows)[2:3].detach(), projector(rows[2:3]).detach(), atol=1e-6)


class TokenProjectorContract:
    """Subclass it with the name of a projector that takes tokens."""

    name: str
    widths = (24, 10)

    @pytest.fixture
    def projector(self) -> torch.nn.Module:
        torch.manual_seed(0)
        module: torch.nn.Module = PROJECTORS.load(self.name)(*self.widths, dropout=0.1)
        return module

    def test_says_that_it_takes_tokens(self) -> None:
        assert takes_tokens(self.name)

    def test_gives_one_float32_row_for_each_item(self, projector: torch.nn.Module) -> None:
        projector.eval()
        for batch, num_tokens in ((0, 4), (1, 1), (7, 5)):
            tokens = torch.randn(batch, num_tokens, self.widths[0])
            for lengths in (None, torch.randint(1, num_tokens + 1, (batch,))):
                out = projector(tokens, lengths)
                assert out.shape == (batch, self.widths[1])
                assert out.dtype == torch.float32

    def test_what_lies_behind_an_item_is_not_looked_at(self, projector: torch.nn.Module) -> None:
        lengths = torch.tensor([3, 1, 5])
        tokens = torch.randn(3, 5, self.widths[0])
        behind = torch.arange(5) >= lengths[:, None]
        expected = projector.eval()(tokens, lengths)
        for filled in (torch.nan, 1e6):
            values = tokens.masked_fill(behind[..., None], filled).requires_grad_()
            found = projector(values, lengths)
            torch.testing.assert_close(found, expected)
            found.pow(2).sum().backward()
            assert values.grad is not None
            assert values.grad.isfinite().all()
            assert not values.grad[behind].any()
            assert all(parameter.grad.isfinite().all() for parameter in projector.parameters())

    def test_items_do_not_depend_on_their_neighbors(self, projector: torch.nn.Module) -> None:
        tokens, lengths = torch.randn(6, 5, self.widths[0]), torch.tensor([5, 2, 3, 1, 4, 5])
        whole = projector.eval()(tokens, lengths)
        torch.testing.assert_close(projector(tokens[2:3, :3], None), whole[2:3], atol=1e-6, rtol=1e-5)

    def test_every_parameter_learns(self, projector: torch.nn.Module) -> None:
        before = {name: parameter.detach().clone() for name, parameter in projector.named_parameters()}
        optimizer = torch.optim.SGD(projector.parameters(), lr=0.1)
        (projector(torch.randn(16, 5, self.widths[0]), None) * torch.randn(16, self.widths[1])).sum().backward()
        optimizer.step()
        assert [name for name, value in projector.named_parameters() if torch.equal(value, before[name])] == []
