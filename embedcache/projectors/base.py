"""Projectors by name, from a plug-in and in closed form, and the projection of items by a tower.

A projector is a `torch.nn.Module`. `embedcache.testing.projectors` has the tests that a plug-in must pass. torch is
imported when items are projected.

The closed forms are linear. They are computed with NumPy and SciPy in float64, in one pass over the data. Each maps the
second moments of aligned rows of two features, x (N, D) and y (N, E), to one matrix per feature.
"""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import scipy

from embedcache.arrays import Floats, Inputs, blocks, check_finite, normalize
from embedcache.errors import DataError, SettingError
from embedcache.processes import announce_device, threads_for
from embedcache.progress import NullProgress, Progress
from embedcache.registry import Registry, bind

if TYPE_CHECKING:
    from torch import Tensor

    from embedcache.modeling.heads import AnyTower

_BLOCK = 8192

_PRESETS = {"openclip-mlp": "openclip-mlp-image+openclip-mlp-text"}

PROJECTORS = Registry(
    "projector",
    {
        "asif": "embedcache.modeling.heads:AsifProjector",
        "cls_token": "embedcache.modeling.heads:ClsTokenProjector",
        "fusemix": "embedcache.modeling.heads:FuseMixProjector",
        "glu": "embedcache.modeling.heads:GluProjector",
        "identity": "embedcache.modeling.heads:IdentityProjector",
        "linear": "embedcache.modeling.heads:LinearProjector",
        "mlp": "embedcache.modeling.heads:MlpProjector",
        "openclip-linear": "embedcache.modeling.heads:OpenClipLinear",
        "openclip-mlp-image": "embedcache.modeling.heads:OpenClipImageMlp",
        "openclip-mlp-text": "embedcache.modeling.heads:OpenClipTextMlp",
        "sharelock": "embedcache.modeling.heads:ShareLockProjector",
        "token": "embedcache.modeling.heads:MeanTokenProjector",
        "token_mlp": "embedcache.modeling.heads:TokenMlpProjector",
    },
    group="embedcache.projectors",
    presets=_PRESETS,
    arguments=2,
    has_parameters=True,
)

Matrix = npt.NDArray[np.float64]


def split_names(names: str) -> tuple[str, str]:
    """Return the projectors of both towers. A name without `+` names both.

    Example:
        >>> split_names("glu"), split_names("identity+mlp:hidden=1024")
        (('glu', 'glu'), ('identity', 'mlp:hidden=1024'))
    """
    first, _, second = _PRESETS.get(names, names).partition("+")
    return first, second or first


def has_token_input(projector: str) -> bool:
    """Return whether the projector of this name maps token sequences.

    Example:
        >>> has_token_input("cls_token"), has_token_input("mlp")
        (True, False)
    """
    return bool(getattr(PROJECTORS.load(projector), "has_token_input", False))


def bind_projector(projector: str) -> partial[Any]:
    """Return the class of a projector, bound to the parameters in its name, such as `mlp:hidden=1024`.

    Raises:
        UnknownNameError: there is no projector of that name, or it has no such parameter.
        SettingError: a parameter is of another type.

    Example:
        >>> build = bind_projector("mlp:hidden=1024")
        >>> build(384, 256).output
        Linear(in_features=1024, out_features=256, bias=False)
    """
    # The tower sets the dropout of token projectors, from a setting.
    tower_parameters = ("dropout",) if has_token_input(projector) else ()
    return bind(PROJECTORS, projector, given=tower_parameters)


class Projector(Protocol):
    """A projector of one vector per item, built as `Projector(input_width, output_width)`.

    Its input is scaled to length 1 and centered. A class with the attribute `has_raw_input = True` instead gets vectors
    as the encoder returned them, divided by one number. In training, the tower applies dropout to the input.

    Example:
        >>> import torch
        >>> from embedcache.modeling.heads import LinearProjector
        >>> projector: Projector = LinearProjector(384, 256)
        >>> projector(torch.zeros(2, 384)).shape
        torch.Size([2, 256])
    """

    def __call__(self, vectors_BD: "Tensor") -> "Tensor":
        """Project a batch: (B, D) float32 -> (B, P) float32."""
        ...


class TokenProjector(Protocol):
    """A projector of token features, built as `TokenProjector(input_width, output_width, dropout=0.1)`.

    The tower passes tokens as the encoder returned them, so the projector normalizes them and applies the dropout.

    Example:
        >>> import torch
        >>> from embedcache.modeling.heads import MeanTokenProjector
        >>> projector: TokenProjector = MeanTokenProjector(384, 256)
        >>> projector(torch.zeros(2, 7, 384), torch.tensor([7, 3])).shape
        torch.Size([2, 256])
    """

    has_token_input: ClassVar[bool] = True

    def __call__(self, tokens_BTD: "Tensor", lengths_B: "Tensor | None") -> "Tensor":
        """Project a batch to (B, P) float32.

        Args:
            tokens_BTD: float32; values after the last token of an item are padding and must not matter.
            lengths_B: int64 number of tokens of each item, at least 1. If None, every item has T tokens.
        """
        ...


@runtime_checkable
class HasLinearBranch(Protocol):
    """A projector that can be initialized with a closed form.

    Example:
        >>> from embedcache.modeling.heads import GluProjector, MlpProjector
        >>> isinstance(MlpProjector(8, 4), HasLinearBranch), isinstance(GluProjector(8, 4), HasLinearBranch)
        (True, False)
    """

    def set_linear_map(self, weights_DP: "Tensor") -> None:
        """Make the projector compute x @ weights, up to float32 rounding."""
        ...


@runtime_checkable
class HasAnchors(Protocol):
    """A projector that describes an item by its similarities to the items of some training pairs."""

    def set_anchors(self, anchors_PD: "Tensor") -> None:
        """Set the (P, D) anchor vectors; row j of both towers comes from the same training pair."""
        ...


def project(
    tower: "AnyTower",
    inputs: Inputs,
    *,
    device: str = "cpu",
    width: int | None = None,
    progress: Progress | None = None,
) -> Floats:
    """Project N items of any float dtype, block by block: (N, P) float32, rows of length 1.

    Args:
        tower: the tower.
        inputs: the items.
        device: device of the tower.
        width: P, the first components to keep before rows are scaled to length 1 (all if None).
        progress: a step that advances by the items.

    Raises:
        DataError: a value is NaN or infinite after projection.

    Example:
        >>> from embedcache.modeling.heads import IdentityProjector, Tower
        >>> tower = Tower(IdentityProjector(2, 2), 2, 2)
        >>> project(tower, Inputs(np.array([[3.0, 4.0], [0.0, 2.0]])))
        array([[0.6, 0.8],
               [0. , 1. ]], dtype=float32)
    """
    import torch

    announce_device(device)
    progress = progress or NullProgress()

    # The empty part gives the result its shape if there are no items.
    parts_BP = [np.empty((0, width or tower.output_width), np.float32)]
    num_tokens = inputs.values.shape[1] if inputs.values.ndim == 3 else 1
    with torch.inference_mode():
        for block in blocks(len(inputs.values), max(1, _BLOCK // num_tokens)):
            part = inputs.take(block)
            # torch warns about read-only arrays, which chunks of a cache are.
            values = torch.from_numpy(np.require(part.values, np.float32, ["W"])).to(device)
            lengths = None if part.lengths is None else torch.from_numpy(part.lengths).to(device)

            parts_BP.append(tower(values, lengths)[:, :width].float().cpu().numpy())
            progress.advance(len(parts_BP[-1]))

    projected_NP = np.concatenate(parts_BP)
    check_finite(projected_NP, "the projected feature")
    return normalize(projected_NP)


def solve(name: str, moments: "Moments", width: int, *, shrinkage: float) -> tuple[Matrix, Matrix]:
    """Solve the closed form `cca`, `csa`, `procrustes` or `ridge` of training pairs.

    Args:
        name: name of the form.
        moments: moments of the training pairs.
        width: P; directions beyond the rank of the solution are zero.
        shrinkage: regularization in units of the mean eigenvalue; use more for fewer pairs.

    Returns:
        The matrices of both features, (D, P) and (E, P) float64.

    Raises:
        SettingError: the shrinkage is not above 0.
        DataError: there are fewer than two pairs.

    Example:
        >>> moments = Moments(2, 2)
        >>> x = np.random.default_rng(0).normal(size=(100, 2))
        >>> moments.add(x, x[:, ::-1])  # the second feature has the columns of the first in the other order
        >>> first, second = solve("procrustes", moments, 2, shrinkage=0.1)
        >>> np.allclose(x @ first, x[:, ::-1] @ second)
        True
    """
    if shrinkage <= 0:
        raise SettingError(f"shrinkage: expected a number above 0, got {shrinkage}")
    forms = {"cca": cca, "csa": _csa, "procrustes": _procrustes, "ridge": ridge}
    widest = max(moments.first_width, moments.second_width)

    # Small matrices are factored faster by one thread than by several.
    with threads_for(2 * widest**3):
        return forms[name](moments, width, shrinkage=shrinkage)


class Covariances(NamedTuple):
    """Covariances of two features.

    Args:
        first: (D, D) float64, covariance of the first feature.
        second: (E, E) float64, covariance of the second feature.
        cross: (D, E) float64, covariance of the first with the second.
    """

    first: Matrix
    second: Matrix
    cross: Matrix


@dataclass
class Moments:
    """Sums over aligned rows of two features, or over the rows of one, from which means and covariances follow.

    The result does not depend on how rows are divided into batches, up to float64 rounding. Memory: three matrices of
    (D + E)² numbers.

    Args:
        first_width: D.
        second_width: E; 0 if there is only one feature.

    Example:
        >>> moments = Moments(1, 1)
        >>> moments.add(np.array([[1.0], [3.0]]), np.array([[10.0], [30.0]]))
        >>> float(moments.first_mean[0]), float(moments.covariances().cross[0, 0])
        (2.0, 10.0)
    """

    first_width: int
    second_width: int = 0

    def __post_init__(self) -> None:
        self.num_rows: float = 0
        # Few rows are stored: they are decomposed faster than their covariances.
        self._few: list[Matrix] | None = []
        self._sum = np.zeros(self.first_width + self.second_width)
        self._products = np.zeros((len(self._sum), len(self._sum)))

    def add(self, first_BD: npt.NDArray[np.floating], second_BE: npt.NDArray[np.floating] | None = None) -> None:
        """Add aligned rows of any float dtype: two arrays of equal length, or one array if there is one feature.

        Raises:
            DataError: a value is NaN or infinite.
        """
        second_BE = first_BD[:, :0] if second_BE is None else second_BE
        rows = np.concatenate([first_BD, second_BE], axis=1, dtype=np.float64)
        check_finite(rows, "the training pairs")

        self.num_rows += len(rows)
        self._sum += rows.sum(axis=0)
        self._products += rows.T @ rows
        if self._few is not None:
            is_few = 2 * self.num_rows < max(self.first_width, self.second_width)
            self._few = [*self._few, rows] if is_few else None

    def add_population(self, other: "Moments", weight: float) -> None:
        """Add the rows of another population, moved so that their mean is the present one.

        Args:
            other: moments of features of the same widths.
            weight: number of rows that one row of the other population counts as.
        """
        count = weight * other.num_rows
        mean = self._mean
        deviations = other._products - other.num_rows * np.outer(other._mean, other._mean)

        self._products += weight * deviations + count * np.outer(mean, mean)
        self._sum += count * mean
        self.num_rows += count
        self._few = None

    @property
    def first_mean(self) -> Matrix:
        """(D,) mean of the rows of the first feature."""
        return self._mean[: self.first_width]

    @property
    def second_mean(self) -> Matrix:
        """(E,) mean of the rows of the second feature."""
        return self._mean[self.first_width :]

    def centered_rows(self) -> tuple[Matrix, Matrix] | None:
        """Return the rows of both features less their means, or None if they are more than half of the larger width.

        The singular value decomposition of so few rows yields the eigenvalues of the covariances in a fraction of the
        time.
        """
        if not self._few or self.num_rows < 2:
            return None
        rows = np.concatenate(self._few) - self._mean
        return rows[:, : self.first_width], rows[:, self.first_width :]

    def covariances(self) -> Covariances:
        """Compute the covariances of both features.

        Raises:
            DataError: there are fewer than two rows.
        """
        if self.num_rows < 2:
            raise DataError(f"expected at least 2 pairs to fit a projector, got {self.num_rows}; add training samples")

        covariance = self._products / self.num_rows - np.outer(self._mean, self._mean)
        first = slice(self.first_width)
        second = slice(self.first_width, None)
        return Covariances(covariance[first, first], covariance[second, second], covariance[first, second])

    @property
    def _mean(self) -> Matrix:
        return self._sum / max(self.num_rows, 1)


def cca(moments: Moments, width: int, *, shrinkage: float) -> tuple[Matrix, Matrix]:
    """Solve regularized canonical correlation analysis, with each direction weighted by its correlation.

    With whiteners Wx = (Sxx + s mean(eig Sxx) I)^-1/2 and Wy from Syy, and U diag(r) V' the singular value
    decomposition of Wx Sxy Wy, the projectors are Wx U diag(r) and Wy V diag(r). The method is from Hotelling,
    "Relations between two sets of variates" (1936). The weighting is our choice; `csa` has a weaker one.

    Example:
        >>> moments = Moments(3, 2)
        >>> x = np.random.default_rng(0).normal(size=(100, 3))
        >>> moments.add(x, x[:, :2])
        >>> first, second = cca(moments, 2, shrinkage=1e-6)
        >>> np.allclose(first[2], 0, atol=1e-3)  # nothing in the second feature corresponds to the third column
        True
    """
    return _canonical(moments, width, shrinkage=shrinkage, power=1.0)


def _csa(moments: Moments, width: int, *, shrinkage: float) -> tuple[Matrix, Matrix]:
    """Solve canonical similarity analysis, in which inner products weight a direction by its correlation once.

    The projectors are Wx U diag(r)^1/2 and Wy V diag(r)^1/2 with the symbols of `cca`. CSA, "Canonical Similarity
    Analysis" (ICLR 2025), normalizes vectors before the weighting. Here they are normalized after it.
    """
    return _canonical(moments, width, shrinkage=shrinkage, power=0.5)


def ridge(moments: Moments, width: int, *, shrinkage: float) -> tuple[Matrix, Matrix]:
    """Solve ridge regression of the second feature on the first.

    The first projector is (Sxx + s mean(eig Sxx) I)^-1 Sxy. Both sides are then rotated onto the principal axes of the
    second feature, which changes no cosine unless the shared space is narrower than that feature.

    Example:
        >>> moments = Moments(3, 1)
        >>> x = np.random.default_rng(0).normal(size=(100, 3))
        >>> moments.add(x, x[:, :1] - x[:, 1:2])
        >>> first, second = ridge(moments, 1, shrinkage=1e-6)
        >>> np.allclose(first * second, [[1], [-1], [0]], atol=1e-3)
        True
    """
    first, second, cross = moments.covariances()
    penalty = shrinkage * np.trace(first) / len(first)
    weights = scipy.linalg.solve(first + penalty * np.eye(len(first)), cross, assume_a="pos")

    # The strongest axes come first, so that a narrower space drops the weakest.
    _, axes = scipy.linalg.eigh(second)
    axes = axes[:, ::-1][:, :width]
    return _pad(weights @ axes, width), _pad(axes, width)


def _procrustes(moments: Moments, width: int, *, shrinkage: float) -> tuple[Matrix, Matrix]:
    """Solve orthogonal Procrustes, the rotation that brings the centered rows of each pair closest together.

    With U diag(s) V' the singular value decomposition of Sxy, the usual rotation is U V'. Here x is rotated by U and y
    by V, so that the strongest directions come first. Schönemann, "A generalized solution of the orthogonal Procrustes
    problem" (1966). The shrinkage is unused.
    """
    del shrinkage
    left, _, right = scipy.linalg.svd(moments.covariances().cross, full_matrices=False)
    rank = min(width, len(right))
    return _pad(left[:, :rank], width), _pad(right[:rank].T, width)


def _canonical(moments: Moments, width: int, *, shrinkage: float, power: float) -> tuple[Matrix, Matrix]:
    """Solve `cca` or `csa`, with each direction weighted by a power of its correlation."""
    rows = moments.centered_rows()
    if rows is not None:
        return _thin_canonical(*rows, width, shrinkage=shrinkage, power=power)

    first, second, cross = moments.covariances()
    whiten_x = _whitener(first, shrinkage)
    whiten_y = _whitener(second, shrinkage)
    left, correlation, right = scipy.linalg.svd(whiten_x @ cross @ whiten_y, full_matrices=False)
    rank = min(width, len(correlation))
    weights = correlation[:rank] ** power
    return (
        _pad(whiten_x @ left[:, :rank] * weights, width),
        _pad(whiten_y @ right[:rank].T * weights, width),
    )


def _thin_canonical(
    first_ND: Matrix, second_NE: Matrix, width: int, *, shrinkage: float, power: float
) -> tuple[Matrix, Matrix]:
    """Solve as `_canonical` in the spaces of the rows, at most N wide, outside of which the solution is zero."""
    first_NK, whiten_DK = _whiten_rows(first_ND, shrinkage)
    second_NK, whiten_EK = _whiten_rows(second_NE, shrinkage)

    left, correlation, right = scipy.linalg.svd(first_NK.T @ second_NK / len(first_ND), full_matrices=False)
    rank = min(width, len(correlation))
    weights = correlation[:rank] ** power
    return (
        _pad(whiten_DK @ left[:, :rank] * weights, width),
        _pad(whiten_EK @ right[:rank].T * weights, width),
    )


def _whiten_rows(rows_ND: Matrix, shrinkage: float) -> tuple[Matrix, Matrix]:
    """Return the whitened rows in the basis of their space, (N, K), and the map of any vector to them, (D, K)."""
    left, lengths, axes = scipy.linalg.svd(rows_ND, full_matrices=False)
    variances = lengths**2 / len(rows_ND)
    # The mean eigenvalue is over all D directions, although most have none.
    penalty = shrinkage * variances.sum() / rows_ND.shape[1] + np.finfo(np.float64).tiny
    scales = 1 / np.sqrt(variances + penalty)
    return left * (lengths * scales), axes.T * scales


def _whitener(covariance: Matrix, shrinkage: float) -> Matrix:
    """Return the symmetric inverse square root of a covariance with shrinkage."""
    values, vectors = scipy.linalg.eigh(covariance)
    # Rounding makes the eigenvalues of unused directions slightly negative.
    values = np.maximum(values, 0)
    scaled = vectors / np.sqrt(values + shrinkage * values.mean() + np.finfo(np.float64).tiny)
    whitener: Matrix = scaled @ vectors.T
    return whitener


def _pad(weights: Matrix, width: int) -> Matrix:
    """Append columns of zeros up to a width."""
    return np.pad(weights, ((0, 0), (0, width - weights.shape[1])))
