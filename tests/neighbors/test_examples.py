import doctest
from types import ModuleType

import pytest

from embedcache.neighbors import knn, pairs


@pytest.mark.parametrize("module", [knn, pairs])
def test_docstring_examples(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed
