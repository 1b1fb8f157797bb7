"""Commands on toy caches and on the quickstart's, and the figures that they give, by name.

`tests/net/values.json` and `features.npz` hold what these commands gave when they were recorded. Layouts of files and
options may change: this module is then the only one to change with them. The values must stay the same.
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
from embedcache.store.cache import Cache

TOY = "tests.toy:open_toy"
WORDS = ("apple", "boat", "cat", "drum", "egg", "fish", "goat", "hat", "ink", "jar", "kite", "lamp")
QUERIES = ("apple boat", "a cat and a drum", "kite")
NUM_SAMPLES = 96
FIRST_NEAR_DUPLICATE, FIRST_COPY = 80, 88

VECTORS = "--feature image=open_toy/cls --feature text=open_toy/mean"
TOKENS = "--feature image=open_toy/patches --feature text=open_toy/tokens"
TRAIN = f"{VECTORS} --shared-width 16 --batch-size 16 --threads 1"
COSINES = "--cosine image=0.995 --cosine text=0.9"
STRICT = f"--split strict {COSINES}"
RUN = f"{TRAIN} {STRICT} --projector mlp --initialization random --lr 3e-3 --epochs 10 --seed 3"
RECIPES = {
    "mlp": f"{TRAIN} --projector mlp --loss info_nce --epochs 4 {STRICT}",
    "token": f"{TOKENS} --shared-width 16 --batch-size 16 --threads 1 --projector token --loss siglip --epochs 3 "
    "--split key --seed 1",
    "fusemix": f"{TRAIN} --projector fusemix --loss multi_positive --mixup 0.5 --structure 0.1 --epochs 3 --split key",
    "glu": f"{TRAIN} --projector linear+glu --loss sail --captions all --initialization random --epochs 3 --split key "
    "--split-seed 5 --selection rare-first.parquet",
    "linear": f"{TRAIN} --projector linear --initialization procrustes --dropout 0.3 --weight-decay 0.1 --language en "
    "--epochs 3 --patience 2 --split key --shuffle-pairs --block-rows 4",
}
PROJECTORS = {
    "asif": "--epochs 0",
    "fusemix": "--epochs 1",
    "glu": "--epochs 1",
    "identity+linear": "--epochs 1 --shared-width 48",
    "linear": "--epochs 1",
    "mlp": "--epochs 1",
    "linear+sharelock": "--epochs 0 --initialization random",
    "cls_token": f"--epochs 1 {TOKENS}",
    "token": f"--epochs 1 {TOKENS}",
    "token_mlp": f"--epochs 1 {TOKENS}",
}
SELECTIONS = {
    "rare-first": "--method rare-first:per_concept=4 --concepts concepts --run run",
    "clip-score": "--method clip-score --run run --budget 25%",
    "random": "--method random --feature open_toy/cls --budget 20 --seed 5",
    "k-center": "--method k-center --budget 12 --modality image --feature open_toy/cls",
    "metaclip": "--method metaclip:threshold=0.4,head=6 --concepts concepts --feature open_toy/mean --modality text",
}
INDEXES = {
    "index": "--run run --factory HNSW8 --min-recall 0.5",
    "disk-index": "--feature open_toy/cls --factory IVF2,SQfp16 --on-disk --min-recall 0.5",
}
GROUPS = {
    "People & Body": ["a person", "a hand", "a family"],
    "Flags": ["the flag of a country"],
    "Objects": ["an object", "a tool", "clothes"],
    "Symbols": ["a symbol", "a sign", "an arrow", "a clock"],
    "Travel & Places": ["a vehicle", "a building", "a place", "the weather"],
    "Smileys & Emotion": ["a smiling face", "an emotion", "a heart"],
    "Animals & Nature": ["an animal", "a plant"],
    "Food & Drink": ["food", "a drink", "a fruit"],
    "Activities": ["a sport", "a game", "a celebration"],
}

build = cache(get_command)
"""Builds all commands, once."""


def embedcache(*words: object) -> str:
    """Run an `embedcache` command in this process and return what it prints.

    Args:
        words: arguments; one that contains spaces and begins with `--` is split.
    """
    arguments = [part for word in map(str, words) for part in (shlex.split(word) if word[:2] == "--" else [word])]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        code = build(app)(arguments, standalone_mode=False)
    assert not code, printed.getvalue()
    return printed.getvalue()


def report(*words: object) -> dict[str, Any]:
    """Run a command and return its report."""
    path = Path("report.json")
    embedcache(*words, f"--output {path} --overwrite")
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def make_toy() -> None:
    """Extract the caches `cache`, `other` and `concepts`, train `run` and build the indexes, in this folder."""
    write_samples(Path("source"), range(NUM_SAMPLES))
    write_samples(Path("other-source"), [*range(8), *range(NUM_SAMPLES, NUM_SAMPLES + 8)])
    Path("concepts.txt").write_text("\n".join(WORDS) + "\n")
    Path("templates.txt").write_text("{c}\na {c}\n")
    encoders = f"--image-encoder {TOY} --text-encoder {TOY}"
    embedcache("extract", "source", "cache", f"{encoders} --feature cls,patches,mean,tokens --chunk-size 32")
    embedcache("extract", "other-source", "other", f"{encoders} --chunk-size 32")
    prompts = "prompts:concepts.txt+templates.txt"
    embedcache("extract", prompts, "concepts", f"--text-encoder {TOY} --chunk-size 32")

    embedcache("train", "cache", "run", RUN)
    for method, options in SELECTIONS.items():
        embedcache("curate", "select", "cache", f"{method}.parquet", options)
    for index, options in INDEXES.items():
        embedcache("curate", "index", "cache", index, options)


def toy_figures() -> Iterator[tuple[str, Any]]:
    """Iterate over the figures of all commands on the toy caches, in the folder of `make_toy`."""
    for part in ("test", "all"):
        yield from retrieval(f"retrieval {part}", report("evaluate", "retrieval", "cache", "run", f"--part {part}"))

    zero_shot = report("evaluate", "zero-shot", "cache", "run", "--prompts concepts --part all")
    yield "zero-shot", zero_shot["metrics"]

    coverage = report("curate", "coverage", "cache", "concepts", "--run run --selection rare-first.parquet -k 3")
    yield "coverage", counts(coverage)

    yield "search by text", search("index", *QUERIES, "-k", "5")
    yield "search by key", search("index", "--query-key 00002", "-k", "5")
    yield "search in a selection", search("index", *QUERIES, "-k", "5", "--selection rare-first.parquet")
    yield "search by label", search("index", "kite", "-k", "5", "--label-value apple")
    yield "search on the disk", search("disk-index", "--query-key 00002", "-k", "5")

    options = "--cosine 0.995 --feature open_toy/cls --overwrite"
    report("curate", "dedup", "cache", "kept.parquet", options)
    yield "duplicates", keys_of("kept.parquet")
    report("curate", "leaks", "cache", "other", "clean.parquet", f"{VECTORS} {COSINES}")
    yield "leaks", keys_of("clean.parquet")
    for method in SELECTIONS:
        yield f"selection by {method}", keys_of(f"{method}.parquet")

    model = load("run")
    images = [Image.new("RGB", (8, 8), color) for color in ((200, 30, 90), (10, 180, 60))]
    yield "text vectors", model.encode_text(list(QUERIES)).tolist()
    yield "image vectors", model.encode_image(images).tolist()
    yield "similarities", model.similarity(images, list(QUERIES)).tolist()
    embedcache("export", "npy", "cache", "vectors", "--run run")
    yield "exported vectors", exported("vectors")


def train_figures(name: str) -> Iterator[tuple[str, Any]]:
    """Train one of `RECIPES` in the folder of `make_toy`; iterate over its losses and the norms of its weights."""
    embedcache("train", "cache", name, RECIPES[name])
    yield f"losses of {name}", losses(name)
    yield f"weights of {name}", weights(name)


def projector_figures(name: str) -> Iterator[tuple[str, Any]]:
    """Train one kind of projector for an epoch at most; iterate over the norms of its weights."""
    options = PROJECTORS[name]
    inputs = "" if "--feature" in options else VECTORS
    width = "" if "--shared-width" in options else "--shared-width 8"
    options = f"{options} {inputs} {width} --projector {name} --split key --batch-size 16 --threads 1"
    embedcache("train", "cache", f"projector-{name}", options)
    yield f"weights of projector {name}", weights(f"projector-{name}")


def quickstart_figures() -> Iterator[tuple[str, Any]]:
    """Iterate over the figures of all commands on the quickstart's cache, runs and index, in its folder."""
    yield from retrieval("retrieval", {"metrics": json.loads(Path("metrics.json").read_text())})
    one = report("evaluate", "retrieval", "cache", "runs/seed-0", "--control-run runs/shuffled-0")
    yield from retrieval("retrieval of one run", one[0])

    Path("groups.json").write_text(json.dumps(GROUPS))
    embedcache("extract", "prompts:groups.json", "groups", "--text-encoder st:all-MiniLM-L6-v2")
    yield "zero-shot", report("evaluate", "zero-shot", "cache", "runs/seed-0", "--prompts groups")["metrics"]
    yield "probe", report("evaluate", "probe", "cache", "--feature efficientnet-lite0/patch_mean")["metrics"]

    pairs = report("evaluate", "pairs", "cache", "--num-samples 600")["pairs"]
    yield "pairs", [{way: pair[way]["value"] for way in ("i2t", "t2i")} for pair in pairs["pairs"]]

    coverage = report("curate", "coverage", "cache", "groups", "--modality text")
    yield "coverage", counts(coverage)
    report("curate", "dedup", "cache", "kept.parquet", "--cosine 0.9 --no-pixels")
    yield "duplicates", len(keys_of("kept.parquet"))
    report("curate", "select", "cache", "rare.parquet", "--method rare-first:per_concept=30 --concepts groups")
    yield "selection", keys_of("rare.parquet")
    report("curate", "outliers", "cache", "outliers.parquet")
    yield "outliers", keys_of("outliers.parquet")[:20]
    negatives = report("curate", "negatives", "cache", "negatives.parquet", "--run runs/seed-0")
    yield "negatives", [negatives["num_negatives"], negatives["mean_score"], negatives["mean_own_score"]]

    yield "search by text", search("index", "an animal with feathers", "a boat", "-k", "5")
    yield "search by key", search("index", "--query-key 1F427", "-k", "4")
    yield "losses", losses("runs/seed-0")
    yield "weights", weights("runs/seed-0")
    embedcache("export", "npy", "cache", "vectors", "--run runs/seed-0")
    yield "exported vectors", exported("vectors")


def features_of(cache: Path | str, num_items: int | None = None) -> dict[str, np.ndarray]:
    """Return the first valid rows of every feature of a cache, the tokens of all items in sequence."""
    arrays = {}
    opened = Cache(cache)
    for modality in opened.info.num_items:
        for feature in opened.features(modality):
            rows = np.flatnonzero(feature.valid)[:num_items]
            items = [np.atleast_2d(item) for item in feature.gather_tokens(rows)]
            name = f"{modality} {feature.feature}"
            arrays[name] = np.concatenate(items)
            arrays[f"{name} lengths"] = np.array([len(item) for item in items])
            arrays[f"{name} rows"] = rows
    return arrays


def retrieval(name: str, record: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Iterate over the recalls of a report of `evaluate retrieval`, those of its controls and of chance."""
    values = record["metrics"].get("retrieval", record["metrics"])
    for label in ("", "closed_form", "shuffled", "chance"):
        scores = values.get(label) if label else values
        if scores:
            yield f"{name} {label}".strip(), {way: scores[way] for way in ("i2t", "t2i") if way in scores}


def counts(record: dict[str, Any]) -> dict[str, list[int]]:
    """Return the count and interval of each concept of a report of `curate coverage`."""
    return {concept["name"]: [concept[key] for key in ("count", "low", "high")] for concept in record["concepts"]}


def search(index: str, *options: str) -> list[list[list[Any]]]:
    """Search an index and return key and score of each hit of each query; hits of equal scores are sorted by key."""
    results = json.loads(embedcache("search", index, *options, "--json"))
    hits = [[[hit["key"], hit["score"]] for hit in query["hits"]] for query in results]
    return [sorted(query, key=lambda hit: (-round(hit[1], 4), hit[0])) for query in hits]


def keys_of(table: Path | str) -> list[str]:
    """Return the keys of a selection or of a table of scores."""
    keys: list[str] = pq.read_table(table)["key"].to_pylist()
    return keys


def losses(run: Path | str) -> list[float]:
    """Return the loss of each logged step of a run."""
    lines = [json.loads(line) for line in (Path(run) / "losses.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def weights(run: Path | str) -> dict[str, Any]:
    """Return name -> shape and L2 norm of a run's weights."""
    tensors = load_file(Path(run) / "model.safetensors")
    return {name: [list(value.shape), float(np.linalg.norm(value))] for name, value in sorted(tensors.items())}


def exported(folder: Path | str) -> dict[str, Any]:
    """Return shape and first values of each exported array."""
    arrays = {path.stem: np.load(path) for path in sorted(Path(folder).rglob("*.npy"))}
    numbers = {name: array for name, array in arrays.items() if array.dtype.kind == "f"}
    return {name: [list(array.shape), array[:3, :8].astype(float).tolist()] for name, array in numbers.items()}


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
