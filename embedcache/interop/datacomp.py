"""Metadata of DataComp: `<hash>.parquet` beside `<hash>.npz`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from embedcache.encoders.base import Modality
from embedcache.errors import PathError, SettingError
from embedcache.interop.npy import open_npz
from embedcache.interop.vector_files import FileGroup, VectorImport


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


def _assign_modalities(images: Sequence[str], texts: Sequence[str]) -> Mapping[str, Modality]:
    names = [*images, *texts]
    if not names or len(set(names)) < len(names):
        raise SettingError(
            f"vectors: expected different arrays such as l14_img, b32_img, l14_txt and b32_txt, got "
            f"{', '.join(names) or 'none'}; name them with --image-array and --text-array"
        )
    return {name: "image" if name in images else "text" for name in names}
