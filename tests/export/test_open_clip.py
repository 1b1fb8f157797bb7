"""Export for open_clip."""

import json
from pathlib import Path

import pytest
import torch

from embedcache.dataset.settings import SplitSettings
from embedcache.encoders.base import EncoderSettings
from embedcache.errors import ArtifactError, SettingError
from embedcache.export.base import TEXTS, TOLERANCE, embed_examples, example_images
from embedcache.export.export import export_run
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.modeling.images import rgb_image
from embedcache.runs import Run
from embedcache.sources import open_source
from embedcache.train.settings import ModelSettings, OptimizerSettings, TrainSettings
from embedcache.train.train import train
from tests.export.runs import make_run
from tests.images import write_images

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
    report = export_run("open-clip", run, folder)
    assert max(report.differences.values()) < TOLERANCE
    _check_loads(folder, run)
    assert "only RGB images give the vectors of the run" in (folder / "README.md").read_text()
    assert "pip install 'open_clip_torch>=3.3'" in (folder / "README.md").read_text()
    config = json.loads((folder / "open_clip_config.json").read_text())["model_cfg"]
    assert config["text_cfg"]["hf_model_name"] == str(folder)


def _check_loads(folder: Path, run: Path) -> None:
    import open_clip

    name = f"local-dir:{folder}"
    model, _, preprocess = open_clip.create_model_and_transforms(name)
    model.eval()
    images = [rgb_image(image) for image in example_images()]
    with torch.inference_mode():
        image = model.encode_image(torch.stack([preprocess(image) for image in images]), normalize=True)
        text = model.encode_text(open_clip.get_tokenizer(name)(list(TEXTS)), normalize=True)
    opened = Run.open(run)
    torch.testing.assert_close(image, torch.from_numpy(embed_examples(opened, "image")), atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(text, torch.from_numpy(embed_examples(opened, "text")), atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(model.logit_scale.exp(), opened.pair.scale)


@pytest.fixture(scope="module")
def cache(tiny: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preset")
    source = open_source(write_images(folder / "images", 12))
    settings = ExtractSettings(features=("patch_mean", "mean"), encoder=EncoderSettings(backend="torch"))
    extract(source, folder / "cache", image_encoder=[tiny["whole"]], text_encoder=[tiny["bert"]], settings=settings)
    return folder / "cache"


def test_trained_preset(cache: Path, tmp_path: Path) -> None:
    settings = TrainSettings(
        model=ModelSettings(projector="openclip-mlp", shared_width=16),
        optimizer=OptimizerSettings(epochs=1, batch_size=4),
        split=SplitSettings(kind="key"),
    )
    assert train(cache, tmp_path / "run", settings=settings) is not None
    assert Run.open(tmp_path / "run").pair.tower("image").length != 1, "the length of the features was learned"
    report = export_run("open-clip", tmp_path / "run", tmp_path / "model")
    assert max(report.differences.values()) < TOLERANCE
    _check_loads(tmp_path / "model", tmp_path / "run")


@pytest.mark.parametrize(
    ("image", "text", "projector", "words"),
    [
        (("whole", "patch_mean"), ("bert", "mean"), "linear", "its image projector is linear"),
        (("whole", "patch_mean"), ("bert", "mean"), "openclip-linear+openclip-mlp-image", "its text projector is open"),
        (("dino", "cls"), ("bert", "mean"), "openclip-linear", "its image encoder's family is hf: expected timm"),
        (("whole", "patch_mean"), ("dense", "dense"), "openclip-linear", "its text feature is dense"),
        (("mamba", "patch_mean"), ("bert", "mean"), "openclip-linear", "open_clip cannot run its encoders"),
        (("whole", "layer1.patch_mean"), ("bert", "mean"), "openclip-linear", "its image feature is layer1.patch_mean"),
    ],
)  # fmt: skip
def test_unsupported_run_raises(
    image: tuple[str, str], text: tuple[str, str], projector: str, words: str, tiny: dict[str, str], tmp_path: Path
) -> None:
    run = make_run(tmp_path / "run", (tiny[image[0]], image[1]), (tiny[text[0]], text[1]), projector)
    with pytest.raises(SettingError, match=words):
        export_run("open-clip", run, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_other_transform_than_open_clips_raises(tiny: dict[str, str], tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", (tiny["vit"], "cls"), (tiny["bert"], "mean"), "openclip-linear")  # crop_pct 0.95
    with pytest.raises(ArtifactError, match="nothing was written"):
        export_run("open-clip", run, tmp_path / "model")
    assert not (tmp_path / "model").exists()
