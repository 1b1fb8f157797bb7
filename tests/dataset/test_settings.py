"""Numbers that the settings of splits declare."""

from tests.declared import declared_numbers


def test_numbers_are_declared_as_documented() -> None:
    assert declared_numbers("embedcache.dataset.settings") == {
        "SplitSettings": [
            "val_fraction 0.1 (0, 1)",
            "test_fraction 0.25 (0, 1)",
            "max_val 25000 [1, inf)",
            "max_test 50000 [1, inf)",
            "image_cosine 0.9 [-1, 1]",
            "text_cosine 0.7 [-1, 1]",
            "other_cosine 0.9 [-1, 1]",
            "split_seed 0 [0, 4294967296)",
        ],
    }
