"""embedcache inspect"""

from typing import Annotated

import typer


def inspect(cache: Annotated[str, typer.Argument(help="The cache, or its URL.")]) -> None:
    """Show what a cache holds, how complete it is, and why items failed."""
    from embedcache.cli.console import say, show_table
    from embedcache.store.cache import Cache, caption_error_lines, describe_cache, describe_feature, failure_lines

    opened = Cache(cache)
    for line in [describe_cache(opened), *caption_error_lines(opened)]:
        say(line)
    features = [feature for modality in ("image", "text") for feature in opened.features(modality)]
    if not features:
        say("no features yet: add some with embedcache extract")
        return
    show_table(
        ["feature", "modality", "shape", "dtype", "chunks", "failed", "bytes"],
        [describe_feature(feature) for feature in features],
    )
    for feature in features:
        say(f"{feature.name}: {feature.group.spec}")
        for line in failure_lines(opened, feature):
            say(line)
