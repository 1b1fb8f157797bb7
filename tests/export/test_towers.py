"""Towers as chains of dense layers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import normalize

from embedcache.export.towers import DenseChain, dense_chain
from embedcache.modeling.heads import OpenClipLinear, RawTower, Tower

PIECES = st.lists(st.sampled_from(["linear", "plain", "norm", "relu", "gelu", "dropout"]), min_size=0, max_size=6)


def run_chain(chain: DenseChain, vectors_BD: Tensor) -> Tensor:
    out = normalize(vectors_BD, dim=-1) if chain.has_unit_input else vectors_BD
    for layer in chain.layers:
        out = layer.activation(out @ layer.weight_PD.T + (0 if layer.bias_P is None else layer.bias_P))
    return out


def made(pieces: list[str]) -> list[nn.Module]:
    kinds = {
        "linear": lambda: nn.Linear(6, 6),
        "plain": lambda: nn.Linear(6, 6, bias=False),
        "norm": lambda: nn.BatchNorm1d(6),
        "relu": nn.ReLU,
        "gelu": nn.GELU,
        "dropout": lambda: nn.Dropout(0.3),
    }
    first = [] if pieces[:1] in (["linear"], ["plain"]) else [nn.Linear(6, 6)]  # an activation needs a layer before it
    return [*first, *(kinds[piece]() for piece in pieces)]


@pytest.mark.slow
@given(pieces=PIECES, is_bare=st.booleans())
@settings(max_examples=40)
def test_dense_chain_is_exact(pieces: list[str], is_bare: bool) -> None:
    modules = made(pieces)
    torch.manual_seed(len(pieces))
    projector = OpenClipLinear(6, 6)
    projector.layers = nn.Sequential(*modules)
    tower = RawTower(projector, 6, 6) if is_bare else Tower(projector, 6, 6)
    with torch.no_grad():
        for value in (*tower.parameters(), *tower.buffers()):
            if value.is_floating_point():
                value.copy_(torch.rand_like(value) + 0.1)
    vectors = torch.randn(5, 6)
    if any(_is_alone(modules, position) for position in range(len(modules))):
        with pytest.raises(ValueError, match="cannot be folded into a dense layer"):
            dense_chain(tower.eval(), "test", "use another")
        return
    chain = dense_chain(tower.eval(), "test", "use another")
    torch.testing.assert_close(run_chain(chain, vectors), tower(vectors).detach(), atol=1e-4, rtol=1e-4)


def _is_alone(modules: list[nn.Module], position: int) -> bool:
    """Return whether an activation follows another one, apart from dropout and norms between them."""
    if not isinstance(modules[position], (nn.ReLU, nn.GELU)):
        return False
    before = [module for module in modules[:position] if not isinstance(module, (nn.Dropout, nn.BatchNorm1d))]
    return isinstance(before[-1], (nn.ReLU, nn.GELU))
