"""What every encoder must do, whatever its family. A family's test class subclasses one of the two."""

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from embedcache.encoders.base import Encoder, EncoderSettings, Modality
from embedcache.encoders.open import EncoderSpec, open_encoder
from embedcache.errors import SettingError, UnknownNameError
from embedcache.provenance import canonical_json

TOLERANCE = 2e-5
"""float32 sums in another order, on values of about 1."""


class EncoderContract:
    """Subclasses give the fixtures `spec` (text), `other_spec` (the same model, one weight changed) and `items`."""

    modality: Modality

    @pytest.fixture
    def encoder(self, spec: str) -> Encoder:
        return _opened(spec, self.modality)

    def test_features_are_as_announced(self, encoder: Encoder, items: Sequence[Any]) -> None:
        names = list(encoder.features)
        outputs = encoder.encode(encoder.prepare(items), names)
        assert list(outputs) == names
        for name in names:
            assert len(outputs[name]) == len(items)
            for output in outputs[name]:
                assert output.dtype == np.float32
                assert np.isfinite(output).all()
                fixed = [size for size in encoder.features[name] if size != -1]
                assert list(output.shape)[-len(fixed) :] == fixed
                assert output.ndim == len(encoder.features[name])

    def test_only_the_named_features_are_given(self, encoder: Encoder, items: Sequence[Any]) -> None:
        first = next(iter(encoder.features))
        assert list(encoder.encode(encoder.prepare(items[:1]), [first])) == [first]

    def test_an_item_alone_equals_the_item_in_a_batch(self, encoder: Encoder, items: Sequence[Any]) -> None:
        names, prepared = list(encoder.features), encoder.prepare(items)
        together = encoder.encode(prepared, names)
        for row, one in enumerate(prepared):
            alone = encoder.encode([one], names)
            for name in names:
                np.testing.assert_allclose(alone[name][0], together[name][row], atol=TOLERANCE, rtol=TOLERANCE)

    def test_prepare_is_the_same_from_many_threads(self, encoder: Encoder, items: Sequence[Any]) -> None:
        expected = encoder.prepare(items)
        with ThreadPoolExecutor(4) as executor:
            for found in executor.map(encoder.prepare, [items] * 12):
                for one, other in zip(found, expected, strict=True):
                    np.testing.assert_array_equal(one, other)

    def test_an_empty_batch_gives_no_rows(self, encoder: Encoder) -> None:
        first = next(iter(encoder.features))
        assert encoder.prepare([]) == []
        assert encoder.encode([], [first]) == {first: []}

    def test_an_unknown_feature_is_refused_with_those_there_are(self, encoder: Encoder, items: Sequence[Any]) -> None:
        with pytest.raises(UnknownNameError, match=next(iter(encoder.features))):
            encoder.encode(encoder.prepare(items[:1]), ["nonsense"])

    def test_the_fingerprint_is_the_same_when_opened_again_from_the_text_of_its_spec(
        self, encoder: Encoder, spec: str
    ) -> None:
        again = open_encoder(EncoderSpec.parse(spec).text, modality=self.modality)
        assert canonical_json(again.fingerprint.to_json()) == canonical_json(encoder.fingerprint.to_json())

    def test_the_fingerprint_survives_json(self, encoder: Encoder) -> None:
        fields = encoder.fingerprint.to_json()
        assert json.loads(canonical_json(fields)) == fields
        assert set(encoder.fingerprint.pooling) == set(encoder.features)

    def test_the_fingerprint_changes_with_one_weight(self, encoder: Encoder, other_spec: str) -> None:
        other = open_encoder(other_spec, modality=self.modality)
        assert other.fingerprint.weights != encoder.fingerprint.weights

    def test_bfloat16_is_close_and_in_the_fingerprint(self, encoder: Encoder, spec: str, items: Sequence[Any]) -> None:
        half = open_encoder(spec, modality=self.modality, settings=EncoderSettings(precision="bfloat16"))
        assert (half.fingerprint.precision, half.fingerprint.backend) == ("bfloat16", "torch")
        name = next(iter(encoder.features))
        expected = np.stack(encoder.encode(encoder.prepare(items), [name])[name])
        found = np.stack(half.encode(half.prepare(items), [name])[name])
        assert found.dtype == np.float32
        assert np.linalg.norm(found - expected) < 0.1 * np.linalg.norm(expected)

    def test_a_device_that_is_not_there_is_refused(self, spec: str) -> None:
        with pytest.raises(SettingError, match=r"cuda:63.*cpu"):
            open_encoder(spec, modality=self.modality, settings=EncoderSettings(device="cuda:63"))

    def test_an_unknown_option_is_refused(self, spec: str) -> None:
        with pytest.raises(UnknownNameError, match="nonsense"):
            open_encoder(f"{spec},nonsense=1", modality=self.modality)


class ImageEncoderContract(EncoderContract):
    modality: Modality = "image"

    @pytest.fixture
    def items(self) -> Sequence[Image.Image]:
        return pictures()

    def test_inputs_are_pictures_of_one_shape(self, encoder: Encoder, items: Sequence[Any]) -> None:
        shapes = {array.shape for array in encoder.prepare(items)}
        assert len(shapes) == 1
        assert next(iter(shapes))[0] == 3
        assert {array.dtype for array in encoder.prepare(items)} == {np.dtype(np.uint8)}


class TextEncoderContract(EncoderContract):
    modality: Modality = "text"
    max_tokens: int

    @pytest.fixture
    def items(self) -> Sequence[str]:
        return TEXTS

    def test_inputs_are_token_ids(self, encoder: Encoder, items: Sequence[Any]) -> None:
        for ids in encoder.prepare(items):
            assert ids.dtype == np.int64
            assert ids.ndim == 1

    def test_a_long_text_is_cut_at_the_models_longest_input(self, encoder: Encoder) -> None:
        prepared = encoder.prepare(["a red cat " * 500, "a red cat"])
        assert len(prepared[0]) == self.max_tokens
        names = list(encoder.features)
        outputs = encoder.encode(prepared, names)
        alone = encoder.encode(prepared[1:], names)
        for name in names:
            np.testing.assert_allclose(alone[name][0], outputs[name][1], atol=TOLERANCE, rtol=TOLERANCE)
            if encoder.features[name][0] == -1:
                assert [len(tokens) for tokens in outputs[name]] == [len(ids) for ids in prepared]


TEXTS = ["a red cat", "two small dogs on the green hill", "hill", "A RED CAT and a dog, two cats"]


@cache
def _opened(spec: str, modality: Modality) -> Encoder:
    return open_encoder(spec, modality=modality)


def pictures() -> list[Image.Image]:
    """Smooth and noisy pictures, wide, high and tiny."""
    rng = np.random.default_rng(0)
    noise = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for height, width in ((70, 40), (9, 13))]
    ramp = np.linspace(0, 255, 300 * 500 * 3).reshape(300, 500, 3).astype(np.uint8)
    return [Image.fromarray(ramp), *(Image.fromarray(array) for array in noise)]


def change_one_weight(path: Path, change: Callable[[Any], Any] = lambda tensor: tensor + 1) -> None:
    """Change one value in a safetensors file, in place."""
    state = load_file(path)
    name = min(key for key, tensor in state.items() if tensor.is_floating_point())
    first = state[name].clone()
    first.view(-1)[0] = change(first.view(-1)[0])
    save_file({**state, name: first}, path, metadata={"format": "pt"})
