"""Numbers that the settings of indexes and searches declare."""

from tests.declared import declared_numbers


def test_numbers_are_declared_as_documented() -> None:
    assert declared_numbers("embedcache.search.settings") == {
        "IndexSettings": [
            "width None [1, inf)",
            "memory None (0, inf)",
            "min_recall 0.95 [0, 1]",
            "checkpoint_s 60.0 [0, inf)",
        ],
        "SearchSettings": [
            "k None [1, inf)",
        ],
    }
