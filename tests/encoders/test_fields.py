"""Arrays of point clouds as features."""

import numpy as np
import pytest

from embedcache.encoders.open import EncoderSpec, open_encoder
from embedcache.errors import ItemError, SettingError
from embedcache.extract.feature_writer import choose_features
from embedcache.testing.encoders import PointsEncoderContract, example_points


class TestFields(PointsEncoderContract):
    has_weights = False

    @pytest.fixture
    def spec(self) -> str:
        return "fields:xyz,uv,label"


def test_values_are_copied_to_the_bit() -> None:
    encoder = open_encoder("fields:xyz,uv,label", modality="points")
    assert encoder.features == {"xyz": (-1, 3), "uv": (-1, 2), "label": (-1, 1)}
    assert encoder.dtypes == {"xyz": "float32", "uv": "float32", "label": "int16"}  # type: ignore[attr-defined]
    items = example_points()
    found = encoder.encode(encoder.prepare(items), ["label", "xyz", "uv"])
    for number, item in enumerate(items):
        for name in ("xyz", "uv"):
            np.testing.assert_array_equal(found[name][number], item[name])
            assert found[name][number].dtype == np.float32
        np.testing.assert_array_equal(found["label"][number][:, 0], item["label"])
        assert found["label"][number].dtype == np.int16


def test_all_fields_are_extracted_by_default() -> None:
    encoder = open_encoder("fields:xyz,uv,label", modality="points")
    assert choose_features(encoder, []) == ["xyz", "uv", "label"]
    assert choose_features(encoder, ["states"]) == ["xyz", "uv", "label"]
    assert choose_features(encoder, ["label"]) == ["label"]


def test_columns_and_dtypes() -> None:
    encoder = open_encoder("fields:normal:3,moving:int16,track:2:int32", modality="points")
    item = {
        "xyz": np.zeros((4, 3), np.float32),
        "normal": np.eye(4, 3),
        "moving": np.array([True, False, True, False]),
        "track": np.array([[1, 2], [3, 100_000], [np.nan, -1], [0, 0]]),
    }
    found = encoder.encode(encoder.prepare([item]), ["normal", "moving", "track"])
    assert found["moving"][0].tolist() == [[1], [0], [1], [0]]
    assert found["track"][0].tolist() == [[1, 2], [3, 100_000], [-1, -1], [0, 0]]
    assert found["normal"][0].dtype == np.float32


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"label": None}, "no array 'label': found uv, xyz"),
        ({"label": np.zeros((3, 1))}, r"array 'label': expected shape \(4, 1\), got \(3, 1\)"),
        ({"label": np.full(4, 40_000)}, "expected integers from -32768 to 32767, or NaN; got 40000"),
        ({"label": np.full(4, 1.5)}, r"got 1\.5"),
        ({"label": np.full(4, 32_768, np.float16)}, r"got 32768\.0"),  # 32,767 is 32,768 in float16
        ({"label": np.array(["a", "b", "c", "d"])}, "expected numbers, got <U1"),
        ({"uv": np.full((4, 2), np.inf)}, "array 'uv': 4 of 4 rows have NaN or infinite values"),
        ({"uv": np.full((4, 2), 1e300)}, "4 of 4 rows have NaN or infinite"),
        ({"uv": np.zeros((4, 3))}, r"expected shape \(4, 2\), got \(4, 3\)"),
    ],
)
def test_bad_arrays_fail_with_a_reason(changed: dict[str, np.ndarray | None], reason: str) -> None:
    item = {"xyz": np.zeros((4, 3), np.float32), "uv": np.zeros((4, 2), np.float32), "label": np.zeros(4, np.int64)}
    item = {name: array for name, array in {**item, **changed}.items() if array is not None}
    with pytest.raises(ItemError, match=reason):
        open_encoder("fields:xyz,uv,label", modality="points").prepare([item])


@pytest.mark.parametrize("spec", ["fields:xyz:float64", "fields:xyz,xyz", "fields:a b", "fields:x:0"])
def test_wrong_specs_raise(spec: str) -> None:
    with pytest.raises(SettingError):
        open_encoder(spec, modality="points")


def test_spec_text_is_parsed_again() -> None:
    spec = EncoderSpec.parse("fields:xyz, uv,label:int32")
    assert spec == EncoderSpec("fields", "xyz+uv+label:int32")
    assert EncoderSpec.parse(spec.text) == spec
    assert spec.folder == "fields"
