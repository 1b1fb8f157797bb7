import doctest
from types import ModuleType

import pytest

from embedcache.encoders import base, open


@pytest.mark.parametrize("module", [base, open])
def test_docstring_examples(module: ModuleType) -> None:
    result = doctest.testmod(module)
    assert result.attempted
    assert not result.failed
