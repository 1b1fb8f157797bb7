import doctest
from types import ModuleType

import pytest

from embedcache.modeling import heads
from embedcache.projectors import base, pair


@pytest.mark.parametrize("module", [base, heads, pair])
def test_docstring_examples(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed
