"""Settings of a sweep, apart from its search space."""

from typing import Literal, TypeAlias

from embedcache.settings import Settings, setting

Sampler: TypeAlias = Literal["tpe", "random", "grid"]
Pruner: TypeAlias = Literal["none", "median", "hyperband"]


class SweepSettings(Settings):
    """Settings of a sweep, which decide how a space is searched.

    Example:
        >>> settings = SweepSettings(sampler="grid", top_configs=1, seeds_per_config=1)
        >>> len(embedcache.sweep_projectors("cache", "study", "space.toml", settings=settings).trials)
        2
    """

    trials: int = setting(50, "Trials of the study, by all workers together; pruned and failed ones count.", ge=1)
    sampler: Sampler = setting(
        "tpe",
        "How settings are chosen: tpe learns from earlier trials, random does not, grid tries every combination in "
        "random order.",
    )
    pruner: Pruner = setting(
        "none", "Stop trials early that are below the median of the others, or by Hyperband's rounds."
    )
    seed: int = setting(0, "Random seed of the sampler.", ge=0, lt=2**32)
    workers: int = setting(
        1, "Worker processes on this machine; other machines may join the study.", ge=1, le=1024, affects_result=False
    )
    top_configs: int = setting(3, "Number of top configurations to retrain.", ge=1)
    seeds_per_config: int = setting(3, "Number of seeds each top configuration is retrained with.", ge=1)
    storage: str | None = setting(
        None,
        "Optuna storage, as postgresql://user:password@host/database.",
        metavar="URL",
        affects_result=False,
        default_text="SQLite in the study's folder",
    )
