"""Sizes, fractions and counts as text."""

from collections.abc import Callable
from typing import Any

import pytest

from embedcache.errors import SettingError
from embedcache.settings import parse_count_or_fraction, parse_counts, parse_fraction, parse_size


@pytest.mark.parametrize(
    ("parse", "text", "value"),
    [
        (parse_size, "4096", 4096),
        (parse_size, "2K", 2000),
        (parse_size, "1.5MiB", 3 * 2**19),
        (parse_size, "4GB", 4 * 10**9),
        (parse_fraction, "0.1%", 0.001),
        (parse_fraction, "1", 1.0),
        (parse_count_or_fraction, "20,000", 20_000),
        (parse_count_or_fraction, "10%", 0.1),
        (parse_counts, "1000,100", (1000, 100)),
    ],
)
def test_parse(parse: Callable[[str], Any], text: str, value: object) -> None:
    assert parse(text) == value


@pytest.mark.parametrize(
    ("parse", "texts"),
    [
        (parse_size, ("", "G", "-1M", "4X", "nan", "inf", "0")),
        (parse_fraction, ("2", "-1%", "x", "nan")),
        (parse_count_or_fraction, ("0", "1.5", "x")),
    ],
)
def test_invalid_text_raises(parse: Callable[[str], Any], texts: tuple[str, ...]) -> None:
    for text in texts:
        with pytest.raises(SettingError, match="invalid"):
            parse(text)
