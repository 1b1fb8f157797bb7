import pytest

from embedcache.errors import UnknownNameError
from embedcache.projectors.contract import PROJECTORS
from tests.projectors.contract import ProjectorContract


class TestLinear(ProjectorContract):
    name = "linear"


class TestMlp(ProjectorContract):
    name = "mlp"


class TestOnesOwn(ProjectorContract):
    name = "embedcache.projectors.linear:LinearProjector"


def test_every_projector_of_the_table_is_tested() -> None:
    assert {kind.name for kind in ProjectorContract.__subclasses__()} >= set(PROJECTORS.paths)


def test_an_unknown_projector_names_the_near_miss() -> None:
    with pytest.raises(UnknownNameError, match="unknown projector 'mpl'; did you mean 'mlp'"):
        PROJECTORS.load("mpl")
