"""Every format: the vectors of its own library are those of the run."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoImageProcessor, AutoModel, AutoProcessor, AutoTokenizer, ViTImageProcessor, pipeline

from embedcache.errors import SettingError
from embedcache.export.base import TEXTS, TOLERANCE, embed_examples, example_images
from embedcache.export.export import export_run
from embedcache.export.settings import ExportSettings
from embedcache.export.transformers import load_exported
from embedcache.modeling.image_processing_embedcache import EmbedcacheImageProcessor
from embedcache.modeling.images import rgb_image
from embedcache.runs import Run
from tests.export.runs import make_run_of

pytestmark = pytest.mark.slow

VECTORS = ("linear+identity", "mlp", "glu", "fusemix", "linear+sharelock:hidden=64", "asif")
OPEN_CLIP = ("openclip-linear", "openclip-mlp")
CASES = [
    *(("onnx", "vit/cls", "bert/mean", projector) for projector in (*VECTORS, *OPEN_CLIP)),
    *(("onnx", "vit/cls+patches", "bert/tokens", projector) for projector in ("token", "cls_token", "token_mlp")),
    ("transformers", "vit/layer1.patch_mean", "st/layer1.mean", "linear+glu"),
    ("transformers", "vit/cls+patches", "bert/cls+tokens", "cls_token+token_mlp"),
    ("transformers", "dino/grid:2", "bert/tokens", "token"),
    ("transformers", "vit/kmeans:3", "dense/dense", "token+mlp"),
    ("transformers", "hf_vit/cls", "truncated/dense", "fusemix+linear"),
    ("transformers", "vit/patch_mean", "st/mean", "asif"),
    ("transformers", "dino/cls", "bert/mean", "identity+sharelock:hidden=64,num_layers=3"),
    ("transformers", "mamba/patch_mean", "bert/cls", "openclip-linear+openclip-mlp-text"),
    ("transformers", "mamba/pooled", "bert/mean", "openclip-mlp-image+openclip-linear"),
]
"""Every feature and projector once; both sides export a projector alike."""


@pytest.mark.parametrize(("form", "image", "text", "projector"), CASES)
def test_vectors_are_those_of_the_run(
    form: str, image: str, text: str, projector: str, tiny: dict[str, str], tmp_path: Path
) -> None:
    run = make_run_of(tmp_path / "run", tiny, image, text, projector)
    report = export_run(form, run, tmp_path / "model")
    assert set(report.differences) == {"image", "text"}
    assert max(report.differences.values()) < TOLERANCE
    if form == "onnx":
        graph = onnx.load(tmp_path / "model" / "text_projector.onnx")
        assert graph.opset_import[0].version >= 17
        about = {entry.key: entry.value for entry in graph.metadata_props}
        assert json.loads(about["fingerprint"])["family"] == "hf"


class Unknown(torch.nn.Module):
    """A projector with an operator that ONNX lacks."""

    def __init__(self, input_width: int, output_width: int) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(input_width, output_width)

    def forward(self, vectors_BD: torch.Tensor) -> torch.Tensor:
        return torch.lgamma(self.linear(vectors_BD))


def test_unknown_operator_is_refused(tiny: dict[str, str], tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    run = make_run_of(tmp_path / "run", tiny, "vit/cls", "bert/mean", f"linear+{__name__}:Unknown")
    capfd.readouterr()
    words = r"this run: text projector: cannot export .*'aten::lgamma'.*; embedcache.load applies it"
    with pytest.raises(SettingError, match=words):
        export_run("onnx", run, tmp_path / "model")
    assert "graph" not in "".join(capfd.readouterr())
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("image", ["vit", "dino"])
def test_towers_match_the_run(image: str, tiny: dict[str, str], tmp_path: Path) -> None:
    run = make_run_of(tmp_path / "run", tiny, f"{image}/cls", "st/mean")
    report = export_run("onnx", run, tmp_path / "model", ExportSettings(towers=True))
    assert max(report.differences.values()) < TOLERANCE
    session = onnxruntime.InferenceSession(tmp_path / "model" / "text.onnx")
    ids = np.array([[2, 5, 7, 3, 0], [2, 5, 3, 0, 0]])
    vectors = session.run(None, {"input_ids": ids, "attention_mask": (ids > 0).astype(np.int64)})[0]
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


@pytest.mark.parametrize(
    ("image", "text", "projector"),
    [
        ("whole/patch_mean", "bert/cls", "openclip-linear+openclip-mlp-text"),
        ("whole/cls", "st/mean", "openclip-mlp-image+openclip-linear"),
    ],
)
def test_open_clip_runs_both_sides(image: str, text: str, projector: str, tiny: dict[str, str], tmp_path: Path) -> None:
    run = make_run_of(tmp_path / "run", tiny, image, text, projector)
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


@pytest.mark.parametrize(
    ("text", "projector", "kinds"),
    [
        ("st/mean", "linear", "TPNDN"),
        ("bert/cls", "linear+identity", "TPNDN"),
        ("dense/dense", "linear+sharelock:hidden=64", "TPDNDDDDN"),
        ("dense/cls", "linear", "TPNDN"),
        ("bert/mean", "openclip-mlp", "TPDDN"),
        ("bert/mean", "openclip-linear", "TPDN"),
    ],
)
def test_sentence_transformers_runs_the_texts(
    text: str, projector: str, kinds: str, tiny: dict[str, str], tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    run = make_run_of(tmp_path / "run", tiny, "vit/cls", text, projector)
    report = export_run("sentence-transformers", run, tmp_path / "model")
    assert report.differences["text"] < TOLERANCE
    model = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    assert "".join(type(module).__name__[0] for module in model) == kinds
    np.testing.assert_allclose(model.encode(list(TEXTS)), embed_examples(Run.open(run), "text"), atol=TOLERANCE)


def test_has_the_interface_of_clip(tiny: dict[str, str], tmp_path: Path) -> None:
    run = make_run_of(tmp_path / "run", tiny, "vit/cls", "st/mean")
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
    export_run("transformers", make_run_of(tmp_path / "run", tiny, "hf_vit/cls", "bert/mean"), folder)
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
