"""Made `clip-retrieval-2.45/`: what clip-retrieval 2.45.0 itself writes of twelve images, with a tiny model.

    python -m venv peer && peer/bin/pip install clip-retrieval==2.45.0 "setuptools<70"
    peer/bin/python tests/golden/make_clip_retrieval.py FOLDER

It runs clip-retrieval's `inference` on WebDataset tars, three partitions of four rows: its `files` input finds no
caption of an image in this version. The model is a random CLIP of `transformers`, from a seed, so its vectors mean
nothing. The arrays and tables of FOLDER/tree are copied as they were written.
"""

import io
import json
import sys
import tarfile
from pathlib import Path

import torch
from clip_retrieval.clip_inference.main import main as clip_inference
from PIL import Image
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

SIDE_PX = 32


def write_model(folder: Path) -> Path:
    """Write a CLIP of two small layers, and a processor; clip-retrieval's own tokenizer has 49,408 tokens."""
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**tower, "vocab_size": 49408, "max_position_embeddings": 77, "eos_token_id": 49407},
        vision_config={**tower, "image_size": SIDE_PX, "patch_size": 16},
        projection_dim=8,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}
    (folder / "vocab.json").write_text(json.dumps(words))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    size = {"shortest_edge": SIDE_PX}
    image_processor = CLIPImageProcessor(size=size, crop_size={"height": SIDE_PX, "width": SIDE_PX})
    CLIPProcessor(image_processor=image_processor, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def write_shards(folder: Path) -> str:
    """Write three tars of four images of one color, each with a caption and metadata."""
    folder.mkdir()
    shards = [folder / f"{number:05d}.tar" for number in range(3)]
    for number in range(12):
        color = (20 * number, 255 - 20 * number, 128)
        image = io.BytesIO()
        Image.new("RGB", (SIDE_PX, SIDE_PX), color).save(image, "JPEG")
        about = {"key": f"square-{number:02d}", "label": number % 3, "split": "test" if number > 8 else "train"}
        files = {"jpg": image.getvalue(), "txt": f"a square, number {number}".encode()}
        files["json"] = json.dumps(about).encode()
        with tarfile.open(shards[number // 4], "a") as tar:
            for suffix, data in files.items():
                member = tarfile.TarInfo(f"{number:09d}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return f"{folder}/{{00000..00002}}.tar"


if __name__ == "__main__":
    out = Path(sys.argv[1])
    out.mkdir(parents=True)
    clip_inference(
        input_dataset=write_shards(out / "squares"),
        output_folder=str(out / "tree"),
        input_format="webdataset",
        clip_model=f"hf_clip:{write_model(out / 'model')}",
        enable_metadata=True,
        wds_number_file_per_input_file=4,
        write_batch_size=4,
        batch_size=4,
        num_prepro_workers=1,
    )
