"""Texts of error messages."""

from embedcache.errors import first_few, one_line, pluralize
from embedcache.modalities import count_items


def test_first_few_are_shown_and_the_others_counted() -> None:
    assert first_few(list("abc")) == "a, b, c"
    assert first_few(list("abcd")) == "a, b, c and 1 more"
    assert first_few(range(1002), 2, show=repr, separator="; ") == "0; 1 and 1,000 more"
    assert first_few([]) == ""


def test_one_line_is_short_and_never_empty() -> None:
    assert one_line(ValueError("two\n  lines")) == "two lines"
    assert one_line(ValueError("abcd"), 3) == "abc"
    assert one_line(MemoryError()) == "MemoryError"


def test_nouns_follow_their_number() -> None:
    assert [pluralize(number, "sample") for number in (0, 1, 2000)] == ["0 samples", "1 sample", "2,000 samples"]
    assert pluralize(1, "class has", "classes have") == "1 class has"
    assert count_items(1, "audio") == "1 recording"
