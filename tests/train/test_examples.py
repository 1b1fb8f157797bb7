import doctest

from embedcache.train import losses


def test_docstring_examples() -> None:
    result = doctest.testmod(losses)
    assert result.attempted
    assert not result.failed
