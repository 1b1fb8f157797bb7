"""Tiny encoders on disk."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Iterator

import pytest

from tests.encoders.checkpoints import save_bert, save_dinov2, save_sentence_transformer, save_timm, save_vit


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Use separate folders for exported graphs and for model code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache-home")))
        modules = str(tmp_path_factory.mktemp("modules"))
        patch.setenv("HF_MODULES_CACHE", modules)
        import transformers.dynamic_module_utils
        import transformers.utils.hub

        patch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", modules)
        patch.setattr(transformers.utils.hub, "HF_MODULES_CACHE", modules)
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Specs of tiny encoders by a short name; `whole` is the smallest whose transform does not crop."""
    folder = tmp_path_factory.mktemp("encoders")
    bert = save_bert(folder / "bert", seed=0)
    st = save_sentence_transformer(folder / "st", bert, pooling="mean", max_tokens=20)
    dense = save_sentence_transformer(folder / "dense", bert, pooling="cls", max_tokens=20, width=20)
    gc.freeze()  # an export collects garbage: of what is created from here on, not of all libraries
    return {
        "vit": f"timm:test_vit,weights={save_timm('test_vit', folder, seed=0)}",
        "whole": f"timm:xcit_nano_12_p16_224,image_size=64,weights={save_timm('xcit_nano_12_p16_224', folder, seed=0)}",
        "mamba": f"timm:test_mambaout,weights={save_timm('test_mambaout', folder, seed=0)}",
        "dino": f"hf:{save_dinov2(folder / 'dino', num_registers=2)}",
        "hf_vit": f"hf:{save_vit(folder / 'vit')}",
        "bert": f"hf:{bert}",
        "st": f"st:{st}",
        "dense": f"st:{dense}",
        "truncated": f"st:{dense},truncate_dim=7",
    }
