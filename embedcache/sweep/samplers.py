"""Optuna's words for a space, and its samplers and pruners by name."""

import itertools
import warnings
from typing import TypeAlias

import numpy as np
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import ExperimentalWarning
from optuna.pruners import BasePruner, HyperbandPruner, MedianPruner, NopPruner
from optuna.samplers import BaseSampler, RandomSampler, TPESampler

from embedcache.errors import SettingError
from embedcache.sweep.settings import Pruner, Sampler, SweepSettings
from embedcache.sweep.space import Range, Space, Value

Params: TypeAlias = dict[str, Value]

_MOST_POINTS = 100_000


def distributions(space: Space) -> dict[str, BaseDistribution]:
    """Give each swept setting's distribution."""
    return {
        name: _of_range(over) if isinstance(over, Range) else CategoricalDistribution(over)
        for name, over in space.ranges.items()
    }


def _of_range(over: Range) -> BaseDistribution:
    if over.is_whole:
        return IntDistribution(int(over.low), int(over.high), log=over.log, step=int(over.step or 1))
    return FloatDistribution(over.low, over.high, log=over.log, step=over.step)


def make_sampler(name: Sampler, *, seed: int, draw: int) -> BaseSampler:
    """Make the sampler of one draw.

    It is seeded by the study's seed and the draw's number, so that the same is drawn whichever process asks, and after
    however many restarts.

    Args:
        name: of the sampler.
        seed: of the study.
        draw: how many were drawn before.
    """
    of_draw = int(np.random.SeedSequence([seed, draw]).generate_state(1)[0])
    if name != "tpe":
        return RandomSampler(seed=of_draw)  # which draws nothing of a grid: its points are given
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # as Optuna 4 calls `constant_liar`
        return TPESampler(seed=of_draw, constant_liar=True)  # which counts in what other processes are at


def make_pruner(name: Pruner, *, most_epochs: int) -> BasePruner:
    """Make a pruner; the steps of trials are epochs, from 1. The start counts for nothing: random ones begin below."""
    if name == "median":
        return MedianPruner(n_startup_trials=5, n_warmup_steps=1 + most_epochs // 5)
    if name == "hyperband":
        return HyperbandPruner(min_resource=1, max_resource=max(1, most_epochs))
    return NopPruner()


def grid_points(space: Space, settings: SweepSettings) -> list[Params] | None:
    """List all that a space holds, shuffled, so that the first few are spread over it; None for another sampler.

    Raises:
        SettingError: a range without steps has no end of values, or there are more than 100,000 points.
    """
    if settings.sampler != "grid":
        return None
    values = {name: _values(name, over) for name, over in space.ranges.items()}
    num_points = int(np.prod([len(values_V) for values_V in values.values()], dtype=np.float64))
    if num_points > _MOST_POINTS:
        raise SettingError(
            f"the grid has {num_points:,} points, of at most {_MOST_POINTS:,}; name fewer values, or use --sampler tpe"
        )
    points = [dict(zip(values, point, strict=True)) for point in itertools.product(*values.values())]
    return [points[place] for place in np.random.default_rng(settings.seed).permutation(len(points))]


def _values(name: str, over: Range | tuple[Value, ...]) -> tuple[Value, ...]:
    if not isinstance(over, Range):
        return over
    step = over.step or (1 if over.is_whole and not over.log else None)
    if step is None:
        raise SettingError(
            f"--sampler grid: {name} is a range without steps; give it a step, or choices such as "
            f"{name} = [{over.low}, {over.high}]"
        )
    return tuple(over.low + number * step for number in range(round((over.high - over.low) / step) + 1))
