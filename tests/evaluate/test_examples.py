import doctest
from types import ModuleType

import pytest

from embedcache.evaluate import runs, settings


@pytest.mark.parametrize("module", [runs, settings])
def test_docstring_examples(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed
