"""Metadata of DataComp: `<hash>.parquet` beside `<hash>.npz`."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from embedcache.encoders.base import Modality
from embedcache.errors import PathError, SettingError
from embedcache.files import one_or_many
from embedcache.interop.exporting import IMAGES_AND_TEXTS
from embedcache.interop.npy import open_npy
from embedcache.interop.vector_files import FileGroup, VectorImport
from embedcache.modalities import MODALITIES


def open_datacomp(path: Path, *, arrays: Mapping[str, str | Sequence[str]]) -> VectorImport:
    """Open a folder of DataComp's metadata, whose files are read in the order of their names.

    Args:
        path: the folder.
        arrays: modality, image or text -> array or arrays in the `.npz`, such as `l14_img`.

    Raises:
        SettingError: no array is named, one is named twice, or of another modality.
        PathError: a file does not exist, or lacks its counterpart.
        UnknownNameError: an `.npz` has no such array.
        DataError: files that belong together differ in their rows.
    """
    modalities = _assign_modalities(arrays)
    tables, vectors = ({file.stem: file for file in sorted(path.glob(f"*.{suffix}"))} for suffix in ("parquet", "npz"))
    if not vectors:
        raise PathError(f"{path}: expected DataComp's metadata, NAME.parquet and NAME.npz, got no .npz file")
    unpaired = sorted(tables.keys() ^ vectors.keys())
    if unpaired:
        stem = unpaired[0]
        exists, missing = ("parquet", "npz") if stem in tables else ("npz", "parquet")
        raise PathError(
            f"{path} has {stem}.{exists} and no {stem}.{missing} ({len(tables)} .parquet, {len(vectors)} .npz); get "
            "the folder again"
        )
    groups = [
        FileGroup(vectors={name: open_npy(file, name) for name in modalities}, table=tables[stem])
        for stem, file in vectors.items()
    ]
    return VectorImport(form="datacomp", path=path, modalities=modalities, groups=groups)


def _assign_modalities(arrays: Mapping[str, str | Sequence[str]]) -> Mapping[str, Modality]:
    """Return array -> modality of its vectors."""
    assigned: dict[str, Modality] = {}
    for modality, names in arrays.items():
        for name in one_or_many(names):
            if modality not in IMAGES_AND_TEXTS or name in assigned:
                raise SettingError(f"arrays: expected different arrays of image or text vectors, got {modality}={name}")
            assigned[str(name)] = MODALITIES[modality].name
    if not assigned:
        raise SettingError("arrays: expected one such as l14_img, got none; name one with --array image=l14_img")
    return assigned
