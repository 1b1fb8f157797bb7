"""embedcache export onnx"""

from pathlib import Path
from typing import Annotated

import typer

from embedcache.cli.export.model_options import Metrics, Public, PushTo


def onnx(
    run: Annotated[Path, typer.Argument(help="The run.")],
    folder: Annotated[Path, typer.Argument(help="A new folder.")],
    towers: Annotated[bool, typer.Option("--towers", help="With the encoders inside.")] = False,
    metrics: Metrics = None,
    push_to_hub: PushTo = None,
    public: Public = False,
) -> None:
    """ONNX graphs of the projectors, or of the whole towers."""
    from embedcache.cli.export.model_options import show
    from embedcache.export.export import export

    show(folder, export("onnx", run, folder, metrics=metrics, push_to=push_to_hub, is_public=public, towers=towers))
