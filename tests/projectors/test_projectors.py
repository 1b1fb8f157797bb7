import pytest
import torch

from embedcache.errors import SettingError, UnknownNameError
from embedcache.projectors.contract import PROJECTORS, split_names
from tests.projectors.contract import ProjectorContract


class TestLinear(ProjectorContract):
    name = "linear"


class TestMlp(ProjectorContract):
    name = "mlp"


class TestGlu(ProjectorContract):
    name = "glu"


class TestFuseMix(ProjectorContract):
    name = "fusemix"


class TestShareLock(ProjectorContract):
    name = "sharelock"


class TestIdentity(ProjectorContract):
    name = "identity"
    widths = (24, 24)


class TestOnesOwn(ProjectorContract):
    name = "embedcache.projectors.linear:LinearProjector"


def test_every_projector_of_the_table_is_tested() -> None:
    assert {kind.name for kind in ProjectorContract.__subclasses__()} >= set(PROJECTORS.paths)


@pytest.mark.parametrize(
    ("name", "widths", "millions"),
    [
        ("glu", [(2048, 1024), (4096, 1024)], 386.0),
        ("fusemix", [(1536, 512), (1024, 512)], 110.4),
        ("sharelock", [(4096, 1024)], 54.6),
    ],
)
def test_sizes_are_those_of_the_papers(name: str, widths: list[tuple[int, int]], millions: float) -> None:
    with torch.device("meta"):
        projectors = [PROJECTORS.load(name)(*some) for some in widths]
    count = sum(parameter.numel() for projector in projectors for parameter in projector.parameters())
    assert round(count / 1e6, 1) == millions


def test_identity_keeps_the_width() -> None:
    with pytest.raises(SettingError, match="keeps the feature's width of 24, and the shared space has 10; use --sh"):
        PROJECTORS.load("identity")(24, 10)


def test_both_sides_or_one_each_are_named() -> None:
    assert split_names("glu") == ("glu", "glu")
    assert split_names("identity+sharelock") == ("identity", "sharelock")


def test_an_unknown_projector_names_the_near_miss() -> None:
    with pytest.raises(UnknownNameError, match="unknown projector 'mpl'; did you mean 'mlp'"):
        PROJECTORS.load("mpl")
