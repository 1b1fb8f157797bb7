"""DataComp's metadata: `<hash>.parquet` beside `<hash>.npz`, and lists of uids."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from embedcache.arrays import Array
from embedcache.curate.select.export import to_uids
from embedcache.dataset.selections import Selection, check_selection_path, write_selection
from embedcache.encoders.base import Modality
from embedcache.errors import CorruptError, DataError, PathError, SettingError
from embedcache.interop.incoming import Incoming, Part
from embedcache.interop.npy import damage_named, open_npz
from embedcache.store.cache import Cache

FORM = "datacomp"
REASON = "in the list of uids"


def open_metadata(path: Path, *, image: Sequence[str] = (), text: Sequence[str] = ()) -> Incoming:
    """Look at a folder of DataComp's metadata.

    Args:
        path: the folder; its files are taken in the order of their names.
        image: arrays of image vectors, such as `l14_img`.
        text: arrays of text vectors, such as `l14_txt`.

    Raises:
        SettingError: no array is named, or one twice.
        PathError: there is no such file, or a file lacks its other half.
        UnknownNameError: an `.npz` has no such array.
        DataError: files that belong together differ in their rows.
    """
    modalities = _modalities(image, text)
    tables, arrays = ({file.stem: file for file in sorted(path.glob(f"*.{suffix}"))} for suffix in ("parquet", "npz"))
    if not arrays:
        raise PathError(f"{path} holds no .npz; give DataComp's folder of metadata, with NAME.parquet and NAME.npz")
    lone = sorted(tables.keys() ^ arrays.keys())
    if lone:
        there, lacks = ("parquet", "npz") if lone[0] in tables else ("npz", "parquet")
        raise PathError(
            f"{path} has {lone[0]}.{there} and no {lone[0]}.{lacks} ({len(tables)} .parquet, {len(arrays)} .npz); get "
            "the folder again"
        )
    parts = [
        Part(vectors={name: open_npz(file, name) for name in modalities}, table=tables[stem])
        for stem, file in arrays.items()
    ]
    return Incoming(form=FORM, path=path, modalities=modalities, parts=parts)


def import_uids(uids_path: Path, cache_path: Path | str, out_path: Path) -> int:
    """Make a selection of a list of DataComp's uids: a `.npy` of dtype `u8,u8`; give how many samples it has.

    Args:
        uids_path: the list, in any order.
        cache_path: a cache whose keys are uids.
        out_path: the selection, `.parquet`.

    Raises:
        PathError: there is no such list, or the selection's name does not end in `.parquet`.
        CorruptError: it is no such list.
        DataError: keys of the cache are no uids, or the cache has not all of the list's.
    """
    check_selection_path(out_path)
    cache = Cache(cache_path)
    wanted = _read_uids(uids_path)
    keys = cache.samples["key"].to_pylist()
    to_uids(keys)  # refuses a cache of other keys
    known = {(int(key[:16], 16), int(key[16:], 16)): row for row, key in enumerate(keys)}
    unknown = [uid for uid in wanted.tolist() if uid not in known]
    if unknown:
        first = f"{unknown[0][0]:016x}{unknown[0][1]:016x}"
        raise DataError(
            f"{len(unknown):,} of {len(wanted):,} uids of {uids_path} are no keys of {cache.path}, first {first}; "
            "give the cache that they were chosen from"
        )
    rows = np.array(sorted(known[uid] for uid in wanted.tolist()), np.int64)
    write_selection(
        out_path, cache, Selection(rows=rows, reasons=[REASON] * len(rows)), {"method": "uids", "from": str(uids_path)}
    )
    return len(rows)


def _modalities(image: Sequence[str], text: Sequence[str]) -> Mapping[str, Modality]:
    names = [*image, *text]
    if not names or len(set(names)) < len(names):
        raise SettingError(
            "name the arrays to import, each once, with --image-array and --text-array; DataComp has "
            "l14_img, b32_img, l14_txt and b32_txt"
        )
    return {name: "image" if name in image else "text" for name in names}


def _read_uids(path: Path) -> Array:
    """Read the uids that are in a list, each once."""
    with damage_named(path):
        try:
            found = np.load(path, allow_pickle=False)
        except ValueError as error:
            raise CorruptError(f"{path} is no array that NumPy wrote: {error}; get the file again") from error
    if not isinstance(found, np.ndarray) or found.dtype != np.dtype("u8,u8") or found.ndim != 1:
        kind = f"{found.dtype} shaped {found.shape}" if isinstance(found, np.ndarray) else "several arrays"
        raise DataError(f"{path} holds {kind}; a list of uids is one row of dtype u8,u8")
    return np.unique(found)
