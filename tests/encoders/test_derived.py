"""Derived features, compared with reference pooling and with hooks on the libraries' blocks."""

from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from embedcache.encoders.base import EncoderSettings, Modality
from embedcache.encoders.open import open_encoder
from embedcache.modeling.features import (
    FeatureName,
    GridPool,
    KMeansPool,
    TimmFeatures,
    patch_grid,
    state_features,
    untie_last_state,
)
from embedcache.testing.encoders import TEXTS, example_images
from tests.encoders.checkpoints import save_dinov2, save_sentence_transformer, save_timm


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("cls", FeatureName("cls")),
        ("grid:4", FeatureName("patches", grid=4)),
        ("layer6.cls", FeatureName("cls", layer=6)),
        ("layer11.grid:2", FeatureName("patches", layer=11, grid=2)),
        ("layer11.kmeans:2", FeatureName("patches", layer=11, clusters=2)),
        ("layer0.cls", None),
        ("layer3", None),
        ("grid:0", None),
        ("layer3.layer2.cls", None),
        ("Cls", None),
    ],
)
def test_parse_feature_name(text: str, name: FeatureName | None) -> None:
    assert FeatureName.parse(text) == name


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_grid_is_adaptive_average_pooling(height: int, width: int, data: st.DataObject) -> None:
    side = data.draw(st.integers(1, min(height, width)))
    maps_BDHW = torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(height * 10 + width))
    expected = torch.nn.functional.adaptive_avg_pool2d(maps_BDHW, side).flatten(2).transpose(1, 2)
    found = GridPool((height, width), side)(maps_BDHW.flatten(2).transpose(1, 2))
    np.testing.assert_allclose(found, expected, atol=1e-6)


@pytest.mark.slow
@given(st.integers(1, 30), st.data())
@settings(max_examples=20)
def test_kmeans_matches_reference(num_patches: int, data: st.DataObject) -> None:
    num_clusters = data.draw(st.integers(1, num_patches))
    patches_BTD = _draw(2, num_patches, seed=num_patches * 100 + num_clusters)
    found = KMeansPool(num_patches, num_clusters)(patches_BTD)
    assert found.shape == (2, num_clusters, 5)
    np.testing.assert_allclose(found, _clusters(patches_BTD, num_clusters), atol=1e-5)


@pytest.mark.slow
@given(st.integers(1, 30), st.integers(0, 5), st.integers(1, 9), st.data())
@settings(max_examples=20)
def test_kmeans_does_not_depend_on_batch(num_patches: int, row: int, num_others: int, data: st.DataObject) -> None:
    pool = KMeansPool(num_patches, data.draw(st.integers(1, num_patches)))
    alone_1TD, *batches = (_draw(size, num_patches, seed) for seed, size in enumerate((1, num_others, num_others)))
    row = min(row, num_others)
    one, other = (pool(torch.cat([batch[:row], alone_1TD, batch[row:]]))[row] for batch in batches)
    assert torch.equal(one, other)
    np.testing.assert_allclose(one, pool(alone_1TD)[0], atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_kmeans_ignores_rounding(seed: int) -> None:
    """A convolution yields equal patches that differ by rounding between batches."""
    patches_BTD = _draw(4, 100, seed)
    patches_BTD[:, 20:90] = patches_BTD[:, :1]
    others_BTD = patches_BTD + 1e-6 * _draw(4, 100, seed + 5)
    np.testing.assert_allclose(KMeansPool(100, 9)(others_BTD), KMeansPool(100, 9)(patches_BTD), atol=1e-5)


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 32), st.data())
def test_patch_grid_with_remainder(height: int, width: int, patch_px: int, data: st.DataObject) -> None:
    rest_px = st.integers(0, patch_px - 1)
    size_px = height * patch_px + data.draw(rest_px), width * patch_px + data.draw(rest_px)
    assert patch_grid(height * width, *size_px) == (height, width)


REQUESTED = (
    "layer1.cls",
    "layer2.patches",
    "layer2.patch_mean",
    "layer1.grid:2",
    "grid:2",
    "layer1.kmeans:2",
    "kmeans:3",
)
UNKNOWN = ("layer2.tokens", "layer1.mean", "layer99.cls", "grid:99", "kmeans:9999", "nonsense")
BLOCKS: dict[str, Callable[[Any], Any]] = {
    "test_vit": lambda model: model.blocks,
    "test_vit3": lambda model: model.blocks,
    "test_convnext": lambda model: model.stages,
    "test_resnet": lambda model: [model.act1, model.layer1],  # a ResNet's first level is its stem
    "lite": lambda model: chain.from_iterable(model.blocks),
    "dinov2": lambda model: _only_list(model),
    "dinov2 with registers": lambda model: _only_list(model),
}
"""Image model -> its blocks, or levels, in order."""


@pytest.mark.slow
@pytest.mark.parametrize("name", BLOCKS)
def test_image_blocks(name: str, tmp_path: Path) -> None:
    if name == "lite":
        spec = "lite:efficientnet-lite0,fit=128x128"
    elif name.startswith("dinov2"):
        spec = f"hf:{save_dinov2(tmp_path / 'dinov2', num_registers=3 if 'registers' in name else 0)}"
    else:
        spec = f"timm:{name},weights={save_timm(name, tmp_path, seed=0)}"
    encoder, prepared, found = _check_native(spec, "image", (*REQUESTED, *UNKNOWN))
    assert not found.keys() & set(UNKNOWN)
    assert ("layer1.cls" in found) == ("cls" in found)

    model = _inner(encoder)
    states = _states(model, BLOCKS[name](model), prepared, encoder)
    if "cls" in found:
        np.testing.assert_allclose(found["layer1.cls"], states[0][:, 0], atol=1e-6)
    num_prefix = states[0].shape[1] - found["layer2.patches"].shape[1]
    first, second = (state.flatten(2).mT if state.ndim == 4 else state[:, num_prefix:] for state in states[:2])
    np.testing.assert_allclose(found["layer2.patches"], second, atol=1e-6)
    np.testing.assert_allclose(found["layer2.patch_mean"], second.mean(1), atol=1e-4)
    for feature, expected in (
        ("layer1.grid:2", _grid(first, 2)),
        ("layer1.kmeans:2", _clusters(first, 2)),
        ("grid:2", _grid(torch.tensor(found["patches"]), 2)),
        ("kmeans:3", _clusters(torch.tensor(found["patches"]), 3)),
    ):
        np.testing.assert_allclose(found[feature], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_lite_onnx_agrees_with_torch() -> None:
    spec = "lite:efficientnet-lite0,fit=128x128"
    settings = EncoderSettings(backend="onnxruntime", features=REQUESTED)
    _, prepared, expected = _check_native(spec, "image", REQUESTED)
    encoder = open_encoder(spec, modality="image", settings=settings)
    assert list(encoder.features) == list(expected)
    found = encoder.encode(prepared, list(encoder.features))
    for name, values in found.items():
        np.testing.assert_allclose(np.stack(values), expected[name], atol=2e-3)  # values of up to 30


def test_timm_network_that_stops_early() -> None:
    """Hiera's forward pass stops after the last requested level."""
    import timm

    torch.manual_seed(0)
    model = timm.create_model("hiera_tiny_224", num_classes=0, embed_dim=16, num_heads=1, stages=(1, 1, 1, 1)).eval()
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        native, found = TimmFeatures(model, [])(images), TimmFeatures(model, [1])(images)
    assert found["layer1.patch_mean"].shape == (1, 16)
    for name, expected in native.items():
        np.testing.assert_allclose(found[name], expected, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "backend"), [("hf", "torch"), ("hf", "onnxruntime"), ("st", "torch")])
def test_text_model_blocks(family: str, backend: Any, bert: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    if family == "st":
        bert = save_sentence_transformer(tmp_path / "st", bert, pooling="mean", max_tokens=16)
    settings = EncoderSettings(backend=backend)
    encoder, prepared, found = _check_native(f"{family}:{bert}", "text", (*REQUESTED, *UNKNOWN), settings, atol=1e-5)
    own = ["mean", "cls", "tokens"] if family == "hf" else ["mean", "tokens"]
    blocks = ["layer1.cls", "layer2.tokens", "layer1.mean"] if family == "hf" else ["layer2.tokens", "layer1.mean"]
    assert list(encoder.features) == [*own, *blocks]
    assert encoder.features["layer2.tokens"] == (-1, 32)
    model = AutoModel.from_pretrained(bert).eval()
    for row, ids in enumerate(prepared):
        with torch.no_grad():
            states = model(input_ids=torch.tensor(ids)[None], output_hidden_states=True).hidden_states
        np.testing.assert_allclose(found["layer2.tokens"][row], states[2][0], atol=1e-5)
        np.testing.assert_allclose(found["layer1.mean"][row], states[1][0].mean(0), atol=1e-5)


def test_last_text_block_is_before_final_norm(tmp_path: Path) -> None:
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    config = T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=2, num_heads=2)
    model = T5EncoderModel(config).eval()
    untie_last_state(model, [2])
    with torch.no_grad():
        inputs = {"input_ids": torch.arange(6)[None]}
        states, outputs = state_features(model, inputs, [2, 3], lambda state: {"states": state})
        assert list(outputs) == ["states", "layer2.states"]
        state = outputs["layer2.states"]
        np.testing.assert_allclose(model.encoder.final_layer_norm(state), states.last_hidden_state, atol=1e-6)
    assert not torch.allclose(state, states.last_hidden_state)


def _check_native(
    spec: str, modality: Modality, requested: Sequence[str], settings: EncoderSettings | None = None, atol: float = 0
) -> tuple[Any, Any, dict[str, Any]]:
    """Check that requested features change neither fingerprint nor native values; return encoder, inputs, values."""
    settings = settings or EncoderSettings(backend="torch")
    plain = open_encoder(spec, modality=modality, settings=settings)
    more = EncoderSettings(backend=settings.backend, features=tuple(requested))
    encoder = open_encoder(spec, modality=modality, settings=more)
    own = list(plain.features)
    assert list(encoder.features)[: len(own)] == own
    assert set(encoder.features) <= {*own, *requested}
    assert encoder.fingerprint == plain.fingerprint
    prepared = plain.prepare(example_images() if modality == "image" else TEXTS)
    expected, found = plain.encode(prepared, own), encoder.encode(prepared, list(encoder.features))
    for name in own:
        for one, other in zip(expected[name], found[name], strict=True):
            np.testing.assert_allclose(other, one, rtol=0, atol=atol)
    if modality == "text":
        return encoder, prepared, found
    return encoder, prepared, {name: np.stack(values) for name, values in found.items()}


def _inner(encoder: Any) -> Any:
    return encoder.graph._module._module._model


def _states(model: Any, blocks: Any, prepared: Any, encoder: Any) -> list[torch.Tensor]:
    states: list[torch.Tensor] = []
    hooks = [block.register_forward_hook(_keep_in(states)) for block in blocks]
    encoder.encode(prepared, list(encoder.features)[:1])
    for hook in hooks:
        hook.remove()
    return states


def _keep_in(states: list[torch.Tensor]) -> Callable[..., None]:
    def hook(module: Any, given: Any, output: Any) -> None:
        states.append((output[0] if isinstance(output, tuple) else output).clone())

    return hook


def _only_list(model: Any) -> Any:
    return next(module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == 2)


def _grid(patches_BTD: torch.Tensor, side: int) -> torch.Tensor:
    size = round(patches_BTD.shape[1] ** 0.5)
    maps_BDHW = patches_BTD.transpose(1, 2).unflatten(2, (size, size))
    return torch.nn.functional.adaptive_avg_pool2d(maps_BDHW, side).flatten(2).transpose(1, 2)


def _draw(num_images: int, num_patches: int, seed: int) -> torch.Tensor:
    return torch.randn(num_images, num_patches, 5, generator=torch.Generator().manual_seed(seed))


def _clusters(patches_BTD: torch.Tensor, num_clusters: int) -> np.ndarray[Any, Any]:
    return np.stack([_lloyd(patches_TD.double().numpy(), num_clusters) for patches_TD in patches_BTD])


def _lloyd(patches_TD: Any, num_clusters: int) -> Any:
    """Reference: ten rounds in float64, one patch and one cluster at a time."""
    rounding = 1e-4 * ((patches_TD - patches_TD.mean(0)) ** 2).sum(1).mean()
    odd_numbers_K = np.arange(1, 2 * num_clusters, 2)
    centers_KD = patches_TD[odd_numbers_K * len(patches_TD) // (2 * num_clusters)]
    for _ in range(10):
        labels = []
        for patch_D in patches_TD:
            distances_K = ((centers_KD - patch_D) ** 2).sum(1)
            labels.append(int(np.flatnonzero(distances_K <= distances_K.min() + rounding)[0]))
        for cluster in range(num_clusters):
            if cluster in labels:
                centers_KD[cluster] = patches_TD[np.array(labels) == cluster].mean(0)
    return centers_KD
