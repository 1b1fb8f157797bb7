"""Contract tests for projectors."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch

from embedcache.projectors.base import HasAnchors, HasLinearBranch, bind_projector, has_token_input


class ProjectorContract:
    """Tests of a projector for one vector per item. `name` is its name, and `widths` are D and P.

    Example:
        >>> class TestMine(ProjectorContract):
        ...     name = "my_projectors:MyProjector"
        ...     widths = (32, 8)
    """

    name: str
    widths = (24, 10)

    @pytest.fixture
    def projector(self) -> torch.nn.Module:
        """Return the projector under test, from D to P, with random weights."""
        torch.manual_seed(0)
        module: torch.nn.Module = bind_projector(self.name)(*self.widths)
        if isinstance(module, HasAnchors):
            module.set_anchors(torch.randn(*self.widths[::-1]))
        return module

    def test_output_is_one_float32_row_per_item(self, projector: torch.nn.Module) -> None:
        projector.eval()
        for batch in (0, 1, 7):
            out = projector(torch.randn(batch, self.widths[0]))
            assert out.shape == (batch, self.widths[1])
            assert out.dtype == torch.float32

    def test_linear_map_is_set(self, projector: torch.nn.Module) -> None:
        """Check that the projector computes x @ weights after `set_linear_map`."""
        if not isinstance(projector, HasLinearBranch):
            return

        weights = torch.randn(*self.widths, dtype=torch.float64)
        projector.set_linear_map(weights)
        rows = torch.randn(5, self.widths[0])
        np.testing.assert_allclose(projector.eval()(rows).detach(), rows.double() @ weights, atol=1e-4)

    def test_every_parameter_is_trained(self, projector: torch.nn.Module) -> None:
        """Check that two steps of gradient descent change every parameter."""
        if isinstance(projector, HasLinearBranch):
            projector.set_linear_map(torch.randn(*self.widths))

        # Each loss is computed after the previous step. A layer of zeros passes no gradient in the first.
        losses = (projector(torch.randn(16, self.widths[0])).pow(2).sum() for _ in range(2))
        assert _unchanged(projector, losses) == []

    def test_items_are_independent(self, projector: torch.nn.Module) -> None:
        rows = torch.randn(6, self.widths[0])
        projector.eval()
        np.testing.assert_allclose(projector(rows)[2:3].detach(), projector(rows[2:3]).detach(), atol=1e-6)


class TokenProjectorContract:
    """Tests of a projector for token features. `name` is its name, and `widths` are D and P.

    Example:
        >>> class TestMine(TokenProjectorContract):
        ...     name = "my_projectors:MyTokenProjector"
    """

    name: str
    widths = (24, 10)

    @pytest.fixture
    def projector(self) -> torch.nn.Module:
        """Return the projector under test, from D to P, with random weights."""
        torch.manual_seed(0)
        module: torch.nn.Module = bind_projector(self.name)(*self.widths, dropout=0.1)
        return module

    def test_token_input_is_declared(self) -> None:
        assert has_token_input(self.name)

    def test_output_is_one_float32_row_per_item(self, projector: torch.nn.Module) -> None:
        projector.eval()
        for batch, num_tokens in ((0, 4), (1, 1), (7, 5)):
            tokens = torch.randn(batch, num_tokens, self.widths[0])
            for lengths in (None, torch.randint(1, num_tokens + 1, (batch,))):
                out = projector(tokens, lengths)
                assert out.shape == (batch, self.widths[1])
                assert out.dtype == torch.float32

    def test_padding_is_ignored(self, projector: torch.nn.Module) -> None:
        """Check that padding affects neither outputs nor gradients, even if it is NaN."""
        lengths = torch.tensor([3, 1, 5])
        tokens = torch.randn(3, 5, self.widths[0])
        is_padding = torch.arange(5) >= lengths[:, None]
        expected = projector.eval()(tokens, lengths)

        # NaN times a mask of zeros is NaN, so padding must be replaced before it is used.
        for padding in (torch.nan, 1e6):
            values = tokens.masked_fill(is_padding[..., None], padding).requires_grad_()
            out = projector(values, lengths)
            torch.testing.assert_close(out, expected)

            out.pow(2).sum().backward()
            assert values.grad is not None
            assert values.grad.isfinite().all()
            assert not values.grad[is_padding].any()
            for parameter in projector.parameters():
                assert parameter.grad is not None
                assert parameter.grad.isfinite().all()

    def test_items_are_independent(self, projector: torch.nn.Module) -> None:
        tokens = torch.randn(6, 5, self.widths[0])
        lengths = torch.tensor([5, 2, 3, 1, 4, 5])
        whole = projector.eval()(tokens, lengths)
        torch.testing.assert_close(projector(tokens[2:3, :3], None), whole[2:3], atol=1e-6, rtol=1e-5)

    def test_every_parameter_is_trained(self, projector: torch.nn.Module) -> None:
        loss = (projector(torch.randn(16, 5, self.widths[0]), None) * torch.randn(16, self.widths[1])).sum()
        assert _unchanged(projector, [loss]) == []


def _unchanged(projector: torch.nn.Module, losses: Iterable[Any]) -> list[str]:
    """Return the parameters that steps of gradient descent on the losses do not change."""
    initial = {name: parameter.detach().clone() for name, parameter in projector.named_parameters()}

    # An optimizer refuses a projector without parameters.
    for loss in losses if initial else ():
        projector.zero_grad()
        loss.backward()
        torch.optim.SGD(projector.parameters(), lr=0.1).step()
    return [name for name, value in projector.named_parameters() if torch.equal(value, initial[name])]
