import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from embedcache.dataset.pairs import Items, Pairs


@st.composite
def pairs(draw: st.DrawFn) -> Pairs:
    """Samples with one or more images and texts, whose contents often repeat."""
    rng = np.random.default_rng(draw(st.integers(0, 10_000)))
    count = draw(st.integers(1, 6))

    def side() -> Items:
        samples = np.sort(np.concatenate([np.arange(count), rng.integers(count, size=draw(st.integers(0, 5)))]))
        contents = rng.integers(5, size=len(samples))
        return Items(rows=np.arange(len(samples)), samples=samples, contents=contents)

    return Pairs(first=side(), second=side())


@given(pairs())
def test_positives_by_equal_content(pairs: Pairs) -> None:
    together = {
        (image, text)
        for image, image_sample in zip(pairs.first.contents, pairs.first.samples, strict=True)
        for text, text_sample in zip(pairs.second.contents, pairs.second.samples, strict=True)
        if image_sample == text_sample
    }
    expected = [
        (i, t)
        for i, image in enumerate(pairs.first.contents)
        for t, text in enumerate(pairs.second.contents)
        if (image, text) in together
    ]
    assert list(zip(*(array.tolist() for array in pairs.positives()), strict=True)) == expected


@given(pairs())
def test_joined_pairs_all_items_of_a_sample(pairs: Pairs) -> None:
    expected = [
        (i, t)
        for i, image in enumerate(pairs.first.samples)
        for t, text in enumerate(pairs.second.samples)
        if image == text
    ]
    assert list(zip(*(array.tolist() for array in pairs.all_pairs()), strict=True)) == expected
