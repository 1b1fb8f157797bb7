"""Samples and commands shared by `make_artifacts.py`, which wrote the golden artifacts, and the test that opens them.

This is the only file of the two that names CLI options. An option that is renamed is renamed here; what the commands
compute, and the files they write, must stay the same. All paths are relative to the folder that holds the artifacts,
so that no artifact contains an absolute path.
"""

import contextlib
import io
import json
import shlex
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image
from safetensors.numpy import load_file
from typer.main import get_command

from embedcache import load
from embedcache.cli.main import app

FOLDER = Path(__file__).parent
ARTIFACTS = FOLDER / "artifacts"
PLACE = "@FOLDER@"
"""Stands in `study/` for the absolute path of the folder that holds the artifacts, which the runs of a study name."""
TOY = "tests.toy:open_toy"
WORDS = ("apple", "boat", "cat", "drum", "egg", "fish", "goat", "hat", "ink", "jar", "kite", "lamp")
QUERIES = ("apple boat", "a cat and a drum", "kite")
FEATURES = "--feature cls,patches,mean,tokens --chunk-size 32"
NUM_SAMPLES = 96
FIRST_NEAR_DUPLICATE, FIRST_COPY = 80, 88

_TRAIN = "--image-feature open_toy/cls --text-feature open_toy/mean --shared-width 16 --batch-size 16 --threads 1"
_TOKENS = "--image-feature open_toy/patches --text-feature open_toy/tokens"
_STRICT = "--split strict --image-cosine 0.995 --text-cosine 0.9"
TRAIN_RUN = f"{_TRAIN} {_STRICT} --projector mlp --initialization random --lr 3e-3 --epochs 10 --seed 3"
TRAIN_STOPPED = (
    f"{_TRAIN} --projector linear --loss siglip --initialization random --epochs 3 --split key --checkpoint-s 0"
)
RECIPES = {
    "mlp": f"{_TRAIN} --projector mlp --loss info_nce --epochs 4 {_STRICT}",
    "token": f"{_TOKENS} --shared-width 16 --batch-size 16 --threads 1 --projector token --loss siglip --epochs 3 "
    "--split key --seed 1",
    "fusemix": f"{_TRAIN} --projector fusemix --loss multi_positive --mixup 0.5 --structure 0.1 --epochs 3 --split key",
    "glu": f"{_TRAIN} --projector linear+glu --loss sail --captions all --initialization random --epochs 3 --split key "
    "--split-seed 5 --selection selection.parquet",
    "linear": f"{_TRAIN} --projector linear --initialization procrustes --dropout 0.3 --weight-decay 0.1 --language en "
    "--epochs 3 --patience 2 --split key --shuffle-pairs --block-rows 4",
}
PROJECTORS = {
    "asif": "--epochs 0",
    "fusemix": "--epochs 1",
    "glu": "--epochs 1",
    "identity+linear": "--epochs 1 --shared-width 48",
    "linear": "--epochs 1",
    "mlp": "--epochs 1",
    "openclip-linear": "--epochs 1",
    "openclip-mlp": "--epochs 1",
    "linear+sharelock": "--epochs 0 --initialization random",
    "cls_token": f"--epochs 1 {_TOKENS}",
    "token": f"--epochs 1 {_TOKENS}",
    "token_mlp": f"--epochs 1 {_TOKENS}",
}
SELECTIONS = {
    "rare-first": "--concepts concepts --run run --per-concept 4",
    "clip-score": "--run run --budget 25%",
    "random": "--feature open_toy/cls --budget 20 --seed 5",
    "k-centre": "--budget 12 --modality image --feature open_toy/cls",
    "metaclip": "--concepts concepts --feature open_toy/mean --modality text --threshold 0.4 --head 6",
}
SWEEP = (
    "--image-feature open_toy/cls --text-feature open_toy/mean --sampler random --seeds-per-config 2 --top-configs 1"
)
INDEXES = {
    "index": "--run run --factory HNSW8 --min-recall 0.5",
    "disk-index": "--feature open_toy/cls --factory IVF2,SQfp16 --on-disk --min-recall 0.5",
    "disk-index-4": "--feature open_toy/cls --factory IVF2,SQfp16 --on-disk --min-recall 0.5",
}
SPACE = """[fixed]
projector = "linear"
initialization = "random"
split = "key"
epochs = 2
batch_size = 16
threads = 1

[space]
lr = {low = 1e-3, high = 1e-1, log = true}
shared_width = {low = 8, high = 24, step = 8}
"""
REAL_ENCODERS = (("lite:efficientnet-lite0", "st:all-MiniLM-L6-v2"), (None, "wordllama:l2_supercat_256"))


build = cache(get_command)
"""Builds all commands, once."""


def embedcache(*words: object) -> str:
    """Run an `embedcache` command in this process and return what it prints.

    Args:
        words: arguments; one that holds spaces and begins with `--` stands for several.
    """
    arguments = [part for word in map(str, words) for part in (shlex.split(word) if word[:2] == "--" else [word])]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = build(app)(arguments, standalone_mode=False)
    assert not code, printed.getvalue()
    return printed.getvalue()


def extract(source: str, cache: Path | str, *, image: str | None = TOY, text: str = TOY, options: str = "") -> None:
    """Extract features of a source into a cache."""
    encoders = [f"--image-encoder {image}"] if image else []
    embedcache("extract", source, cache, *encoders, f"--text-encoder {text}", *([options] if options else []))


def extract_toy(folder: Path) -> None:
    """Extract the caches `cache`, `other` and `concepts` below a folder from sources written there."""
    write_samples(folder / "source", range(NUM_SAMPLES))
    write_samples(folder / "other-source", [*range(8), *range(NUM_SAMPLES, NUM_SAMPLES + 8)])
    (folder / "concepts.txt").write_text("\n".join(WORDS) + "\n")
    (folder / "templates.txt").write_text("{c}\na {c}\n")
    extract("source", "cache", options=FEATURES)
    extract("other-source", "other", options="--chunk-size 32")
    extract("prompts:concepts.txt+templates.txt", "concepts", image=None, options="--chunk-size 32")


def train(run: Path | str, options: str) -> str:
    """Train a run on `cache` and return the line that is printed."""
    return embedcache("train", "cache", run, options)


def train_projector(run: Path, name: str) -> None:
    """Train one kind of projector for an epoch at most."""
    options = PROJECTORS[name]
    sides = "" if "--image-feature" in options else " --image-feature open_toy/cls --text-feature open_toy/mean"
    width = "" if "--shared-width" in options else " --shared-width 8"
    train(run, f"{options}{sides}{width} --projector {name} --split key --batch-size 16 --threads 1")


def select(out: Path | str, method: str) -> None:
    """Select samples of `cache` by a method of `SELECTIONS`; the golden file still spells one of them `k-centre`."""
    name = method.replace("centre", "center")
    embedcache("curate", "select", "cache", out, f"--method {name} --overwrite", SELECTIONS[method])


def build_index(index: str) -> str:
    """Build an index of `INDEXES` and return the line that is printed."""
    return embedcache("curate", "index", "cache", index, INDEXES[index])


def search(index: str, *options: str) -> list[dict[str, Any]]:
    """Search an index and return one object per query; hits of equal scores are sorted by row."""
    found: list[dict[str, Any]] = json.loads(embedcache("search", index, *options, "--json"))
    for query in found:
        for hit in query["hits"]:
            for name in ("languages", "path"):  # the first versions did not print them
                hit.pop(name)
        query["hits"].sort(key=lambda hit: (-round(hit["score"], 4), hit["row"]))
    return found


def sweep(study: str, num_trials: int) -> dict[str, Any]:
    """Run a sweep up to a number of trials and return its report."""
    embedcache("sweep", "cache", "space.toml", study, f"--trials {num_trials} {SWEEP}")
    report: dict[str, Any] = read_json(Path(study) / "report.json")
    return report


def deduplicate(kept: Path | str, report: Path | str) -> None:
    """Write a selection of `cache` without near-duplicates."""
    embedcache("curate", "dedup", "cache", kept, f"--cosine 0.995 --output {report} --feature open_toy/cls --overwrite")


def find_leaks(clean: Path | str, report: Path | str) -> None:
    """Write a selection of `cache` without the samples that are in `other`."""
    features = "--image-feature open_toy/cls --text-feature open_toy/mean --image-cosine 0.995 --text-cosine 0.9"
    embedcache("curate", "leaks", "cache", "other", clean, f"--output {report} {features} --overwrite")


def measure(out: Path) -> Iterator[tuple[str, Any]]:
    """Compute the results of every golden artifact; yield a name and JSON values.

    Args:
        out: an existing folder for the files that commands write, relative to the working directory.
    """
    path = out / "figures.json"
    for part in ("test", "all"):
        embedcache("evaluate", "retrieval", "cache", "run", f"--part {part} --output {path} --overwrite")
        yield f"retrieval {part}", read_json(path)
    options = f"--prompts concepts --part all --output {path} --overwrite"
    embedcache("evaluate", "zero-shot", "cache", "run", options)
    yield "zero-shot", read_json(path)
    options = f"--run run --selection selection.parquet --min-count 6 -k 3 --output {path} --overwrite"
    embedcache("curate", "coverage", "cache", "concepts", options)
    yield "coverage", read_json(path)
    yield "search by text", search("index", *QUERIES, "-k", "5")
    yield "search by key", search("index", "--query-key 00002", "-k", "5")
    yield "search in a selection", search("index", *QUERIES, "-k", "5", "--selection selection.parquet")
    yield "search by label", search("index", "kite", "-k", "5", "--label-value apple")
    yield "search on the disk", search("disk-index", "--query-key 00002", "-k", "5")
    deduplicate(out / "kept.parquet", path)
    yield "duplicates", read_json(path)
    find_leaks(out / "clean.parquet", path)
    yield "leaks", read_json(path)
    for method in SELECTIONS:
        select(out / f"{method}.parquet", method)
        yield f"selection by {method}", rows_of(out / f"{method}.parquet")


def write_samples(folder: Path, numbers: Iterable[int]) -> None:
    """Write images with captions beside them: each image is the mean of the colors of three words, and some noise.

    Image 5 is an empty file, the caption of 11 is empty, every fourth sample has two captions and every eighth is
    German. From `FIRST_NEAR_DUPLICATE` on each sample is nearly one of the first eight, from `FIRST_COPY` on the same.
    """
    folder.mkdir()
    colors_W443 = np.random.default_rng(7).uniform(0, 255, (len(WORDS), 4, 4, 3))
    for number in numbers:
        original = number % 8 if FIRST_NEAR_DUPLICATE <= number < NUM_SAMPLES else number
        rng = np.random.default_rng(original)
        words = rng.choice(len(WORDS), 3, replace=False)
        noise_443 = rng.normal(0, 12, (4, 4, 3))
        if FIRST_NEAR_DUPLICATE <= number < FIRST_COPY:
            noise_443 += np.random.default_rng(number).normal(0, 4, (4, 4, 3))
        colors_443 = np.clip(colors_W443[words].mean(axis=0) + noise_443, 0, 255).astype(np.uint8)
        name = f"{number:05d}"
        Image.fromarray(np.repeat(np.repeat(colors_443, 2, axis=0), 2, axis=1)).save(folder / f"{name}.bmp")
        caption = " ".join(WORDS[word] for word in words)
        captions = ["" if original == 11 else caption, *([f"a {caption}"] if original % 4 == 0 else [])]
        about = {"caption": captions, "language": "de" if original % 8 == 7 else "en", "label": WORDS[words[0]]}
        (folder / f"{name}.json").write_text(json.dumps(about))
        if number == 5:
            (folder / f"{name}.bmp").write_bytes(b"")


def replace_in_study(study: Path, old: str, new: str) -> None:
    """Replace a text in every JSON file of a study."""
    for path in study.rglob("*.json"):
        path.write_text(path.read_text().replace(old, new))


def real_fingerprints(folder: Path) -> dict[str, Any]:
    """Return the fingerprints of packaged encoders, from a cache of four samples made below a folder."""
    write_samples(folder / "real-source", range(4))
    for image, text in REAL_ENCODERS:
        extract("real-source", "real", image=image, text=text)
    encoders: dict[str, Any] = identity_of(folder / "real")["encoders"]
    return encoders


def encode(run: str) -> dict[str, Any]:
    """Return vectors of three texts and two images from a trained model, and their similarities."""
    model = load(run)
    images = [Image.new("RGB", (8, 8), color) for color in ((200, 30, 90), (10, 180, 60))]
    return {
        "texts": model.encode_text(list(QUERIES)).tolist(),
        "images": model.encode_image(images).tolist(),
        "similarities": model.similarity(images, list(QUERIES)).tolist(),
    }


def config_of(run: Path) -> dict[str, Any]:
    """Return `config.json` of a run without digests of files: those of weights differ among machines.

    Later versions write other bytes of the same split, which is compared itself, a digest of the config, and of the
    rows without features.
    """
    config = read_json(run / "config.json")
    config["given"] = {name: value for name, value in config["given"].items() if not name.startswith("failed ")}
    return {name: value for name, value in config.items() if name not in ("weights", "split", "digest")}


def rows_of(selection: Path | str) -> list[int]:
    """Return the rows of a selection."""
    rows: list[int] = pq.read_table(selection)["row"].to_pylist()
    return rows


def read_json(path: Path) -> Any:
    """Read a JSON file, without the mark and the digest of a report, which the first versions did not write."""
    value = json.loads(path.read_text())
    if not isinstance(value, dict):
        return value
    return {name: part for name, part in value.items() if name not in ("generator", "digest")}


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(value, indent=1) + "\n")


def tensors_of(run: Path) -> dict[str, Any]:
    """Return name -> shape and L2 norm of a run's weights."""
    weights = load_file(run / "model.safetensors")
    return {name: [list(value.shape), float(np.linalg.norm(value))] for name, value in sorted(weights.items())}


def identity_of(cache: Path | str) -> dict[str, Any]:
    """Return the sample digest of a cache, the digests of its tables and the fingerprint of each encoder."""
    info = read_json(Path(cache) / "cache.json")
    groups = {
        str(path.parent.relative_to(cache)): read_json(path) for path in sorted(Path(cache).glob("*/*/zarr.json"))
    }
    return {
        "spine": info["spine"],
        "tables": info["tables"],
        "encoders": {name: group["attributes"]["embedcache"] for name, group in groups.items()},
    }
