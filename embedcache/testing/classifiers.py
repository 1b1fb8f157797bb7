"""Contract tests for classifiers of `evaluate probe`."""

import json

import numpy as np
import pytest

from embedcache.evaluate.classifiers import Examples, Fit, load_method

_NUM_CLASSES = 4
_WIDTH = 12


class ClassifierContract:
    """Tests of a function that fits a classifier. `name` is its name.

    Example:
        >>> class TestMine(ClassifierContract):
        ...     name = "my_probes:fit_mine"
    """

    name: str

    @pytest.fixture
    def fit(self) -> Fit:
        """Return the function under test."""
        return load_method(self.name)

    @pytest.mark.parametrize("num_val", [0, 20])
    def test_scores_have_a_column_per_class(self, fit: Fit, num_val: int) -> None:
        val = example_vectors(num_val, seed=1) if num_val else None
        scores = fit(example_vectors(40, seed=0), val, _NUM_CLASSES).scores
        for size in (1, 7):
            scores_NC = scores(example_vectors(size, seed=2).vectors)
            assert scores_NC.shape == (size, _NUM_CLASSES)
            assert scores_NC.dtype == np.float32
            assert np.isfinite(scores_NC).all()

    @pytest.mark.parametrize("num_val", [0, 20])
    def test_separate_classes_are_learned(self, fit: Fit, num_val: int) -> None:
        val = example_vectors(num_val, seed=1) if num_val else None
        test = example_vectors(60, seed=2)
        predictions = fit(example_vectors(40, seed=0), val, _NUM_CLASSES).scores(test.vectors).argmax(axis=1)
        assert np.mean(predictions == test.labels) > 0.9

    def test_class_without_examples_is_never_found(self, fit: Fit) -> None:
        scores = fit(example_vectors(40, seed=0), None, _NUM_CLASSES + 1).scores(example_vectors(9, seed=2).vectors)
        assert scores.shape == (9, _NUM_CLASSES + 1)
        # A NaN fails too, as it is not less.
        assert (scores[:, -1] < scores[:, :-1].max(axis=1)).all()

    def test_same_examples_give_the_same_scores(self, fit: Fit) -> None:
        train = example_vectors(40, seed=0)
        val = example_vectors(20, seed=1)
        test = example_vectors(9, seed=2)
        copies = [examples.vectors.copy() for examples in (train, val, test)]

        first_scores = fit(train, val, _NUM_CLASSES).scores(test.vectors)
        second_scores = fit(train, val, _NUM_CLASSES).scores(test.vectors)
        np.testing.assert_array_equal(first_scores, second_scores)

        # The caller's arrays are not scaled or centered in place.
        for examples, copy in zip((train, val, test), copies, strict=True):
            np.testing.assert_array_equal(examples.vectors, copy)

    def test_items_are_independent(self, fit: Fit) -> None:
        scores = fit(example_vectors(40, seed=0), None, _NUM_CLASSES).scores
        test = example_vectors(9, seed=2)
        np.testing.assert_allclose(scores(test.vectors[2:3]), scores(test.vectors)[2:3], atol=1e-4, rtol=1e-4)

    @pytest.mark.parametrize("num_val", [0, 20])
    def test_choices_survive_json(self, fit: Fit, num_val: int) -> None:
        val = example_vectors(num_val, seed=1) if num_val else None
        choices = dict(fit(example_vectors(40, seed=0), val, _NUM_CLASSES).chosen)
        assert json.loads(json.dumps(choices, allow_nan=False)) == choices


def example_vectors(size: int, *, seed: int) -> Examples:
    """Return vectors around one center per class, with the classes in random order."""
    centers_CD = np.random.default_rng(100).standard_normal((_NUM_CLASSES, _WIDTH))
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(size) % _NUM_CLASSES)
    vectors = centers_CD[labels] + 0.3 * rng.standard_normal((size, _WIDTH))
    return Examples(vectors=vectors.astype(np.float32), labels=labels)
