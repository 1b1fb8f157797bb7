"""embedcache export transformers"""

from pathlib import Path
from typing import Annotated

import typer

from embedcache.cli.export.model_options import Metrics, Public, PushTo


def transformers(
    run: Annotated[Path, typer.Argument(help="The run.")],
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    metrics: Metrics = None,
    push_to_hub: PushTo = None,
    public: Public = False,
) -> None:
    """A model folder that transformers opens: AutoModel, AutoProcessor, AutoTokenizer."""
    from embedcache.cli.export.model_options import show
    from embedcache.export.export import export

    show(folder, export("transformers", run, folder, metrics=metrics, push_to=push_to_hub, is_public=public))
