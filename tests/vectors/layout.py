"""Images in the folders and tars that CLIP_benchmark reads."""

import io
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path


def write_layout(folder: Path, samples: Mapping[str, Mapping[str, bytes]], **texts: Sequence[str]) -> Path:
    """Write one tar of a test split.

    Args:
        folder: where.
        samples: key -> suffix -> content.
        texts: name of a `.txt` of the folder -> its lines.
    """
    (folder / "test").mkdir(parents=True)
    (folder / "test" / "nshards.txt").write_text("1\n")
    with tarfile.open(folder / "test" / "0.tar", "w") as tar:
        for key, files in samples.items():
            for suffix, content in files.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    for name, lines in texts.items():
        (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
    return folder
