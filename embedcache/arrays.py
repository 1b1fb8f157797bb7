"""Small array helpers. NumPy only.

Shape letters: a suffix such as `vectors_BP` names the axes of an array, in order. A number such as the 2 of `points_M2`
is a length. Every letter that the package uses:

    A  entries picked from a matrix of pairs             M  entries of a list: chosen rows, pairs, values of a statistic
    B  rows of a batch, block or tile                    N  items: rows of a feature
    C  candidates: items, classes or concepts            P  width of the shared space
    D  width of a stored feature                         Q  queries
    E  width of a second feature                         R  repetitions: runs, resamples or settings
    F  distinct values                                   S  samples
    G  groups                                            T  tokens of an item, or its frames
    H  height: rows of an image or grid                  U  rows of a block that are updated
    K  k of a method: nearest or best items, clusters    V  clusters that an item visits
    L  levels of a hierarchy                             W  width: columns of an image or grid
"""

import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from embedcache.errors import CorruptError, DataError, ItemError, one_line
from embedcache.registry import unknown_name

Array: TypeAlias = npt.NDArray[Any]
Floats: TypeAlias = npt.NDArray[np.float32]
Ints: TypeAlias = npt.NDArray[np.int64]
Bools: TypeAlias = npt.NDArray[np.bool_]


Products: TypeAlias = Callable[[Floats, Floats], Floats]
"""Function that computes the (Q, C) dot products of (Q, P) rows with (C, P) rows."""


def dot_products(left_QP: Floats, right_CP: Floats) -> Floats:
    """Compute the dot product of each left row with each right row: (Q, C).

    Example:
        >>> dot_products(np.eye(2, dtype=np.float32), np.array([[3, 4]], np.float32)).tolist()
        [[3.0], [4.0]]
    """
    products_QC: Floats = left_QP @ right_CP.T
    return products_QC


class Inputs(NamedTuple):
    """Inputs of a projector for B items: one vector each, or tokens.

    Args:
        values: (B, D), or (B, T, D) padded with zeros.
        lengths: (B,) number of tokens of each item. If None, each item has one vector, or T tokens.
    """

    values: Array
    lengths: Ints | None = None

    def take(self, rows: "slice | Ints") -> "Inputs":
        """Return some of the items."""
        return Inputs(self.values[rows], None if self.lengths is None else self.lengths[rows])


def normalize(vectors_ND: Array) -> Floats:
    """Scale each row, or one vector, to length 1: (..., D) any float -> (..., D) float32. A zero row stays zero.

    Example:
        >>> normalize(np.array([[3.0, 4.0], [0.0, 0.0]])).round(1).tolist()
        [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    vectors_ND = np.asarray(vectors_ND, np.float32)
    length_N1 = np.linalg.norm(vectors_ND, axis=-1, keepdims=True)

    # The smallest normal number in place of 0 keeps zero rows zero.
    unit_ND: Floats = vectors_ND / np.maximum(length_N1, np.finfo(np.float32).tiny)
    return unit_ND


def distinct(values_N: Array) -> Array:
    """Return the distinct values, none of them NaN, ascending: (F,).

    It is 70 times as fast as `np.unique` for integers, which NumPy 2.3 and later put in a hash table.

    Example:
        >>> distinct(np.array([7, 3, 7, 5])).tolist()
        [3, 5, 7]
    """
    sorted_N = np.sort(values_N)
    is_first_N = np.ones(len(sorted_N), bool)
    np.not_equal(sorted_N[1:], sorted_N[:-1], out=is_first_N[1:])
    return sorted_N[is_first_N]


def number_values(values_N: Ints) -> Ints:
    """Number the distinct values in order of first appearance: (N,) int64.

    Example:
        >>> number_values(np.array([7, 3, 7, 5])).tolist()
        [0, 1, 0, 2]
    """
    _, first_F, place_N = np.unique(values_N, return_index=True, return_inverse=True)

    # `np.unique` numbers values in ascending order.
    number_F = np.empty(len(first_F), np.int64)
    number_F[np.argsort(first_F)] = np.arange(len(first_F))
    return number_F[place_N]


def mean_directions(vectors_ND: Floats, groups_N: Ints, num_groups: int) -> Floats:
    """Compute the mean of each group of rows, scaled to length 1: (G, D) float32.

    For rows of length 1 this is prompt ensembling: normalize, mean, normalize. Sums are in float64. An empty group
    stays zero.

    Args:
        vectors_ND: (N, D) float32.
        groups_N: (N,) group of each row, from 0.
        num_groups: number of groups.

    Example:
        >>> mean_directions(np.eye(2, dtype=np.float32), np.array([1, 1]), 2).round(3).tolist()
        [[0.0, 0.0], [0.7070000171661377, 0.7070000171661377]]
    """
    sums_GD: Array = np.zeros((num_groups, vectors_ND.shape[1]), np.float64)
    np.add.at(sums_GD, groups_N, vectors_ND)
    return normalize(sums_GD)


def to_numbers(values: Any, name: str) -> Array:
    """Return a number, a sequence, an array or a tensor on any device as an array.

    Raises:
        DataError: the values are not numbers, or they are sequences of different lengths.

    Example:
        >>> to_numbers([[1, 2], [3, 4]], "rows").shape
        (2, 2)
    """
    # A tensor may require gradients, and NumPy does not have bfloat16.
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if str(values.dtype) == "torch.bfloat16" else values

    try:
        array = np.asarray(list(values) if isinstance(values, Iterator) else values)
    except (TypeError, ValueError) as error:
        raise DataError(f"{name}: expected numbers in an array, got an error: {one_line(error)}") from error
    if array.dtype.kind not in "fiub":
        first = next(iter(array.ravel().tolist()), None)
        raise DataError(
            f"{name}: expected floating-point numbers or integers of 64 bits, got values such as {first!r}; "
            "give an array or a tensor"
        )
    return array


def read_npy(path: Path) -> Array:
    """Read the numbers of a `.npy` file as they are stored.

    Raises:
        CorruptError: it is not a `.npy` file, or does not contain numbers.
    """
    try:
        values = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError, TypeError) as error:
        raise CorruptError(f"{path}: expected a .npy file of numbers, got an error: {one_line(error)}") from error
    if not isinstance(values, np.ndarray) or values.dtype.kind not in "fiub":
        got = str(values.dtype) if isinstance(values, np.ndarray) else "several arrays"
        raise CorruptError(f"{path}: expected a .npy file of numbers, got {got}")
    return values


def read_npz(file: BinaryIO, name: str | None = None, *, max_bytes: int) -> dict[str, Array]:
    """Read the arrays of an `.npz` file, by their names.

    No more than `max_bytes` are decoded. Stored and deflated arrays are decoded piece by piece, and end at the size
    that the directory of the file states, so a small file cannot fill the memory.

    Args:
        file: file that can be read at any position.
        name: the only array to read. If None, all.
        max_bytes: allowed sum of the sizes of these arrays.

    Raises:
        UnknownNameError: there is no array of that name.
        ItemError: the arrays are too large, or compressed by another method, such as bzip2 or LZMA.
        ValueError, zipfile.BadZipFile, zlib.error: the file is damaged, or has objects, which are pickled.
    """
    with zipfile.ZipFile(file) as archive:
        members = {}
        for entry in archive.infolist():
            if entry.filename.endswith(".npy"):
                members[entry.filename.removesuffix(".npy")] = entry
        if name is not None and name not in members:
            raise unknown_name("array", name, members)
        chosen = members if name is None else {name: members[name]}

        # Sizes are checked before anything is decoded.
        num_bytes = sum(entry.file_size for entry in chosen.values())
        if num_bytes > max_bytes:
            raise ItemError(f"too large: {num_bytes:,} bytes uncompressed, more than {max_bytes:,}")
        if any(entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for entry in chosen.values()):
            raise ItemError("unsupported compression: expected stored or deflated arrays; save them with np.savez")

        arrays = {}
        for name, entry in chosen.items():
            with archive.open(entry) as stream:
                arrays[name] = np.lib.format.read_array(stream, allow_pickle=False)
    return arrays


def to_rows(rows: Any) -> Ints:
    """Return one or several row numbers as an array: (M,) int64.

    Raises:
        DataError: they are not integers, or have more than one dimension.

    Example:
        >>> to_rows(7).tolist(), to_rows([3, 1]).tolist()
        ([7], [3, 1])
    """
    numbers = np.atleast_1d(to_numbers(rows, "rows"))
    if numbers.dtype.kind not in "iu" and numbers.size:
        flat = numbers.ravel()

        # The message shows the first number that is not whole, or else the first one.
        is_whole = np.zeros(len(flat), bool)
        if flat.dtype.kind == "f":
            is_whole = np.isfinite(flat) & (flat == np.floor(flat))
        raise DataError(f"rows: expected integers, got {flat[is_whole.argmin()]}; rows are counted from 0")
    if numbers.ndim > 1:
        raise DataError(f"rows: expected one or several numbers, got an array of shape {numbers.shape}")
    return numbers.astype(np.int64, copy=False)


def fit_integers(values: Array, dtype: str) -> Bools:
    """Return whether each value is a whole number in the range of an integer dtype: bool, in the same shape.

    Example:
        >>> fit_integers(np.array([1.0, 0.5, np.nan, 300.0]), "uint8").tolist()
        [True, False, False, False]
    """
    limits = np.iinfo(dtype)
    is_float = values.dtype.kind == "f"

    # float32 has no number between 2**31 - 128 and 2**31, so a limit would be rounded.
    if is_float:
        values = values.astype(np.float64)
    is_in_range: Bools = (values >= limits.min) & (values < limits.max + 1)
    return is_in_range & (values == np.floor(values)) if is_float else is_in_range


def check_finite(values: Array, name: str, *, rows: Ints | None = None) -> None:
    """Check that an array of any shape has no NaN or infinity.

    Args:
        values: the array.
        name: name of the array, for the message.
        rows: row numbers for the message. If None, rows are counted from 0.

    Raises:
        DataError: a row has NaN or infinity. It names the array, the number of such rows and the first of them.
    """
    is_bad = np.atleast_1d(~np.isfinite(values).all(axis=tuple(range(1, values.ndim))))
    if is_bad.any():
        first = int(np.flatnonzero(is_bad)[0] if rows is None else rows[is_bad][0])
        raise DataError(f"{name} holds NaN or infinity in {int(is_bad.sum())} of {len(is_bad)} rows, first row {first}")


_LAST_NUMBER = 2**32 - 1


def to_sort_keys(scores: Array, numbers: Array) -> Ints:
    """Encode scores and numbers as int64 that sort by score. Equal scores sort by descending number.

    So the largest keys have the highest scores and, among equal scores, the lowest numbers.

    Args:
        scores: float32 of any shape. -0.0 counts as 0.0.
        numbers: integers from 0 to 2^32 - 1, of the same shape.

    Example:
        >>> keys = to_sort_keys(np.float32([0.5, 0.9, 0.9]), np.array([0, 1, 2]))
        >>> np.argsort(-keys).tolist()
        [1, 2, 0]
    """
    assert not len(numbers) or numbers.max() <= _LAST_NUMBER

    # Adding 0 turns -0.0 into 0.0.
    bits = np.add(scores, 0, dtype=np.float32).view(np.int32)

    # The bits of a positive float, read as an integer, keep its order.
    keys: Ints = (_invert_negative(bits).astype(np.int64) << 32) | (_LAST_NUMBER - numbers)
    return keys


def from_sort_keys(keys: Ints) -> tuple[Floats, Ints]:
    """Decode scores, float32, and numbers, int64, from sort keys.

    Example:
        >>> scores, numbers = from_sort_keys(to_sort_keys(np.float32([-0.5]), np.array([7])))
        >>> scores.tolist(), numbers.tolist()
        ([-0.5], [7])
    """
    bits = _invert_negative((keys >> 32).astype(np.int32))
    return bits.view(np.float32), _LAST_NUMBER - (keys & _LAST_NUMBER)


def _invert_negative(bits: Array) -> Array:
    """Invert the bits of negative int32 numbers except for the sign. This orders the bits of negative floats."""
    inverted: Array = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return inverted


def concatenated_ranges(starts: Ints, counts: Ints) -> tuple[Ints, Ints]:
    """List the numbers of several ranges, one range after another.

    Args:
        starts: (G,) first number of each range.
        counts: (G,) length of each range.

    Returns:
        (M,) int64 position of the range of each number, and (M,) int64 numbers.

    Example:
        >>> places, numbers = concatenated_ranges(np.array([7, 2]), np.array([2, 1]))
        >>> places.tolist(), numbers.tolist()
        ([0, 0, 1], [7, 8, 2])
    """
    place_M = np.repeat(np.arange(len(starts)), counts)
    offset_G = np.cumsum(counts) - counts
    return place_M, starts[place_M] + np.arange(len(place_M)) - offset_G[place_M]


def blocks(num_rows: int, size: int) -> Iterator[slice]:
    """Iterate over consecutive slices of `size` of `num_rows` rows. The last may be shorter.

    Example:
        >>> list(blocks(5, 3))
        [slice(0, 3, None), slice(3, 5, None)]
    """
    for start in range(0, num_rows, size):
        yield slice(start, min(start + size, num_rows))
