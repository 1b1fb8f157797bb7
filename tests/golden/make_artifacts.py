"""Make `tests/golden/0.1.0`: a cache, a run and an index of the format of 0.1.0, which every later version reads.

python -m tests.golden.make_artifacts FOLDER
"""

import contextlib
import shutil
import sys
from pathlib import Path

from embedcache.cli.main import root_command
from tests.edits import edit_record
from tests.images import write_images

TOYS = "--image-encoder tests.toy:open_toy --text-encoder tests.toy:open_toy --device cpu"
COMMANDS = (
    f"extract source cache {TOYS} --feature cls,mean,tokens --chunk-size 4",
    "train cache run --feature image=open_toy/cls --feature text=open_toy/mean --projector linear --shared-width 8 "
    "--batch-size 2 --epochs 1 --split key --threads 1",
    "curate index cache index --run run --factory Flat --min-recall 0",
)


def make(folder: Path) -> None:
    """Write the artifacts into a new folder, without paths of this machine and without the images."""
    folder.mkdir(parents=True)
    write_images(folder / "source", 6)
    with contextlib.chdir(folder):
        for command in COMMANDS:
            root_command()(command.split(), standalone_mode=False)
    for name in ("source", "cache/records"):
        shutil.rmtree(folder / name)
    for path in [folder / "index/record.json", *folder.rglob(".lock"), *folder.rglob(".claims")]:
        path.unlink()
    edit_record(folder / "cache/cache.json", source={"type": "folder", "path": "source", "settings": {}})


if __name__ == "__main__":
    make(Path(sys.argv[1]))
