"""The recipe of "From Unimodal to Multimodal" (CVPR 2025): DINOv2 ViT-L and All-RoBERTa-large-v1, on 20 M pairs.

    python -m pipelines.freeze_align work/ --captions laion.parquet --concepts prompts:names.txt   # work/chosen.parquet
    img2dataset …                                       # download the images of its keys, and of CC3M, CC12M and SBU
    python -m pipelines.freeze_align work/ --pairs "laion/{00000..00559}.tar::cc/{00000..01250}.tar" --device cuda
    python -m pipelines.freeze_align work/ --tiny       # everything on 1,000 emoji, in a minute

docs/howto/paper.md has the size of each step, how to evaluate on the paper's datasets, the differences from the paper,
and the paper's results. We have not run it on the full data.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import embedcache
from embedcache.cli.console import open_progress, print_line, print_table, run_program
from embedcache.reports.retrieval import retrieval_table
from embedcache.train.settings import TrainSettings, train_settings
from pipelines.common import IMAGE_ENCODER, TEXT_ENCODER, extract_source, with_options


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Encoders, features, number of captions per concept, training settings, and number of samples if not all."""

    image_encoder: str
    text_encoder: str
    features: tuple[str, ...]
    image_feature: str
    per_concept: int
    training: TrainSettings
    limit: int | None = None


# fmt: off
PAPER = train_settings({
    "projector": "cls_token+token_mlp", "shared_width": 1024, "dropout": 0.1, "initialization": "random",
    "loss": "info_nce", "epochs": 15, "batch_size": 14_400, "lr": 1e-3, "weight_decay": 0.02, "warmup_fraction": 0.056,
    "split": "key", "val_fraction": 5e-4, "test_fraction": 5e-4,
})
FULL = Recipe(
    image_encoder="hf:facebook/dinov2-large", text_encoder="st:sentence-transformers/all-roberta-large-v1",
    features=("cls", "kmeans:4", "mean"), image_feature="dinov2-large/cls+dinov2-large/kmeans:4",
    per_concept=2000, training=PAPER,
)
TINY = Recipe(
    image_encoder=f"{IMAGE_ENCODER},fit=112x112", text_encoder=TEXT_ENCODER,
    features=("patch_mean", "kmeans:4", "mean"),
    image_feature="efficientnet-lite0/patch_mean+efficientnet-lite0/kmeans:4", per_concept=3,
    training=with_options(PAPER, shared_width=512, epochs=8, batch_size=256, split="strict", val_fraction=0.1,
                          test_fraction=0.25),
    limit=1000,
)
# fmt: on


def main() -> None:
    """Select captions that cover the concepts, or align image-caption pairs, or both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--captions", help="table of captions of a web crawl, to select from")
    parser.add_argument("--concepts", default="prompts:imagenet1k+voc2007", help="class names to cover")
    parser.add_argument("--pairs", help="images with captions: the selected ones, and others")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--tiny", action="store_true", help="run everything on 1,000 emoji, with small encoders")
    options = parser.parse_args()

    recipe = TINY if options.tiny else FULL
    workdir = options.workdir
    captions = "openmoji:en" if options.tiny else options.captions
    pairs = "openmoji:en" if options.tiny else options.pairs

    if captions:
        select_captions(workdir, captions, options.concepts, recipe, options.device)
    if pairs:
        # The full pairs are already the selected ones.
        selection = str(workdir / "chosen.parquet") if options.tiny else None
        align(workdir, pairs, recipe, with_options(recipe.training, device=options.device, selection=selection))


def select_captions(workdir: Path, captions: str, concepts: str, recipe: Recipe, device: str) -> None:
    """Select the same number of captions per concept, rare concepts first, without looking at images."""
    for name, location, limit in (("captions", captions, recipe.limit), ("concepts", concepts, None)):
        settings = embedcache.ExtractSettings(devices=(device,), limit=limit)
        extract_source(location, workdir / name, images=[], texts=[recipe.text_encoder], settings=settings)

    report = embedcache.select_samples(
        workdir / "captions",
        workdir / "chosen.parquet",
        f"rare-first:per_concept={recipe.per_concept}",
        embedcache.SelectSettings(
            concepts=workdir / "concepts",
            join_names=True,  # two class names of ImageNet occur twice
        ),
    )
    print_line(report.line())


def align(workdir: Path, pairs: str, recipe: Recipe, training: TrainSettings) -> None:
    """Extract features, train the paper's projectors and the shuffled control, and evaluate both on the test part."""
    cache = workdir / "pairs"
    images = [recipe.image_encoder]
    texts = [recipe.text_encoder]
    settings = embedcache.ExtractSettings(
        features=recipe.features, devices=(training.machine.device,), limit=recipe.limit
    )
    extract_source(pairs, cache, images=images, texts=texts, settings=settings)

    # The control of shuffled pairs shows the recall of the same training without the pairing.
    reports = {}
    for name, is_control in (("run", False), ("shuffled", True)):
        run = workdir / name
        options = with_options(training, shuffle_pairs=is_control)
        report = embedcache.train_projectors(
            cache, run, feature={"image": recipe.image_feature}, settings=options, progress=open_progress()
        )
        print_line(report.line(run))
        reports[name] = embedcache.evaluate_retrieval(cache, run, is_control=is_control)

    print_table(*retrieval_table(reports))


if __name__ == "__main__":
    run_program(main)
