"""Metadata of DataComp: `<hash>.parquet` beside `<hash>.npz`, and lists of uids."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedcache.arrays import Array
from embedcache.curate.select.export import to_uids
from embedcache.dataset.selections import Selection, check_selection_path, write_selection
from embedcache.encoders.base import Modality
from embedcache.errors import DataError, PathError, SettingError
from embedcache.files import check_regular
from embedcache.interop.npy import open_npz, report_damage
from embedcache.interop.vector_files import FileGroup, VectorImport
from embedcache.store.cache import Cache

_REASON = "in the list of uids"


def open_datacomp(path: Path, *, image_array: Sequence[str] = (), text_array: Sequence[str] = ()) -> VectorImport:
    """Open a folder of DataComp's metadata, whose files are read in the order of their names.

    Raises:
        SettingError: no array such as `l14_img` is named, or one is named twice.
        PathError: a file does not exist, or lacks its counterpart.
        UnknownNameError: an `.npz` has no such array.
        DataError: files that belong together differ in their rows.
    """
    modalities = _assign_modalities(image_array, text_array)
    tables, arrays = ({file.stem: file for file in sorted(path.glob(f"*.{suffix}"))} for suffix in ("parquet", "npz"))
    if not arrays:
        raise PathError(f"{path}: expected DataComp's metadata, NAME.parquet and NAME.npz, got no .npz file")
    unpaired = sorted(tables.keys() ^ arrays.keys())
    if unpaired:
        stem = unpaired[0]
        exists, missing = ("parquet", "npz") if stem in tables else ("npz", "parquet")
        raise PathError(
            f"{path} has {stem}.{exists} and no {stem}.{missing} ({len(tables)} .parquet, {len(arrays)} .npz); get the "
            "folder again"
        )
    groups = [
        FileGroup(vectors={name: open_npz(file, name) for name in modalities}, table=tables[stem])
        for stem, file in arrays.items()
    ]
    return VectorImport(form="datacomp", path=path, modalities=modalities, groups=groups)


def import_uids(uids_path: Path, cache_path: Path | str, out_path: Path) -> int:
    """Write a selection from a list of DataComp's uids, a `.npy` of dtype `u8,u8`; return its number of samples.

    Raises:
        PathError: the list does not exist, or the selection's name does not end in `.parquet`.
        CorruptError: the list is not a NumPy array.
        DataError: keys of the cache are not uids, or the cache lacks some of the list.
    """
    check_selection_path(out_path)
    cache = Cache(cache_path)
    wanted = _read_uids(uids_path)
    found = pc.index_in(_as_bytes(to_uids(cache.column("key"))), value_set=_as_bytes(wanted))
    rows, is_unknown = np.flatnonzero(found.is_valid()), np.ones(len(wanted), bool)
    is_unknown[found.drop_null().to_numpy()] = False
    unknown = wanted[is_unknown]
    if len(unknown):
        first = f"{unknown[0][0]:016x}{unknown[0][1]:016x}"
        raise DataError(
            f"{uids_path}: expected keys of {cache.path}, got {len(unknown):,} unknown uids of {len(wanted):,}, first "
            f"{first}; name the cache that they were selected from"
        )
    write_selection(
        out_path, cache, Selection(rows=rows, reasons=[_REASON] * len(rows)), {"method": "uids", "from": str(uids_path)}
    )
    return len(rows)


def _assign_modalities(images: Sequence[str], texts: Sequence[str]) -> Mapping[str, Modality]:
    names = [*images, *texts]
    if not names or len(set(names)) < len(names):
        raise SettingError(
            f"vectors: expected different arrays such as l14_img, b32_img, l14_txt and b32_txt, got "
            f"{', '.join(names) or 'none'}; name them with --image-array and --text-array"
        )
    return {name: "image" if name in images else "text" for name in names}


def _as_bytes(uids: Array) -> pa.Array:
    """Return uids as an Arrow array, which can be hashed."""
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), len(uids), [None, pa.py_buffer(uids.view(np.uint8))])


def _read_uids(path: Path) -> Array:
    """Return the uids in a list, each once."""
    with report_damage(path):
        check_regular(path)
        uids = np.load(path, allow_pickle=False)
    if not isinstance(uids, np.ndarray) or uids.dtype != np.dtype("u8,u8") or uids.ndim != 1:
        kind = f"{uids.dtype} shaped {uids.shape}" if isinstance(uids, np.ndarray) else "several arrays"
        raise DataError(f"{path}: expected a list of uids, one row of dtype u8,u8, got {kind}")
    return np.unique(uids)
