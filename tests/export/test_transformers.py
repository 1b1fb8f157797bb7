"""Export for transformers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer, ViTImageProcessor, pipeline

from embedcache.export.base import TEXTS, TOLERANCE, embed_examples, example_images
from embedcache.export.export import export_run
from embedcache.export.transformers import load_exported
from embedcache.modeling.image_processing_embedcache import EmbedcacheImageProcessor
from embedcache.modeling.images import rgb_image
from embedcache.runs import Run
from tests.export.runs import make_run

pytestmark = pytest.mark.slow

CASES = {
    "derived": ("vit", "layer1.patch_mean", "st", "layer1.mean", "linear+glu"),
    "tokens": ("vit", "cls+patches", "bert", "cls+tokens", "cls_token+token_mlp"),
    "grid": ("dino", "grid:2", "bert", "tokens", "token"),
    "kmeans": ("vit", "kmeans:3", "dense", "dense", "token+mlp"),
    "vit of transformers": ("hf_vit", "cls", "truncated", "dense", "fusemix+linear"),
    "asif": ("vit", "patch_mean", "st", "mean", "asif"),
    "identity": ("dino", "cls", "bert", "mean", "identity+sharelock:hidden=64,num_layers=3"),
    "openclip-linear": ("mamba", "patch_mean", "bert", "cls", "openclip-linear+openclip-mlp-text"),
    "openclip-mlp": ("mamba", "pooled", "bert", "mean", "openclip-mlp-image+openclip-linear"),
}
"""Every feature and projector once; both sides export a projector alike."""


@pytest.mark.parametrize("case", CASES)
def test_matches_the_run(case: str, tiny: dict[str, str], tmp_path: Path) -> None:
    image, feature, text, text_feature, projector = CASES[case]
    width = 32 if "identity" in projector else 16
    run = make_run(tmp_path / "run", (tiny[image], feature), (tiny[text], text_feature), projector, width=width)
    report = export_run("transformers", run, tmp_path / "model")
    assert set(report.differences) == {"image", "text"}
    assert max(report.differences.values()) < TOLERANCE


def test_has_the_interface_of_clip(tiny: dict[str, str], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", (tiny["vit"], "cls"), (tiny["st"], "mean"))
    folder = tmp_path / "model"
    export_run("transformers", run, folder)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    inputs = processor(images=example_images(), text=list(TEXTS), return_tensors="pt", padding=True, truncation=True)
    with torch.inference_mode():
        output = model(**inputs)
    opened = Run.open(run)
    image, text = (torch.from_numpy(embed_examples(opened, modality)) for modality in ("image", "text"))
    torch.testing.assert_close(output.image_embeds, image, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(output.text_embeds, text, atol=TOLERANCE, rtol=0)
    logits = opened.pair.scale.detach() * image @ text.T
    torch.testing.assert_close(output.logits_per_image, logits, atol=1e-3, rtol=0)
    torch.testing.assert_close(output.logits_per_text, logits.T, atol=1e-3, rtol=0)
    alone = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)(
        example_images()[:1], return_tensors="pt"
    )
    torch.testing.assert_close(alone["pixel_values"], inputs["pixel_values"][:1])
    ids = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)(TEXTS[0])["input_ids"]
    assert ids == inputs["input_ids"][0, : len(ids)].tolist()
    assert "pip install 'transformers>=4.57' torch" in (folder / "README.md").read_text()
    classify = pipeline("zero-shot-image-classification", model=str(folder), trust_remote_code=True)
    found = classify(example_images()[0], candidate_labels=list(TEXTS[:3]), hypothesis_template="{}")
    scores = {TEXTS.index(each["label"]): each["score"] for each in found}
    expected = logits[0, :3].softmax(dim=0)
    torch.testing.assert_close(torch.tensor([scores[row] for row in range(3)]), expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("mode", ["1", "RGBA", "I;16"])
def test_processor_of_transformers_gets_rgb_images(mode: str) -> None:
    """As the encoder did; without the conversion, the processor of a ViT accepts RGB images only."""
    noise = np.random.default_rng(0).integers(0, 256, (50, 70, 4), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode)
    plain = ViTImageProcessor(size={"height": 32, "width": 32})
    processor = EmbedcacheImageProcessor(kind="transformers", settings=plain.to_dict())
    for options in ({}, {"do_normalize": False}):
        prepared = processor(image, return_tensors="pt", **options)["pixel_values"]
        expected = plain(rgb_image(image), return_tensors="pt", **options)["pixel_values"]
        torch.testing.assert_close(prepared, expected, atol=0, rtol=0)


def test_exported_folder_can_be_saved_again_and_damaged(tiny: dict[str, str], tmp_path: Path) -> None:
    """Weights with other names, as in another version of transformers, are refused: not random weights."""
    folder = tmp_path / "model"
    export_run("transformers", make_run(tmp_path / "run", (tiny["hf_vit"], "cls"), (tiny["bert"], "mean")), folder)
    model = load_exported(folder)
    with torch.no_grad():
        model.logit_scale.add_(1)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert load_exported(tmp_path / "sharded").logit_scale == model.logit_scale

    weights = load_file(folder / "model.safetensors")
    renamed = {name.replace("attention", "attn"): value for name, value in weights.items()}
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(RuntimeError, match=r"has other names for \d+ weights of the encoders, .*pip install transform"):
        load_exported(folder)
