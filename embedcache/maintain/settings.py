"""Settings of the commands that maintain a cache. Nothing heavy is imported here."""

from pathlib import Path

from embedcache.settings import Settings, setting


class RemoveSettings(Settings):
    """Settings of a removal: where else the samples are.

    Example:
        >>> settings = RemoveSettings(outputs=(Path("selection.txt"),))
        >>> embedcache.plan_removal("cache", "00003-zebra", settings).named
        {'selection.txt': 1}
    """

    indexes: tuple[Path, ...] = setting(
        (), "Index of the cache to remove the samples from. May be repeated.", flat_name="index", metavar="INDEX"
    )
    outputs: tuple[Path, ...] = setting(
        (),
        "Selection, list of keys, run, study or export to search for the samples: the command fails while one names "
        "them. May be repeated.",
        flat_name="check",
        metavar="PATH",
    )


class PruneSettings(Settings):
    """Settings of pruning: which features are deleted.

    Example:
        >>> settings = PruneSettings(features=("open_toy@flip",), modality="image")
        >>> [entry.name for entry in embedcache.plan_prune("cache", settings).entries]
        ['image/open_toy@flip']
    """

    features: tuple[str, ...] = setting(
        (),
        "Feature to delete, as encoder/feature, or encoder or encoder@view for all of its features. May be repeated.",
        flat_name="feature",
        metavar="NAME",
    )
    modality: str | None = setting(
        None, "Modality of the features.", default_text="the only one that has them", metavar="MODALITY"
    )
