"""Every setting of a sweep that does not stand in its space."""

from dataclasses import dataclass
from typing import Literal, TypeAlias

from embedcache.errors import SettingError

Sampler: TypeAlias = Literal["tpe", "random", "grid"]
Pruner: TypeAlias = Literal["none", "median", "hyperband"]


@dataclass(frozen=True, kw_only=True)
class SweepSettings:
    """How a space is searched.

    Args:
        num_trials: of the study, by all processes together; those that were pruned or failed count.
        sampler: `tpe` learns from the trials before, `random` does not, `grid` tries all that there is, shuffled.
        pruner: ends trials that lie behind: `median` below the others' median, `hyperband` by rounds; or `none`.
        seed: of the sampler. That of the training is a setting of the space.
        num_workers: processes of this machine. Others may work on the same study.
        num_seeds: how many seeds the best configurations are trained with again.
        top: how many configurations those are.
        storage: Optuna's storage by URL; None is a SQLite file in the study's folder.
    """

    num_trials: int = 50
    sampler: Sampler = "tpe"
    pruner: Pruner = "none"
    seed: int = 0
    num_workers: int = 1
    num_seeds: int = 3
    top: int = 3
    storage: str | None = None

    def __post_init__(self) -> None:
        counts = {
            "trials": self.num_trials,
            "workers": self.num_workers,
            "seeds": self.num_seeds,
            "top": self.top,
        }
        for name, value in counts.items():
            if value < 1:
                raise SettingError(f"{name} is {value}; it must be at least 1")
        if self.seed < 0:
            raise SettingError(f"seed is {self.seed}; it must be at least 0")
