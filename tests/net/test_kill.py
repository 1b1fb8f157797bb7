"""Every writer, killed with SIGKILL before and after each rename, then run again: the same bytes as without a kill.

No test here names a file that a writer makes, so layouts may change. What differs between two whole runs, such as
files with times, is not compared.
"""

import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from embedcache.cli.main import root_command
from embedcache.store.cache import Cache
from tests.crash import count_renames, crash_at
from tests.images import write_images

pytestmark = [pytest.mark.slow, pytest.mark.no_mutants]

TOYS = "--image-encoder tests.toy:open_toy --text-encoder tests.toy:open_toy --device cpu"
VECTORS = "--feature image=open_toy/cls --feature text=open_toy/mean"
TIME = re.compile(rb'\d{4}-\d\d-\d\dT[\d:.+]+|"\w*(?:_ms|seconds)": [\d.]+')
PCA = "--rule pca --input image=open_toy/cls --name smaller --parameter width=3"
TRAIN = f"{VECTORS} --projector mlp --shared-width 8 --batch-size 2 --epochs 2 --split key --threads 1"


@dataclass(frozen=True)
class Writer:
    """A command that writes into `out`, a copy of what `prepare` makes; in it `{source}` and `{cache}` are paths."""

    command: str
    prepare: Callable[[Path, Path], None] | None = None
    finish: tuple[str, ...] = ()
    """Further commands after the command was run again."""


def run(command: str) -> None:
    root_command()(command.split(), standalone_mode=False)


def extracted(source: Path, out: Path) -> None:
    """Extract a source in which one image is broken."""
    good = (source / "00003.png").read_bytes()
    (source / "00003.png").write_bytes(b"broken")
    run(f"extract {source} {out} {TOYS} --feature cls,tokens --chunk-size 4")
    (source / "00003.png").write_bytes(good)


def added(source: Path, out: Path) -> None:
    """Extract a source to which a sample is added afterwards."""
    run(f"extract {source} {out} {TOYS} --feature cls,tokens --chunk-size 4")
    for suffix in ("png", "txt"):
        shutil.copy(source / f"00001.{suffix}", source / f"00001-again.{suffix}")


def damaged(source: Path, out: Path) -> None:
    """Extract a source and change a byte of a stored vector, wherever it is."""
    run(f"extract {source} {out} {TOYS} --feature cls,tokens --chunk-size 4")
    vector = Cache(out).feature("image", "open_toy/cls").load()[1].tobytes()
    (path,) = (path for path in out.rglob("*") if path.is_file() and vector in path.read_bytes())
    path.write_bytes(path.read_bytes().replace(vector, bytes([vector[0] ^ 1]) + vector[1:]))


def maintained(source: Path, out: Path) -> None:
    """Make a cache with a derived feature, an index, a run, and a list of two keys."""
    run(f"extract {source} {out}/cache {TOYS} --feature cls,patches,mean --chunk-size 4")
    run(f"derive {out}/cache {PCA}")
    run(f"curate index {out}/cache {out}/index --feature open_toy/cls --factory Flat --min-recall 0")
    run(f"train {out}/cache {out}/run {TRAIN}")
    listed(source, out)


def listed(source: Path, out: Path) -> None:
    """Write a list of two keys; `out` stays as it is."""
    Path(f"{source}.keys").write_text("00001\n00004\n")


def vectors(source: Path, out: Path) -> None:
    """Write vectors of another tool; `out` stays missing."""
    np.save(f"{source}.npy", np.random.default_rng(0).normal(size=(6, 8)).astype(np.float16))


WRITERS = {
    "extract": Writer(f"extract {{source}} {{out}} {TOYS} --feature cls,patches,tokens --chunk-size 4"),
    "extend": Writer(f"extract {{source}} {{out}} {TOYS} --extend", added),
    "retry": Writer(
        f"extract {{source}} {{out}} {TOYS} --retry-failed", extracted, (f"extract {{source}} {{out}} {TOYS}",)
    ),
    "repair": Writer("verify {out} --repair --trust", damaged),
    "derive": Writer(f"derive {{out}} {PCA}", extracted),
    "train": Writer(f"train {{cache}} {{out}} {TRAIN}"),
    "index": Writer("curate index {cache} {out} --feature open_toy/cls --factory IVF2,Flat --min-recall 0"),
    "merge": Writer("cache merge {cache} {cache}-copy {out} --prefix-keys"),
    "cut": Writer("cache cut {cache} {source}.keys {out}", listed),
    "prune": Writer("cache prune {out}/cache --feature open_toy/patches --yes", maintained),
    "remove": Writer(
        "cache remove {out}/cache {source}.keys --index {out}/index --run {out}/run --yes",
        maintained,
    ),
    "import": Writer("import npy {out} --file image={source}.npy --chunk-size 4", vectors),
}


@pytest.mark.parametrize("name", WRITERS)
def test_killed_before_and_after_each_rename(name: str, tmp_path: Path) -> None:
    writer = WRITERS[name]
    source = write_images(tmp_path / "source", 6)
    cache = tmp_path / "cache"
    run(f"extract {source} {cache} {TOYS} --feature cls,mean --chunk-size 4")
    shutil.copytree(cache, f"{cache}-copy")
    template = tmp_path / "template"
    if writer.prepare:
        writer.prepare(source, template)

    def start() -> str:
        """Put `out` into the state before the command; return the command."""
        out = tmp_path / "out"
        shutil.rmtree(out, ignore_errors=True)
        if template.exists():
            shutil.copytree(template, out)
        return writer.command.format(source=source, cache=cache, out=out)

    def finish(command: str) -> dict[str, bytes]:
        for line in (command, *(line.format(source=source, out=tmp_path / "out") for line in writer.finish)):
            run(line)
        return read_tree(tmp_path / "out")

    num_renames = count_renames(start().split())
    whole, again = read_tree(tmp_path / "out"), finish(start())
    varying = {path for path in whole.keys() | again.keys() if whole.get(path) != again.get(path)}
    varying_folders = {Path(path).parent for path in varying}

    kills = [(number, moment) for number in range(1, num_renames + 1) for moment in ("before", "after")]
    if num_renames > 16:
        kills = [kill for kill in kills if kill[1] == ("before", "after")[kill[0] % 2]]
    for number, moment in kills:
        command = start()
        crash_at(command.split(), moment, number)
        tree = finish(command)
        different = {path for path in whole.keys() | tree.keys() if whole.get(path) != tree.get(path)} - varying
        different = {path for path in different if path in whole or Path(path).parent not in varying_folders}
        assert not different, f"killed {moment} rename {number} of {num_renames}"


def read_tree(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file without times and durations, except for empty ones, which are locks."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
    return {str(path.relative_to(folder)): TIME.sub(b"<time>", path.read_bytes()) for path in paths}
