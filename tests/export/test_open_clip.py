"""Export for open_clip."""

import json
from pathlib import Path

import open_clip
import pytest
import torch

from embedcache.export.base import TEXTS, TOLERANCE, embed_examples, example_images
from embedcache.export.export import export_run
from embedcache.modeling.images import rgb_image
from embedcache.runs import Run
from tests.export.runs import make_run

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("image", "text", "feature", "projector"),
    [
        ("patch_mean", "bert", "cls", "openclip-linear+openclip-mlp-text"),
        ("cls", "st", "mean", "openclip-mlp-image+openclip-linear"),
    ],
)
def test_matches_the_run(
    image: str, text: str, feature: str, projector: str, tiny: dict[str, str], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", (tiny["whole"], image), (tiny[text], feature), projector)
    folder = tmp_path / "model"
    assert max(export_run("open-clip", run, folder).differences.values()) < TOLERANCE

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    with torch.inference_mode():
        images = torch.stack([preprocess(rgb_image(image)) for image in example_images()])
        image_vectors = model.encode_image(images, normalize=True)
        tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(list(TEXTS))
        text_vectors = model.encode_text(tokens, normalize=True)
    opened = Run.open(run)
    torch.testing.assert_close(image_vectors, torch.from_numpy(embed_examples(opened, "image")), atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(text_vectors, torch.from_numpy(embed_examples(opened, "text")), atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(model.logit_scale.exp(), opened.pair.scale)
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    assert config["text_cfg"]["hf_model_name"] == str(folder)
