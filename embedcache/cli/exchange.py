"""embedcache exchange"""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(help="Use a run in other tools.", no_args_is_help=True, rich_markup_mode=None)


@app.callback()
def exchange() -> None:
    """Use a run in other tools."""


@app.command(name="clip-benchmark", context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def clip_benchmark(
    context: typer.Context,
    run: Annotated[Path, typer.Argument(help="The run.")],
) -> None:
    """Evaluate a run with CLIP_benchmark: its own code, datasets and options.

    All that follows the run is for CLIP_benchmark, such as --dataset cifar10 --dataset_root data/;
    `clip_benchmark eval --help` lists it.
    """
    from embedcache.interop.clip_benchmark import evaluate

    evaluate(run, context.args)
