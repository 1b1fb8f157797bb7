"""The paper's pooled recipe on a folder of your own captioned images.

    python -m pipelines.captioned_folder photos/ work/ --device cuda

In the ablation of "From Unimodal to Multimodal: Scaling up Projectors to Align Modalities" (CVPR 2025), the class token
and the mean caption token reach all but 0.6 points of ImageNet accuracy, at a hundredth of the storage of all tokens.
The default encoders are downloaded from a model hub; name local ones to work offline.
"""

import argparse
from pathlib import Path

from embedcache.cli.console import open_progress, print_line, print_table
from embedcache.cli.failures import run_program
from embedcache.evaluate.retrieval import evaluate_retrieval
from embedcache.extract.settings import ExtractSettings
from embedcache.reports.retrieval import retrieval_table
from embedcache.search.index import build_index
from embedcache.search.settings import IndexSettings
from embedcache.train.data import open_data
from embedcache.train.settings import train_settings
from pipelines.common import extract_source, train_seeds, with_options

IMAGE_ENCODER = "timm:vit_large_patch14_dinov2.lvd142m"  # 1,024 wide
TEXT_ENCODER = "st:sentence-transformers/all-roberta-large-v1"  # 1,024 wide
PAPER = train_settings(  # its dinov2-arl configuration; the batch size is its global one, here with all negatives
    {"shared_width": 1024, "epochs": 15, "batch_size": 16_384, "lr": 1e-3}
)
SEEDS = (0, 1, 2)


def main() -> None:
    """Extract, train three seeds and the shuffled control, evaluate and index."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", help="images with captions: a folder, a table or tars")
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--image-encoder", default=IMAGE_ENCODER)
    parser.add_argument("--text-encoder", default=TEXT_ENCODER)
    parser.add_argument("--split", default="strict")
    parser.add_argument("--epochs", type=int, default=PAPER.optimizer.epochs)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    workdir, cache_path = options.workdir, options.workdir / "cache"
    extract_source(
        options.source,
        cache_path,
        images=[options.image_encoder],
        texts=[options.text_encoder],
        settings=ExtractSettings(devices=(options.device,)),
    )
    recipe = with_options(PAPER, split=options.split, epochs=options.epochs, device=options.device)
    data = open_data(cache_path, {"image": None, "text": None}, memory_bytes=recipe.machine.memory)
    runs = {
        "run": train_seeds(data, workdir / "run", recipe, SEEDS)[0],
        "shuffled": train_seeds(data, workdir / "shuffled", with_options(recipe, shuffle_pairs=True), SEEDS)[0],
    }
    reports = {name: evaluate_retrieval(cache_path, run_paths) for name, run_paths in runs.items()}
    print_table(*retrieval_table(reports), title=reports["run"].line())
    index_path = workdir / "index"
    card = build_index(cache_path, index_path, IndexSettings(run=runs["run"][0]), progress=open_progress())
    print_line(f"{index_path}: {card.num_vectors:,} images; search it with: embedcache search {index_path} TEXT")


if __name__ == "__main__":
    run_program(main)
