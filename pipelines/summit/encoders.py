"""Encoders of points: the shape of their neighborhoods, and copies of arrays. Neither has a trained model.

`pipelines.summit.encoders:open_geometry:eigen` describes the nearest 8, 20 and 40 points, including the point itself.
The eigenvalues of their covariance tell lines, planes and scattered points apart (Weinmann et al. 2015, Semantic point
cloud interpretation based on optimal neighborhoods, relevant features and efficient classifiers). Coordinates are in
meters, and z points up.

`pipelines.summit.encoders:open_fields:fields` copies coordinates, labels and links between points and pixels into
features, which then have hashes, commits, failures and provenance like any other.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from scipy.spatial import cKDTree

from embedcache.arrays import Array, Floats
from embedcache.encoders.base import NO_WEIGHTS, Encoder, EncoderSettings, Fingerprint, ItemShape, Modality, check_names
from embedcache.encoders.open import EncoderSpec, check_modality, check_options
from embedcache.errors import ItemError
from embedcache.store.layout import Axis

GEOMETRY = "pipelines.summit.encoders:open_geometry:eigen"
FIELDS = "pipelines.summit.encoders:open_fields:fields"
"""Specs of both encoders."""
SCALES = (8, 20, 40)
"""Numbers of nearest points."""
CELL_SIZES_M = (2.0, 10.0)
"""Cells of the ground grids: the ground under a point is the lowest point of its cell and the eight around it."""
PER_SCALE = (
    "linearity (l1 - l2) / l1",
    "planarity (l2 - l3) / l1",
    "scattering l3 / l1",
    "surface variation l3 / (l1 + l2 + l3)",
    "verticality 1 - |z of the normal|",
    "log10 of the distance to the farthest neighbor plus 1 mm",
    "z range of the neighbors",
    "z above the mean of the neighbors",
)
"""Columns per scale, for the eigenvalues l1 >= l2 >= l3; the height above the ground follows, per cell size."""
_MAX_EXTENT_M = 1e6
_POINTS_PER_BLOCK = 16_384


def open_geometry(spec: EncoderSpec, *, modality: Modality, settings: EncoderSettings) -> Encoder:
    """Open the encoder of point neighborhoods."""
    check_options(spec, ())
    check_modality(spec, modality, "points")
    return _Geometry(spec.family, batch_size=settings.batch_size or 8)


def eigen_features(xyz_N3: Array) -> Floats:
    """Compute the features of each point: (N, 26) float32.

    Reordered points have the same features, reordered, up to rounding, unless neighbors are equally far. Memory: 1 kB
    per point for 40 neighbors, in blocks of 16,384 points.

    Args:
        xyz_N3: finite coordinates in meters; at least as many points as the largest scale.
    """
    xyz_N3 = np.asarray(xyz_N3, np.float64)
    tree = cKDTree(xyz_N3)
    features_ND = np.empty((len(xyz_N3), len(PER_SCALE) * len(SCALES) + len(CELL_SIZES_M)))

    # The neighbors of all points of a cloud would not fit into memory.
    for start in range(0, len(xyz_N3), _POINTS_PER_BLOCK):
        rows = slice(start, start + _POINTS_PER_BLOCK)
        distances_BK, neighbors_BK = tree.query(xyz_N3[rows], k=max(SCALES))
        for number, size in enumerate(SCALES):
            columns = slice(number * len(PER_SCALE), (number + 1) * len(PER_SCALE))
            neighbors_BK3 = xyz_N3[neighbors_BK[:, :size]]
            features_ND[rows, columns] = _shape(xyz_N3[rows], neighbors_BK3, distances_BK[:, size - 1])

    for column, size_m in enumerate(CELL_SIZES_M, start=len(PER_SCALE) * len(SCALES)):
        features_ND[:, column] = xyz_N3[:, 2] - _ground_height(xyz_N3, size_m)

    return features_ND.astype(np.float32)


def _shape(points_B3: Array, neighbors_BK3: Array, radius_B: Array) -> Array:
    """Return the columns `PER_SCALE` of a block of points."""
    offsets_BK3 = neighbors_BK3 - neighbors_BK3.mean(axis=1, keepdims=True)
    covariance_B33 = offsets_BK3.transpose(0, 2, 1) @ offsets_BK3 / neighbors_BK3.shape[1]

    # The eigenvectors come with ascending eigenvalues: the first one is the normal of a plane.
    values_B3, vectors_B33 = np.linalg.eigh(covariance_B33)

    l3, l2, l1 = np.maximum(values_B3, 0).T
    largest = np.where(l1 > 0, l1, 1)  # neighbors in one place have no shape, and get zeros
    z_BK = neighbors_BK3[:, :, 2]

    columns = (
        (l1 - l2) / largest,
        (l2 - l3) / largest,
        l3 / largest,
        l3 / np.where(l1 > 0, l1 + l2 + l3, 1),
        1 - np.minimum(np.abs(vectors_B33[:, 2, 0]), 1),
        np.log10(radius_B + 1e-3),
        z_BK.max(axis=1) - z_BK.min(axis=1),
        points_B3[:, 2] - z_BK.mean(axis=1),
    )
    return np.stack(columns, axis=1)


def _ground_height(xyz_N3: Array, cell_m: float) -> Array:
    """Return the lowest z in the cell of each point and the eight cells around it: (N,)."""
    cells_N2 = np.floor((xyz_N3[:, :2] - xyz_N3[:, :2].min(axis=0)) / cell_m).astype(np.int64) + 1
    stride = int(cells_N2[:, 1].max()) + 2
    cells_F, cell_N = np.unique(cells_N2[:, 0] * stride + cells_N2[:, 1], return_inverse=True)

    lowest_F = np.full(len(cells_F), np.inf)

    # `lowest_F[cell_N] = ...` would keep only one point of each cell.
    np.minimum.at(lowest_F, cell_N, xyz_N3[:, 2])

    # Cells are numbered row by row with an empty margin, so that a neighbor is at a fixed offset of the number.
    ground_F = lowest_F.copy()
    for offset in (row * stride + column for row in (-1, 0, 1) for column in (-1, 0, 1)):
        neighbor_F = np.minimum(np.searchsorted(cells_F, cells_F + offset), len(cells_F) - 1)
        is_occupied_F = cells_F[neighbor_F] == cells_F + offset
        ground_F = np.where(is_occupied_F, np.minimum(ground_F, lowest_F[neighbor_F]), ground_F)

    ground: Array = ground_F[cell_N]
    return ground


class _Geometry:
    modality: Modality = "points"

    def __init__(self, family: str, *, batch_size: int) -> None:
        self.features: Mapping[str, ItemShape] = {"points": (-1, len(PER_SCALE) * len(SCALES) + len(CELL_SIZES_M))}
        self.axes = {"points": Axis(kind="points")}
        self.batch_size = batch_size
        self.fingerprint = Fingerprint(
            family=family,
            model="eigen",
            weights=NO_WEIGHTS,
            preprocessing={"scales": list(SCALES), "columns": list(PER_SCALE), "cell_sizes_m": list(CELL_SIZES_M)},
            pooling={"points": "the columns of each scale, then the height above the ground, per cell size"},
            backend="numpy",
        )

    def prepare(self, items: Sequence[Any]) -> list[Array]:
        """Compute the features on the calling thread, so that `encode` does not wait for them."""
        return [eigen_features(self._check(item["xyz"])) for item in items]

    def encode(self, prepared: Sequence[Array], names: Sequence[str]) -> dict[str, list[Array]]:
        check_names(names, self.features)
        return {name: list(prepared) for name in names}

    def _check(self, xyz_N3: Array) -> Array:
        if len(xyz_N3) < max(SCALES):
            raise ItemError(f"too few points: expected at least {max(SCALES)}, got {len(xyz_N3)}")
        if not np.isfinite(xyz_N3).all():
            num_bad = np.count_nonzero(~np.isfinite(xyz_N3).all(axis=1))
            raise ItemError(f"{num_bad} of {len(xyz_N3)} points have NaN or infinite coordinates")

        # Squares of large offsets would lose the millimeters in the covariance.
        extent = float(np.ptp(xyz_N3.astype(np.float64), axis=0).max())
        if extent > _MAX_EXTENT_M:
            raise ItemError(f"points extend over {extent:.3g} m: expected at most 1,000 km; coordinates are in meters")
        return xyz_N3


_WIDTHS = {"xyz": 3, "uv": 2, "label": 1}
_DTYPES = {"xyz": "float32", "uv": "float32", "label": "int16"}


def open_fields(spec: EncoderSpec, *, modality: Modality, settings: EncoderSettings) -> Encoder:
    """Open the encoder that copies the arrays `xyz`, `uv` and `label`, one row per point."""
    check_options(spec, ())
    check_modality(spec, modality, "points")
    return _Fields(spec.family, batch_size=settings.batch_size or 32)


class _Fields:
    modality: Modality = "points"

    def __init__(self, family: str, *, batch_size: int) -> None:
        self.features: Mapping[str, ItemShape] = {name: (-1, width) for name, width in _WIDTHS.items()}
        self.defaults = tuple(_WIDTHS)
        self.dtypes = _DTYPES
        self.axes = dict.fromkeys(_WIDTHS, Axis(kind="points"))
        self.batch_size = batch_size
        self.fingerprint = Fingerprint(
            family=family,
            model="fields",
            weights=NO_WEIGHTS,
            preprocessing={},
            pooling={name: f"a copy, {width} columns of {_DTYPES[name]}" for name, width in _WIDTHS.items()},
            backend="numpy",
        )

    def prepare(self, items: Sequence[Any]) -> list[Array]:
        """Return one structured array per item, with a row per point and the arrays as its columns."""
        return [self._copy(item) for item in items]

    def encode(self, prepared: Sequence[Array], names: Sequence[str]) -> dict[str, list[Array]]:
        check_names(names, self.features)
        return {name: [np.ascontiguousarray(rows[name]) for rows in prepared] for name in names}

    def _copy(self, item: Mapping[str, Array]) -> Array:
        # One record per point travels through the workers as a single array.
        kinds = [(name, _DTYPES[name], (width,)) for name, width in _WIDTHS.items()]
        rows = np.empty(len(item["xyz"]), np.dtype(kinds))

        for name, width in _WIDTHS.items():
            if name not in item:
                raise ItemError(f"no array {name!r}: found {', '.join(sorted(item))}")
            values = item[name][:, None] if item[name].ndim == 1 else item[name]
            if values.shape != (len(rows), width):
                raise ItemError(f"array {name!r}: expected {width} columns, got shape {item[name].shape}")
            if not np.isfinite(values).all():
                raise ItemError(f"array {name!r}: NaN or infinity")
            rows[name] = values
        return rows
