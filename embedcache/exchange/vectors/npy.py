"""Arrays in `.npy` files, with a table of keys and captions beside them."""

from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa
import pyarrow.parquet as pq

from embedcache.encoders.contract import Modality
from embedcache.errors import SettingError
from embedcache.exchange.vectors.incoming import Incoming, Part
from embedcache.exchange.vectors.new_files import new_folder
from embedcache.exchange.vectors.npy_rows import open_npy, write_header
from embedcache.progress import Progress

if TYPE_CHECKING:
    from embedcache.exchange.vectors.outgoing import Outgoing

FORM = "npy"
_BLOCK = 8192


def open_arrays(*, image: Path | None = None, text: Path | None = None, table: Path | None = None) -> Incoming:
    """Look at arrays whose rows belong together.

    Args:
        image: a `.npy` of image vectors.
        text: a `.npy` of text vectors.
        table: their keys, captions and columns: `.parquet`, `.csv`, `.tsv` or `.jsonl`.

    Raises:
        SettingError: no array is given.
        PathError: there is no such file.
        CorruptError: a file is damaged.
        DataError: an array is not (rows, width) of float16 or float32, or they differ in their rows.
    """
    given: list[tuple[Modality, Path | None]] = [("image", image), ("text", text)]
    vectors = {str(modality): open_npy(path) for modality, path in given if path is not None}
    first = image or text
    if first is None:
        raise SettingError("no array is given; give one with --image or --text, or one with each")
    modalities = {str(modality): modality for modality, path in given if path is not None}
    return Incoming(form=FORM, path=first, modalities=modalities, parts=[Part(vectors=vectors, table=table)])


def write_arrays(outgoing: "Outgoing", folder: Path, *, progress: Progress) -> int:
    """Write `image.npy`, `text.npy` and `rows.parquet` into a new folder, whole or not at all; give the number of rows.

    Vectors are as they are in the cache. Memory: a block, and the cache's tables.

    Raises:
        PathError: the folder is not empty.
    """
    num_rows = len(outgoing.samples)
    with new_folder(folder) as temporary:
        table: pa.Table = outgoing.table(slice(0, num_rows))
        pq.write_table(table.replace_schema_metadata(outgoing.metadata), temporary / "rows.parquet")
        for modality in outgoing.modalities:
            progress.start(f"writing {modality}.npy", num_rows, "vectors")
            with (temporary / f"{modality}.npy").open("wb") as file:
                write_header(file, (num_rows, outgoing.width(modality)), outgoing.dtype(modality))
                for block in outgoing.vectors(modality, _BLOCK):
                    file.write(block.tobytes())
                    progress.advance(len(block))
            progress.finish()
    return num_rows
