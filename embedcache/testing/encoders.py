"""Contract tests of an encoder, for each modality."""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import numpy as np
import pytest
from PIL import Image

from embedcache.arrays import Array
from embedcache.encoders.base import NO_WEIGHTS, Encoder, EncoderSettings, Modality
from embedcache.encoders.open import EncoderSpec, open_encoder
from embedcache.errors import ItemError, SettingError, UnknownNameError
from embedcache.provenance import canonical_json
from embedcache.sources.media import Video
from embedcache.store.layout import Axis

TOLERANCE = 2e-5
"""Allowed difference, as a fraction of a vector's length, that float32 sums in another order give."""

BFLOAT16 = EncoderSettings(precision="bfloat16")

TEXTS = ["a red cat", "two small dogs on the green hill", "hill", "A RED CAT and a dog, two cats"]


def example_images() -> list[Image.Image]:
    """Return a smooth image and two of noise: landscape, portrait and tiny."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(0, 255, 300 * 500 * 3).reshape(300, 500, 3).astype(np.uint8)
    images = [Image.fromarray(ramp)]
    for height, width in ((70, 40), (9, 13)):
        images.append(Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)))
    return images


def example_audio() -> list[Array]:
    """Return noise, a tone of the same length, silence, and a longer tone that becomes louder: 0.5 to 1.3 s."""
    rng = np.random.default_rng(0)
    time_s = np.arange(20_900) / 16_000
    tone = np.sin(2 * np.pi * 440 * time_s) * np.linspace(0.01, 0.6, len(time_s))
    noise = 0.1 * rng.standard_normal(9_777)
    return [array.astype(np.float32) for array in (noise, tone[:9_777], np.zeros(8_000), tone)]


def example_videos() -> list[Video]:
    """Return videos of several rates and sizes, one of them a single frame."""
    rng = np.random.default_rng(0)
    shapes = {25.0: (6, 40, 64, 3), 30.0: (9, 48, 48, 3), 10.0: (1, 30, 20, 3)}
    videos = []
    for rate_hz, shape in shapes.items():
        videos.append(Video(frames_THW3=rng.integers(0, 256, shape, dtype=np.uint8), rate_hz=rate_hz))
    return videos


def example_points() -> list[Mapping[str, Array]]:
    """Return point clouds of two sizes on a ground plane and a wall, with the arrays `uv` and `label`."""
    rng = np.random.default_rng(0)
    clouds: list[Mapping[str, Array]] = []
    for num_points in (150, 90):
        is_ground = np.arange(num_points)[:, None] % 3 > 0
        # Two thirds of the points are close to the ground, and the others are on the wall.
        xyz = rng.uniform(-4, 4, (num_points, 3)) * np.where(is_ground, (1, 1, 0.02), (1, 0, 1))
        uv = rng.uniform(0, 1, (num_points, 2))
        label = rng.integers(-1, 7, num_points)
        clouds.append({"xyz": xyz.astype(np.float32), "uv": uv.astype(np.float32), "label": label.astype(np.int64)})
    return clouds


class EncoderContract:
    """Tests that every encoder must pass. Subclass the contract of the encoder's modality.

    Subclasses provide two fixtures: `spec`, the text of an encoder spec, and `other_spec`, the same model with one
    weight changed. If an encoder has no weights and computes on the CPU in float32 whatever the settings say, set
    `has_weights` to False and omit `other_spec`. If it runs in float32 only, set `has_bfloat16` to False. It must then
    raise a SettingError for other precisions. The vectors of an item in batches of two sizes may differ by `tolerance`
    of their length. Set more for a model whose kernels depend on the size of a batch.

    Example:
        >>> class TestMine(ImageEncoderContract):
        ...     tolerance = 1e-3
        ...     spec = pytest.fixture(lambda self: "my_module:open_mine,weights=a.safetensors")
        ...     other_spec = pytest.fixture(lambda self: "my_module:open_mine,weights=b.safetensors")
    """

    modality: Modality
    has_weights = True
    has_bfloat16 = True
    tolerance = TOLERANCE

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
                assert output.dtype == getattr(encoder, "dtypes", {}).get(name, "float32")
                assert np.isfinite(output).all()
                # Any number of tokens is announced as -1.
                for announced_size, size in zip(shape, output.shape, strict=True):
                    assert announced_size in (-1, size)

    def test_tokens_have_axes(self, encoder: Encoder) -> None:
        axes = getattr(encoder, "axes", {})
        dtypes = getattr(encoder, "dtypes", {})
        assert {*axes, *dtypes} <= {*encoder.features}
        for name, axis in axes.items():
            assert isinstance(axis, Axis)
            assert len(encoder.features[name]) == 2

        # Tokens of images and texts have no axis.
        if self.modality not in ("image", "text"):
            for name, shape in encoder.features.items():
                assert shape[0] != -1 or name in axes

    def test_only_named_features_are_returned(self, encoder: Encoder, items: Sequence[Any]) -> None:
        first = next(iter(encoder.features))
        assert list(encoder.encode(encoder.prepare(items[:1]), [first])) == [first]

    def test_batch_size_does_not_change_values(self, encoder: Encoder, items: Sequence[Any]) -> None:
        names = list(encoder.features)
        prepared = encoder.prepare(items)
        batch = encoder.encode(prepared, names)

        # An item must not depend on the padding for longer ones.
        for row, item in enumerate(prepared):
            single = encoder.encode([item], names)
            for name in names:
                self._assert_close(single[name][0], batch[name][row])

    def _assert_close(self, actual: Array, expected: Array) -> None:
        """Check that vectors differ by at most `tolerance` of their length."""
        assert actual.shape == expected.shape
        differences = np.linalg.norm(np.subtract(actual, expected, dtype=np.float64), axis=-1)
        allowed = self.tolerance * np.linalg.norm(np.asarray(expected, np.float64), axis=-1)
        assert (differences <= allowed).all(), f"differ by {differences.max():.1e}, {allowed.min():.1e} is allowed"

    def test_prepare_is_thread_safe(self, encoder: Encoder, items: Sequence[Any]) -> None:
        expected = encoder.prepare(items)

        # Extraction prepares items on several threads.
        with ThreadPoolExecutor(4) as executor:
            for prepared in executor.map(encoder.prepare, [items] * 12):
                for array, expected_array in zip(prepared, expected, strict=True):
                    np.testing.assert_array_equal(array, expected_array)

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

    def test_fingerprint_changes_with_one_weight(self, encoder: Encoder, request: pytest.FixtureRequest) -> None:
        if not self.has_weights:
            assert encoder.fingerprint.weights == NO_WEIGHTS
            return

        # bfloat16 runs on torch, which saves an ONNX export.
        settings = BFLOAT16 if self.has_bfloat16 else None
        other = open_encoder(request.getfixturevalue("other_spec"), modality=self.modality, settings=settings)
        assert other.fingerprint.weights != encoder.fingerprint.weights

    def test_bfloat16_is_close_and_recorded(self, encoder: Encoder, spec: str, items: Sequence[Any]) -> None:
        if not self.has_weights:
            assert open_encoder(spec, modality=self.modality, settings=BFLOAT16).fingerprint == encoder.fingerprint
            return

        if not self.has_bfloat16:
            with pytest.raises(SettingError, match=r"expected (.* )?float32") as raised:
                open_encoder(spec, modality=self.modality, settings=BFLOAT16)
            assert "bfloat16" in str(raised.value)
            return

        bfloat16 = open_encoder(spec, modality=self.modality, settings=BFLOAT16)
        assert (bfloat16.fingerprint.precision, bfloat16.fingerprint.backend) == ("bfloat16", "torch")
        assert bfloat16.fingerprint.weights == encoder.fingerprint.weights

        # bfloat16 has 8 bits of precision, and errors add up over the layers.
        name = next(iter(encoder.features))
        expected = np.concatenate(encoder.encode(encoder.prepare(items), [name])[name])
        actual = np.concatenate(bfloat16.encode(bfloat16.prepare(items), [name])[name])
        assert actual.dtype == np.float32
        assert np.linalg.norm(actual - expected) < 0.1 * np.linalg.norm(expected)

    def test_missing_device_raises(self, spec: str) -> None:
        if not self.has_weights:
            return
        with pytest.raises(SettingError, match=r"cuda:63.*cpu"):
            open_encoder(spec, modality=self.modality, settings=EncoderSettings(device="cuda:63"))

    def test_unknown_option_raises(self, spec: str) -> None:
        with pytest.raises(UnknownNameError, match="nonsense"):
            open_encoder(f"{spec},nonsense=1", modality=self.modality)


class ImageEncoderContract(EncoderContract):
    """Tests that every image encoder must pass. Provide the fixtures `spec` and `other_spec`.

    Example:
        >>> class TestMine(ImageEncoderContract):
        ...     spec = pytest.fixture(lambda self: "my_module:open_mine,weights=a.safetensors")
        ...     other_spec = pytest.fixture(lambda self: "my_module:open_mine,weights=b.safetensors")
    """

    modality: Modality = "image"

    @pytest.fixture
    def items(self) -> Sequence[Image.Image]:
        """Return images of several sizes."""
        return example_images()

    def test_prepared_images_have_one_shape(self, encoder: Encoder, items: Sequence[Any]) -> None:
        prepared = encoder.prepare(items)
        for array in prepared:
            assert array.shape == prepared[0].shape
            assert array.dtype == prepared[0].dtype
        assert prepared[0].shape[0] == 3
        assert str(prepared[0].dtype) in ("uint8", "float32")


class TextEncoderContract(EncoderContract):
    """Tests that every text encoder must pass. Provide the fixtures `spec` and `other_spec`.

    If an encoder prepares token ids, set `max_tokens` to the number to which it truncates.

    Example:
        >>> class TestMine(TextEncoderContract):
        ...     max_tokens = 77
        ...     spec = pytest.fixture(lambda self: "my_module:open_mine,weights=a.safetensors")
        ...     other_spec = pytest.fixture(lambda self: "my_module:open_mine,weights=b.safetensors")
    """

    modality: Modality = "text"
    max_tokens: int | None = None

    @pytest.fixture
    def items(self) -> Sequence[str]:
        """Return texts of several lengths."""
        return TEXTS

    def test_prepared_texts_are_token_ids(self, encoder: Encoder, items: Sequence[Any]) -> None:
        if self.max_tokens is None:
            return
        for ids in encoder.prepare(items):
            assert ids.dtype == np.int64
            assert ids.ndim == 1

    def test_long_text_does_not_change_others(self, encoder: Encoder) -> None:
        prepared = encoder.prepare(["a red cat " * 500, "a red cat"])
        assert self.max_tokens in (None, len(prepared[0]))

        names = list(encoder.features)
        batch = encoder.encode(prepared, names)
        single = encoder.encode(prepared[1:], names)
        for name in names:
            self._assert_close(single[name][0], batch[name][1])
            if encoder.features[name][0] == -1 and self.max_tokens is not None:
                assert list(map(len, batch[name])) == list(map(len, prepared))


class AudioEncoderContract(EncoderContract):
    """Tests that every audio encoder must pass. Provide the fixtures `spec` and `other_spec`.

    Example:
        >>> class TestMine(AudioEncoderContract):
        ...     has_bfloat16 = False  # it runs in float32 only
        ...     spec = pytest.fixture(lambda self: "my_module:open_mine,weights=a.safetensors")
        ...     other_spec = pytest.fixture(lambda self: "my_module:open_mine,weights=b.safetensors")
    """

    modality: Modality = "audio"

    @pytest.fixture
    def items(self) -> Sequence[Array]:
        """Return audio of several lengths."""
        return example_audio()

    def test_number_of_frames_follows_the_rate(self, encoder: Encoder, items: Sequence[Array]) -> None:
        for name, axis in getattr(encoder, "axes", {}).items():
            frames = encoder.encode(encoder.prepare(items), [name])[name]
            for item_frames, audio in zip(frames, items, strict=True):
                assert abs(len(item_frames) - len(audio) / 16_000 * axis.rate_hz) <= 1.5

    @pytest.mark.parametrize("num_samples", [0, 1, 20])
    def test_too_short_recording_fails_with_a_reason(self, encoder: Encoder, num_samples: int) -> None:
        with pytest.raises(ItemError, match="short"):
            encoder.prepare([np.zeros(num_samples, np.float32)])

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_bad_samples_fail_with_a_reason(self, encoder: Encoder, value: float) -> None:
        audio = example_audio()[0].copy()
        audio[5_000] = value
        with pytest.raises(ItemError, match="NaN"):
            encoder.prepare([audio])


class VideoEncoderContract(EncoderContract):
    """Tests that every video encoder must pass. Provide the fixtures `spec` and `other_spec`.

    Example:
        >>> class TestMine(VideoEncoderContract):
        ...     spec = pytest.fixture(lambda self: "my_module:open_mine,weights=a.safetensors")
        ...     other_spec = pytest.fixture(lambda self: "my_module:open_mine,weights=b.safetensors")
    """

    modality: Modality = "video"

    @pytest.fixture
    def items(self) -> Sequence[Video]:
        """Return videos of several rates and sizes."""
        return example_videos()

    def test_number_of_frames_follows_the_rate(self, encoder: Encoder, items: Sequence[Video]) -> None:
        for name, axis in getattr(encoder, "axes", {}).items():
            steps = encoder.encode(encoder.prepare(items), [name])[name]
            for item_steps, video in zip(steps, items, strict=True):
                assert abs(len(item_steps) - len(video.frames_THW3) / video.rate_hz * axis.rate_hz) <= 1.5


class PointsEncoderContract(EncoderContract):
    """Tests that every encoder of point clouds must pass. Provide the fixtures `spec` and `other_spec`.

    Example:
        >>> class TestMine(PointsEncoderContract):
        ...     has_weights = False  # so `other_spec` is omitted
        ...     spec = pytest.fixture(lambda self: "my_module:open_mine")
    """

    modality: Modality = "points"

    @pytest.fixture
    def items(self) -> Sequence[Mapping[str, Array]]:
        """Return point clouds of several sizes."""
        return example_points()

    def test_rows_are_the_points_in_order(self, encoder: Encoder, items: Sequence[Mapping[str, Array]]) -> None:
        order = np.random.default_rng(0).permutation(len(items[0]["xyz"]))
        permuted = {name: array[order] for name, array in items[0].items()}
        for name in getattr(encoder, "axes", {}):
            actual, expected = encoder.encode(encoder.prepare([permuted, items[0]]), [name])[name]
            assert len(expected) == len(order)
            np.testing.assert_allclose(actual, expected[order], atol=1e-4)

    def test_nan_coordinates_fail_with_a_reason(self, encoder: Encoder, items: Sequence[Mapping[str, Array]]) -> None:
        xyz = items[0]["xyz"].copy()
        xyz[7, 1] = np.nan
        with pytest.raises(ItemError, match="NaN"):
            encoder.prepare([{**items[0], "xyz": xyz}])

    def test_no_points_never_crash(self, encoder: Encoder, items: Sequence[Mapping[str, Array]]) -> None:
        empty = {name: array[:0] for name, array in items[0].items()}
        try:
            prepared = encoder.prepare([empty])
        except ItemError:
            return

        for name, (output,) in encoder.encode(prepared, list(encoder.features)).items():
            assert len(output) == (0 if encoder.features[name][0] == -1 else encoder.features[name][0])


@cache
def _open_cached(spec: str, modality: Modality) -> Encoder:
    return open_encoder(spec, modality=modality)
