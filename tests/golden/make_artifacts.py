"""Write the golden artifacts in `artifacts/`, as the code of commit 0991751 did once.

They were written before the package was restructured and are never written again: later code must open them and
compute the same numbers, which `test_artifacts.py` checks. To repeat it, take a worktree of that commit with this
folder as its `tests/golden`, install the extras `cpu`, `demo`, `sweep` and `wordllama`, and run

    HF_HUB_OFFLINE=1 python -m tests.golden.make_artifacts

(`quickstart-metrics.json` was copied from a separate `embedcache quickstart` run of the same commit on that machine.)

| below `artifacts/` | content |
| --- | --- |
| `cache/`, `other/`, `concepts/` | caches of toy encoders: 96 samples; 16, 8 of them from the first; 12 concepts |
| `run/` | a trained run with MLP projectors |
| `stopped/` | a run interrupted after its fifth checkpoint, 5 of 12 steps |
| `stopped.jsonl` | losses of the same run without the interruption |
| `index/`, `disk-index/` | HNSW in memory over projected vectors; on-disk IVF over a plain feature |
| `disk-index-4/` | the latter in format 4, a checksum per list: `commands.build_index` wrote it later |
| `study/`, `space.toml` | a sweep with two trials; `@FOLDER@` stands for the absolute path of `artifacts/` |
| `study-2/` | only `study.json`, of recordings and texts, in format 2: `open_study` wrote it later |
| `selection.parquet` | written by `curate select` |
| `kept.parquet`, `kept.removed.parquet` | written by `curate dedup` |
| `clean.parquet` | written by `curate leaks` |
| `losses/` | per recipe: `losses.jsonl`, `split.parquet`, and `config.json` without the digest of the weights |
| `projectors.json` | names, shapes and L2 norms of the tensors of every projector |
| `figures.json` | output of evaluation, search, deduplication, leak detection and selection; coverage by later code |
| `figures-amd.json` | those of its results that are others on an AMD EPYC, where near-ties fall the other way |
| `vectors.json` | vectors of three texts and two images from the model in `run/`, and their similarities |
| `digests.json` | sample digests and fingerprints of the caches, and fingerprints of real encoders |
| `quickstart-metrics.json` | `metrics.json` of `embedcache quickstart` |
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from tests.golden import commands
from tests.golden.commands import ARTIFACTS, write_json

NUM_CHECKPOINTS = 5


def make(folder: Path) -> None:
    """Write all artifacts into a folder, which becomes the working directory."""
    os.chdir(folder)
    commands.extract_toy(folder)
    commands.train("run", commands.TRAIN_RUN)
    commands.select("selection.parquet", "rare-first")
    for index in ("index", "disk-index"):
        commands.build_index(index)
    (folder / "space.toml").write_text(commands.SPACE)
    commands.sweep("study", 2)
    commands.deduplicate("kept.parquet", "unused.json")
    commands.find_leaks("clean.parquet", "unused.json")
    make_stopped_run(folder)
    make_losses(folder)
    make_projectors(folder)
    (folder / "out").mkdir()
    write_json(folder / "figures.json", dict(commands.measure(Path("out"))))
    write_json(folder / "vectors.json", commands.encode("run"))
    identities = {name: commands.identity_of(name) for name in ("cache", "other", "concepts")}
    write_json(folder / "digests.json", {**identities, "real encoders": commands.real_fingerprints(folder)})
    commands.embedcache("quickstart", folder / "quickstart")
    shutil.copy("quickstart/metrics.json", "quickstart-metrics.json")
    remove_traces(folder)


def make_losses(folder: Path) -> None:
    """Train every recipe and keep its losses, its split and what decides it."""
    (folder / "losses").mkdir()
    for name, options in commands.RECIPES.items():
        run = Path("runs") / name
        commands.train(run, options)
        shutil.copy(run / "losses.jsonl", folder / "losses" / f"{name}.jsonl")
        shutil.copy(run / "split.parquet", folder / "losses" / f"{name}.split.parquet")
        write_json(folder / "losses" / f"{name}.config.json", commands.config_of(run))


def make_projectors(folder: Path) -> None:
    """Train every projector for an epoch at most and keep the names, shapes and norms of its tensors."""
    tensors = {}
    for name in commands.PROJECTORS:
        commands.train_projector(folder / "projectors" / name, name)
        tensors[name] = commands.tensors_of(folder / "projectors" / name)
        shutil.rmtree(folder / "projectors" / name)
    write_json(folder / "projectors.json", tensors)


def make_stopped_run(folder: Path) -> None:
    """Stop a run right after a checkpoint. Only the code of commit 0991751 can run this: it replaces a function."""
    from embedcache.train import loop

    checkpoints_left = NUM_CHECKPOINTS
    save_checkpoint = loop.save_checkpoint

    def save(*args: Any) -> None:
        nonlocal checkpoints_left
        save_checkpoint(*args)
        checkpoints_left -= 1
        if not checkpoints_left:
            raise InterruptedError

    loop.save_checkpoint = save
    try:
        commands.train("stopped", commands.TRAIN_STOPPED)
    except InterruptedError:
        pass
    finally:
        loop.save_checkpoint = save_checkpoint
    commands.train("runs/whole", commands.TRAIN_STOPPED)
    shutil.copy("runs/whole/losses.jsonl", "stopped.jsonl")


def remove_traces(folder: Path) -> None:
    """Remove what no later code needs, and take the path of this machine out of what stays."""
    for name in ("source", "other-source", "out", "runs", "projectors", "real", "real-source", "quickstart"):
        shutil.rmtree(folder / name)
    for name in ("unused.json", "templates.txt", "concepts.txt"):
        (folder / name).unlink()
    for name in ("cache", "other", "concepts"):
        shutil.rmtree(folder / name / "records")
        path = folder / name / "cache.json"
        info = json.loads(path.read_text())
        info["source"]["path"] = info["source"]["path"].replace(f"{folder}/", "")
        write_json(path, info)
    commands.replace_in_study(folder / "study", str(folder), commands.PLACE)
    (folder / "study" / "report.html").unlink()
    for path in folder.rglob("*"):
        if path.is_file() and str(folder).encode() in path.read_bytes():
            raise ValueError(f"{path} holds the path of this machine")


if __name__ == "__main__":
    if ARTIFACTS.exists():
        raise SystemExit(f"{ARTIFACTS} is there; it is never made again")
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary).resolve() / "artifacts"
        place.mkdir()
        make(place)
        shutil.copytree(place, ARTIFACTS)
