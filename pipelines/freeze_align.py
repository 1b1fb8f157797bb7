"""The recipe of "From Unimodal to Multimodal" (CVPR 2025): DINOv2 ViT-L and All-RoBERTa-large-v1, aligned on 20 M.

    python -m pipelines.freeze_align work/ --captions laion.parquet --concepts prompts:names.txt   # work/chosen.parquet
    img2dataset …                                                # the images of its keys; and CC3M, CC12M and SBU
    python -m pipelines.freeze_align work/ --pairs "laion/{00000..00559}.tar::cc/{00000..01250}.tar" --device cuda
    python -m pipelines.zero_shot_suite sets/ work/sets/ work/run/
    python -m pipelines.freeze_align work/ --tiny                # all of it on OpenMoji, in a minute or two

docs/howto/paper.md has each step's size, how this differs from the paper, and what the paper reports: ImageNet 76.3 %,
Flickr30k R@1 87.5 / 74.1, COCO R@1 60.1 / 45.1. We have not run it on the full data.
"""

import argparse
from pathlib import Path
from typing import Any

import embedcache
from embedcache.cli.console import open_progress, print_line, print_table
from embedcache.reports.retrieval import retrieval_table
from embedcache.train.settings import train_settings

FULL: dict[str, Any] = {"image": "hf:facebook/dinov2-large", "text": "st:sentence-transformers/all-roberta-large-v1"}
FULL |= {"features": ("cls", "kmeans:4", "mean"), "side": "dinov2-large/cls+dinov2-large/kmeans:4", "each": 2000}
TRAINING: dict[str, Any] = {"projector": "cls_token+token_mlp", "initialization": "random", "loss": "info_nce"}
TRAINING |= {"epochs": 15, "batch_size": 14_400, "lr": 1e-3, "weight_decay": 0.02, "warmup_fraction": 0.056}
TRAINING |= {"shared_width": 1024, "dropout": 0.1, "split": "key", "val_fraction": 5e-4, "test_fraction": 5e-4}
TINY: dict[str, Any] = {"image": "lite:efficientnet-lite0", "text": "st:all-MiniLM-L6-v2", "each": 3}
TINY |= {"features": ("patch_mean", "kmeans:4", "mean")}
TINY |= {"side": "efficientnet-lite0/patch_mean+efficientnet-lite0/kmeans:4"}
TINY_TRAINING = TRAINING | {
    "epochs": 8,
    "batch_size": 512,
    "split": "strict",
    "val_fraction": 0.1,
    "test_fraction": 0.25,
}


def main() -> None:
    """Choose captions that cover the concepts, and align what is paired: either, or both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--captions", help="a table of a crawl's captions, to choose from")
    parser.add_argument("--concepts", default="prompts:imagenet1k+voc2007", help="names to cover")
    parser.add_argument("--pairs", help="images with captions: those that were chosen, and others")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--tiny", action="store_true", help="all of it on OpenMoji, with small encoders")
    given = parser.parse_args()
    recipe, training = (TINY, TINY_TRAINING) if given.tiny else (FULL, TRAINING)
    training = training | {"device": given.device}
    if given.tiny:
        given.captions = given.pairs = "openmoji:en"
        training["selection"] = str(given.workdir / "chosen.parquet")
    if given.captions:
        choose(given.workdir, given.captions, given.concepts, recipe, given.device)
    if given.pairs:
        align(given.workdir, given.pairs, recipe, training)


def choose(workdir: Path, captions: str, concepts: str, recipe: dict[str, Any], device: str) -> None:
    """Select captions, as many for each concept, rare concepts first; no image is looked at."""
    stored, paths = embedcache.ExtractSettings(devices=(device,)), (workdir / "captions", workdir / "concepts")
    for path, source in zip(paths, map(embedcache.open_source, (captions, concepts)), strict=True):
        embedcache.extract_features(
            source, path, text_encoders=[recipe["text"]], settings=stored, progress=open_progress()
        )
    settings, out = embedcache.SelectSettings(per_concept=recipe["each"]), workdir / "chosen.parquet"
    by_concept: dict[str, Any] = {"concepts_path": paths[1], "joins_names": True}  # two names of ImageNet stand twice
    print_line(embedcache.select_samples(paths[0], out, "rare-first", settings=settings, **by_concept).line())


def align(workdir: Path, pairs: str, recipe: dict[str, Any], training: dict[str, Any]) -> None:
    """Encode once, train the paper's projectors and the control on shuffled pairs, rank what was held out."""
    stored = embedcache.ExtractSettings(features=recipe["features"], devices=(training["device"],))
    source, cache, progress = embedcache.open_source(pairs), workdir / "pairs", open_progress()
    image, text = [recipe["image"]], [recipe["text"]]
    embedcache.extract_features(
        source, cache, image_encoders=image, text_encoders=text, settings=stored, progress=progress
    )
    reports = {}
    for name, shuffles in (("run", False), ("shuffled", True)):
        settings, run = train_settings({**training, "shuffle_pairs": shuffles}), workdir / name
        report = embedcache.train_projectors(cache, run, image=recipe["side"], settings=settings, progress=progress)
        print_line(report.line(run))
        reports[name] = embedcache.evaluate_retrieval(cache, run, is_control=shuffles)
    print_table(*retrieval_table(reports))


if __name__ == "__main__":
    main()
