"""Every writer, from the files that SIGKILL leaves before and after each rename: the same bytes as without a kill.

Its process is stopped at each rename while its files are copied. The command is run again on each of the copies.

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
from tests.crash import stopped_at_renames
from tests.images import write_images

pytestmark = [pytest.mark.slow, pytest.mark.no_mutants]

TOYS = "--image-encoder tests.toy:open_toy --text-encoder tests.toy:open_toy --device cpu"
VECTORS = "--feature image=open_toy/cls --feature text=open_toy/mean"
TIME = re.compile(rb'\d{4}-\d\d-\d\dT[\d:.+]+|"\w*(?:_ms|seconds)": [\d.]+')
PCA = "--rule pca --input image=open_toy/cls --name smaller --parameter width=3"
INDEX = "--feature open_toy/cls --factory IVF2,Flat --min-recall 0"
TRAIN = f"{VECTORS} --projector mlp --shared-width 8 --batch-size 2 --epochs 2 --split key --threads 1"


@dataclass(frozen=True)
class Writer:
    """A command that writes into `out`, a copy of what `prepare` makes; in it `{source}` and `{cache}` are paths."""

    command: str
    prepare: Callable[[Path, Path], None] | None = None


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


def derived(source: Path, out: Path, features: str = "cls,patches,mean") -> None:
    """Make a cache with a derived feature."""
    run(f"extract {source} {out}/cache {TOYS} --feature {features} --chunk-size 4")
    run(f"derive {out}/cache {PCA}")


def maintained(source: Path, out: Path) -> None:
    """Make a cache with a derived feature, an index, a run, and a list of two keys."""
    derived(source, out, "cls,mean")
    run(f"curate index {out}/cache {out}/index --feature open_toy/cls --factory Flat --min-recall 0")
    run(f"train {out}/cache {out}/run {TRAIN}")
    listed(source, out)


def indexed(source: Path, out: Path) -> None:
    """Index a cache to which a sample is added afterwards."""
    added(source, out / "cache")
    run(f"curate index {out}/cache {out}/index {INDEX}")
    run(f"extract {source} {out}/cache {TOYS} --extend")


def listed(source: Path, out: Path) -> None:
    """Write a list of two keys; `out` stays as it is."""
    Path(f"{source}.keys").write_text("00001\n00004\n")


def vectors(source: Path, out: Path) -> None:
    """Write vectors of another tool; `out` stays missing."""
    np.save(f"{source}.npy", np.random.default_rng(0).normal(size=(6, 8)).astype(np.float16))


WRITERS = {
    "extract": Writer(f"extract {{source}} {{out}} {TOYS} --feature cls,patches,tokens --chunk-size 4"),
    "extend": Writer(f"extract {{source}} {{out}} {TOYS} --extend", added),
    "retry": Writer(f"extract {{source}} {{out}} {TOYS} --retry-failed", extracted),
    "repair": Writer("verify {out} --repair --trust", damaged),
    "derive": Writer(f"derive {{out}} {PCA}", extracted),
    "train": Writer(f"train {{cache}} {{out}} {TRAIN}"),
    "index": Writer(f"curate index {{cache}} {{out}} {INDEX}"),
    "grow": Writer(f"curate index {{out}}/cache {{out}}/index {INDEX}", indexed),
    "grow on disk": Writer(f"curate index {{out}}/cache {{out}}/index {INDEX} --on-disk", indexed),
    "merge": Writer("cache merge {cache} {cache}-copy {out} --prefix-keys"),
    "cut": Writer("cache cut {cache} {source}.keys {out}", listed),
    "prune": Writer("cache prune {out}/cache --feature open_toy/patches --yes", derived),
    "remove": Writer(
        "cache remove {out}/cache {source}.keys --index {out}/index --yes",
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
    place, template = tmp_path / "place", tmp_path / "template"
    if writer.prepare:
        writer.prepare(source, template)
    command = writer.command.format(source=source, cache=cache, out=place / "out")

    def start() -> None:
        """Put `out` into the state before the command."""
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        if template.exists():
            shutil.copytree(template, place / "out")

    def finish() -> dict[str, bytes]:
        run(command)
        return read_tree(place)

    start()
    states = killed_states(command, place, tmp_path / "states")
    whole = read_tree(place)
    start()
    again = finish()
    varying = {path for path in whole.keys() | again.keys() if whole.get(path) != again.get(path)}
    varying_folders = {Path(path).parent for path in varying}

    for moment, state in states:
        shutil.rmtree(place)
        state.rename(place)
        tree = finish()
        different = {path for path in whole.keys() | tree.keys() if whole.get(path) != tree.get(path)} - varying
        different = {path for path in different if path in whole or Path(path).parent not in varying_folders}
        assert not different, f"killed {moment}"


def killed_states(command: str, place: Path, folder: Path) -> list[tuple[str, Path]]:
    """Run a command; return the moments of a kill, each with a copy of a folder as it is then.

    That after a rename is left out if all of its files are the same before the next one: what was added since is not in
    its place yet.
    """
    states: list[tuple[str, Path]] = []
    last: dict[Path, bytes] | None = None
    for number, path in enumerate(stopped_at_renames(command.split())):
        state = {each: each.read_bytes() if each.is_file() else b"" for each in place.rglob("*")}
        if last is not None and last.items() <= state.items():
            shutil.rmtree(states.pop()[1])
        moment = f"{'before' if path else 'after'} rename {number // 2 + 1}"
        states.append((moment, Path(shutil.copytree(place, folder / str(number)))))
        last = state
    return states


def read_tree(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file without times and durations, except for empty ones, which are locks."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.stat().st_size]
    return {str(path.relative_to(folder)): TIME.sub(b"<time>", path.read_bytes()) for path in paths}
