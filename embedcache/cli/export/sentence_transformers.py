"""embedcache export sentence-transformers"""

from pathlib import Path
from typing import Annotated

import typer

from embedcache.cli.export.model_options import Metrics, Public, PushTo


def sentence_transformers(
    run: Annotated[Path, typer.Argument(help="The run.")],
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    metrics: Metrics = None,
    push_to_hub: PushTo = None,
    public: Public = False,
) -> None:
    """The text side as a sentence-transformers model."""
    from embedcache.cli.export.model_options import show
    from embedcache.export.export import export

    show(folder, export("sentence-transformers", run, folder, metrics=metrics, push_to=push_to_hub, is_public=public))
