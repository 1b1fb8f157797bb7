"""Contract tests of an image or text encoder."""

import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import pytest
from PIL import Image

from embedcache.encoders.base import Encoder, Modality
from embedcache.encoders.open import EncoderSpec, open_encoder
from embedcache.encoders.settings import EncoderSettings
from embedcache.errors import SettingError, UnknownNameError
from embedcache.provenance import canonical_json

TOLERANCE = 2e-5
"""Allowed difference, for values of about 1 that float32 sums in another order give."""

TEXTS = ["a red cat", "two small dogs on the green hill", "hill", "A RED CAT and a dog, two cats"]


def example_images() -> list[Image.Image]:
    """Return a smooth image and two of noise: landscape, portrait and tiny."""
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in ((70, 40), (9, 13))]
    ramp = np.linspace(0, 255, 300 * 500 * 3).reshape(300, 500, 3).astype(np.uint8)
    return [Image.fromarray(ramp), *(Image.fromarray(array) for array in noise)]


class EncoderContract:
    """Tests that every encoder must pass; subclass `ImageEncoderContract` or `TextEncoderContract`.

    Subclasses provide two fixtures: `spec`, the text of an encoder spec, and `other_spec`, the same model with one
    weight changed.
    """

    modality: Modality

    @pytest.fixture
    def encoder(self, spec: str) -> Encoder:
        """Return the encoder under test."""
        return _open_cached(spec, self.modality)

    def test_features_have_the_announced_shapes(self, encoder: Encoder, items: Sequence[Any]) -> None:
        names = list(encoder.features)
        outputs = encoder.encode(encoder.prepare(items), names)
        assert list(outputs) == names
        for name, shape in encoder.features.items():
            assert len(outputs[name]) == len(items)
            for output in outputs[name]:
                assert output.dtype == np.float32
                assert np.isfinite(output).all()
                assert all(size in (-1, found) for size, found in zip(shape, output.shape, strict=True))

    def test_only_named_features_are_returned(self, encoder: Encoder, items: Sequence[Any]) -> None:
        first = next(iter(encoder.features))
        assert list(encoder.encode(encoder.prepare(items[:1]), [first])) == [first]

    def test_batch_size_does_not_change_values(self, encoder: Encoder, items: Sequence[Any]) -> None:
        names, prepared = list(encoder.features), encoder.prepare(items)
        batch = encoder.encode(prepared, names)
        for row, item in enumerate(prepared):
            single = encoder.encode([item], names)
            for name in names:
                np.testing.assert_allclose(single[name][0], batch[name][row], atol=TOLERANCE, rtol=TOLERANCE)

    def test_prepare_is_thread_safe(self, encoder: Encoder, items: Sequence[Any]) -> None:
        expected = encoder.prepare(items)
        with ThreadPoolExecutor(4) as executor:
            for found in executor.map(encoder.prepare, [items] * 12):
                for one, other in zip(found, expected, strict=True):
                    np.testing.assert_array_equal(one, other)

    def test_empty_batch(self, encoder: Encoder) -> None:
        first = next(iter(encoder.features))
        assert encoder.prepare([]) == []
        assert encoder.encode([], [first]) == {first: []}

    def test_unknown_feature_raises(self, encoder: Encoder, items: Sequence[Any]) -> None:
        with pytest.raises(UnknownNameError, match=next(iter(encoder.features))):
            encoder.encode(encoder.prepare(items[:1]), ["nonsense"])

    def test_fingerprint_is_reproducible(self, encoder: Encoder, spec: str) -> None:
        reopened = open_encoder(EncoderSpec.parse(spec).text, modality=self.modality)
        assert canonical_json(reopened.fingerprint.to_json()) == canonical_json(encoder.fingerprint.to_json())

    def test_fingerprint_survives_json(self, encoder: Encoder) -> None:
        fields = encoder.fingerprint.to_json()
        assert json.loads(canonical_json(fields)) == fields
        assert set(encoder.fingerprint.pooling) == set(encoder.features)

    def test_fingerprint_changes_with_one_weight(self, encoder: Encoder, other_spec: str) -> None:
        other = open_encoder(other_spec, modality=self.modality)
        assert other.fingerprint.weights != encoder.fingerprint.weights

    def test_bfloat16_is_close_and_recorded(self, encoder: Encoder, spec: str, items: Sequence[Any]) -> None:
        bfloat16 = open_encoder(spec, modality=self.modality, settings=EncoderSettings(precision="bfloat16"))
        assert (bfloat16.fingerprint.precision, bfloat16.fingerprint.backend) == ("bfloat16", "torch")
        name = next(iter(encoder.features))
        expected = np.stack(encoder.encode(encoder.prepare(items), [name])[name])
        found = np.stack(bfloat16.encode(bfloat16.prepare(items), [name])[name])
        assert found.dtype == np.float32
        assert np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)

    def test_missing_device_raises(self, spec: str) -> None:
        with pytest.raises(SettingError, match=r"cuda:63.*cpu"):
            open_encoder(spec, modality=self.modality, settings=EncoderSettings(device="cuda:63"))

    def test_unknown_option_raises(self, spec: str) -> None:
        with pytest.raises(UnknownNameError, match="nonsense"):
            open_encoder(f"{spec},nonsense=1", modality=self.modality)


class ImageEncoderContract(EncoderContract):
    """Tests that every image encoder must pass; provide the fixtures `spec` and `other_spec`."""

    modality: Modality = "image"

    @pytest.fixture
    def items(self) -> Sequence[Image.Image]:
        """Return images of several sizes."""
        return example_images()

    def test_prepared_images_have_one_shape(self, encoder: Encoder, items: Sequence[Any]) -> None:
        prepared = encoder.prepare(items)
        ((channels, *_),) = {array.shape for array in prepared}
        assert channels == 3
        assert {str(array.dtype) for array in prepared} in ({"uint8"}, {"float32"})


class TextEncoderContract(EncoderContract):
    """Tests that every text encoder must pass; provide the fixtures `spec` and `other_spec`, and set `max_tokens`."""

    modality: Modality = "text"
    max_tokens: int

    @pytest.fixture
    def items(self) -> Sequence[str]:
        """Return texts of several lengths."""
        return TEXTS

    def test_prepared_texts_are_token_ids(self, encoder: Encoder, items: Sequence[Any]) -> None:
        for ids in encoder.prepare(items):
            assert ids.dtype == np.int64
            assert ids.ndim == 1

    def test_long_text_is_truncated(self, encoder: Encoder) -> None:
        prepared = encoder.prepare(["a red cat " * 500, "a red cat"])
        assert len(prepared[0]) == self.max_tokens
        names = list(encoder.features)
        batch = encoder.encode(prepared, names)
        single = encoder.encode(prepared[1:], names)
        for name in names:
            np.testing.assert_allclose(single[name][0], batch[name][1], atol=TOLERANCE, rtol=TOLERANCE)
            if encoder.features[name][0] == -1:
                assert [len(tokens) for tokens in batch[name]] == [len(ids) for ids in prepared]


@cache
def _open_cached(spec: str, modality: Modality) -> Encoder:
    return open_encoder(spec, modality=modality)
