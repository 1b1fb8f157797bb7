"""Encoder specs, and errors of `open_encoder`."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embedcache.encoders.base import EncoderSettings, Modality, background_of
from embedcache.encoders.open import EncoderSpec, open_encoder
from embedcache.encoders.weights import hash_weights
from embedcache.errors import ArtifactError, CorruptError, EmbedcacheError, PathError, SettingError, UnknownNameError


@pytest.mark.parametrize(
    ("text", "family", "model", "options"),
    [
        ("lite:efficientnet-lite0", "lite", "efficientnet-lite0", {}),
        ("timm:vit.a1,weights=/x/y.safetensors", "timm", "vit.a1", {"weights": "/x/y.safetensors"}),
        ("hf:o/m,revision=abc,max_tokens=9", "hf", "o/m", {"revision": "abc", "max_tokens": "9"}),
        ("timm:hf-hub:o/m", "timm", "hf-hub:o/m", {}),
        ("mine.module:open_it", "mine.module:open_it", "", {}),
        ("mine:open_it:big,size=3", "mine:open_it", "big", {"size": "3"}),
    ],
)
def test_spec_round_trip(text: str, family: str, model: str, options: dict[str, str]) -> None:
    spec = EncoderSpec.parse(text)
    assert spec == EncoderSpec(family, model, options)
    assert EncoderSpec.parse(spec.text) == spec


@pytest.mark.parametrize(
    ("text", "folder"),
    [
        ("st:/models/all-MiniLM", "all-MiniLM"),
        ("st:/models/all-MiniLM/", "all-MiniLM"),
        ("hf:./.hidden", "hidden"),
        ("hf:facebook/dinov2-base", "facebook--dinov2-base"),
        ("timm:hf-hub:o/m", "hf-hub-o--m"),
        ("timm:vit_small_patch14_dinov2.lvd142m,weights=/x", "vit_small_patch14_dinov2.lvd142m"),
        ("hf:/", "model"),
        ("mine:open_it", "open_it"),
    ],
)
def test_spec_folder(text: str, folder: str) -> None:
    assert EncoderSpec.parse(text).folder == folder


@pytest.mark.parametrize(
    ("text", "modality", "error", "word"),
    [
        ("all-MiniLM-L6-v2", "text", SettingError, "st:all-MiniLM-L6-v2"),
        ("timm:", "image", SettingError, "family:model"),
        ("tim:vit", "image", UnknownNameError, "timm"),
        ("json:nonsense", "image", UnknownNameError, "nonsense"),
        ("imported:clip-vit", "image", SettingError, "imported"),
        ("json:__name__", "image", SettingError, "class"),
        ("lite:efficientnet-lite7", "image", UnknownNameError, "efficientnet-lite0"),
        ("lite:efficientnet-lite0", "text", SettingError, "images"),
        ("lite:efficientnet-lite4", "image", EmbedcacheError, "pip install"),
        ("timm:vit_tiny_patch16_225", "image", UnknownNameError, "vit_tiny_patch16_224"),
        ("timm:test_vit.nope", "image", UnknownNameError, "test_vit.r160_in1k"),
        ("timm:test_vit", "image", PathError, "weights=PATH"),
        ("timm:test_vit,weights=/no/such.pth", "image", PathError, "exist"),
        ("timm:test_vit,weights=a,weights=b", "image", SettingError, "twice"),
        ("hf:/no/such/folder", "image", PathError, "exist"),
        ("hf:~no-one/x", "image", PathError, "exist"),
        ("hf:nobody/nothing", "text", PathError, "local folder"),
        ("st:nothing", "text", PathError, "local folder"),
        ("st:x,max_tokens", "text", SettingError, "name=value"),
        ('st:x,prompt="a, b', "text", SettingError, "quotes"),
        ('st:x,prompt="a" b', "text", SettingError, "quotes"),
        ("open_clip:ViT-B-33,pretrained=openai", "image", UnknownNameError, "ViT-B-32"),
        ("open_clip:ViT-B-32", "image", SettingError, "laion2b_s34b_b79k"),
        ("open_clip:ViT-B-32,pretrained=opnai", "text", UnknownNameError, "openai"),
    ],
)
def test_invalid_spec_raises(text: str, modality: Modality, error: type[EmbedcacheError], word: str) -> None:
    with pytest.raises(error, match=word):
        open_encoder(text, modality=modality)


@pytest.mark.parametrize(
    ("written", "value", "text"),
    [
        ("query: ", "query: ", '"query: "'),
        ('"query: "', "query: ", '"query: "'),
        ('"Given a, retrieve b\\nQuery: "', "Given a, retrieve b\nQuery: ", '"Given a, retrieve b\\nQuery: "'),
        ('"say \\"hi\\", now"', 'say "hi", now', '"say \\"hi\\", now"'),
        ("tests", "tests", "tests"),  # a folder here, and yet no path
    ],
)
def test_prompts_are_kept(written: str, value: str, text: str) -> None:
    spec = EncoderSpec.parse(f" st:a/b,max_tokens= 5 ,prompt={written}")
    assert spec.options == {"max_tokens": "5", "prompt": value}
    assert spec.text == f"st:a/b,max_tokens=5,prompt={text}"
    assert EncoderSpec.parse(spec.text) == spec.absolute == spec


@pytest.mark.slow
@given(st.text(min_size=1))
def test_any_prompt_reads_back(prompt: str) -> None:
    spec = EncoderSpec("st", "a/b", {"prompt": prompt, "revision": "x"})
    assert EncoderSpec.parse(spec.text) == spec


def test_weights_of_another_model_raise(test_vit: Path) -> None:
    with pytest.raises(ArtifactError, match=r"do not fit test_resnet"):
        open_encoder(f"timm:test_resnet,weights={test_vit}", modality="image")
    with pytest.raises(ArtifactError, match="belong to another model"):
        open_encoder(f"lite:efficientnet-lite0,weights={test_vit}", modality="image")


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_invalid_weights_file_raises(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"broken.{suffix}"
    path.write_bytes(b"no weights at all")
    with pytest.raises(CorruptError, match=f"broken.{suffix}"):
        open_encoder(f"timm:test_vit,weights={path}", modality="image")


@pytest.mark.slow
def test_onnxruntime_in_bfloat16_raises() -> None:
    settings = EncoderSettings(backend="onnxruntime", precision="bfloat16")
    with pytest.raises(SettingError, match="float32"):
        open_encoder("lite:efficientnet-lite0", modality="image", settings=settings)


def test_background_is_one_color_however_it_is_written() -> None:
    for text, color in (("white", "white"), ("#FFF", "white"), ("black", "#000000"), ("#7f7f7f", "#7f7f7f")):
        settings = EncoderSettings(background=text)
        assert background_of({"background": settings.background}) == settings.background == color
    assert background_of(None) == background_of({}) == "white"


@pytest.mark.slow
def test_import_is_light() -> None:
    code = "import sys, embedcache.encoders.open; print({'torch', 'timm', 'transformers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_weights_hash() -> None:
    weights = torch.arange(6, dtype=torch.float32)
    states = [
        {"a": weights},
        {"b": weights},
        {"a": weights.reshape(2, 3)},
        {"a": weights.reshape(3, 2)},
        {"a": weights.to(torch.bfloat16)},
        {"a": weights.view(torch.int32)},
        {"a": torch.from_numpy(np.arange(1, 7, dtype=np.float32))},
        {"a": weights[0]},
    ]
    assert len({hash_weights(state) for state in states}) == len(states)
    assert hash_weights({"a": weights, "b": weights}) == hash_weights({"b": weights, "a": weights.clone()})
