"""embedcache evaluate probe"""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

from embedcache.errors import SettingError


def probe(
    cache: Annotated[str, typer.Argument(help="The cache, or its URL.")],
    image: Annotated[str | None, typer.Option(help="An image feature, encoder/feature.")] = None,
    text: Annotated[str | None, typer.Option(help="A text feature instead.")] = None,
    label: Annotated[str, typer.Option(help="Column of the samples that holds the labels.")] = "label",
    method: Annotated[
        list[str] | None, typer.Option(help="knn, logistic or ridge. May be repeated. [default: all three]")
    ] = None,
    part: Annotated[Literal["test", "val"], typer.Option(help="Part of the column split to measure on.")] = "test",
    shots: Annotated[
        list[str] | None, typer.Option(help="Training items a class, such as 1,2,4,8,16: a few-shot curve.")
    ] = None,
    draws: Annotated[int, typer.Option(help="Drawings of those items, or shuffles of the control, to average.")] = 5,
    control: Annotated[bool, typer.Option("--control", help="Fit on shuffled labels too: chance on average.")] = False,
    seed: Annotated[int, typer.Option(help="Of cutting, drawing and shuffling.")] = 0,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the figures here, as CLIP_benchmark.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write a page with the few-shot curve and each class.")] = None,
) -> None:
    """What a frozen feature knows of a label: neighbors, linear probes and few-shot curves, with chance."""
    from embedcache.cli.console import open_progress, say, show_table
    from embedcache.evaluate.classifiers import METHODS
    from embedcache.evaluate.probe import ProbeSettings, evaluate_probe
    from embedcache.provenance import write_json
    from embedcache.reports.probe import few_shot_table, probe_json, probe_table

    settings = ProbeSettings(
        methods=tuple(method or METHODS.paths),
        label=label,
        part=part,
        shots=_numbers(shots or ()),
        num_draws=draws,
        has_control=control,
        seed=seed,
    )
    report = evaluate_probe(cache, image=image, text=text, settings=settings, progress=open_progress())
    for line in (report.line(), *report.warnings()):
        say(line)
    show_table(*probe_table(report))
    if report.few_shots:
        show_table(*few_shot_table(report))
    if json_path is not None:
        write_json(json_path, probe_json(report, Path(cache).name))
    if html is not None:
        from embedcache.reports.probe import write_probe_page

        write_probe_page(html, report)
        say(f"wrote {html}")


def _numbers(values: Sequence[str]) -> tuple[int, ...]:
    """Take an option that may be repeated and hold several numbers, `1,2,4`, apart."""
    words = [word.strip() for value in values for word in value.split(",") if word.strip()]
    for word in words:
        if not word.isdecimal():
            raise SettingError(f"shots are numbers such as 1,2,4,8,16, and not {word!r}")
    return tuple(dict.fromkeys(map(int, words)))
