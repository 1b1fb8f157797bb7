"""The page of an adaptation: tables, and frames with their points, as HTML and as Markdown with a figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.files import replacing, write_atomic
from embedcache.projectors.modules import load_module
from embedcache.reports.base import Section, svg, write_report
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from pipelines.common import markdown_table
from pipelines.summit.figures import FrameRow, draw_frames
from pipelines.summit.metrics import predict_together
from pipelines.summit.networks import PointNetworks, predict_points
from pipelines.summit.results import (
    BOTH,
    Result,
    interval_table,
    label_table,
    scenario_table,
    summary_table,
)
from pipelines.summit.steps import FEATURES, ORACLE, SOURCE, Domains, read_points, rows_of
from pipelines.worlds.street import KIND, StreetSource
from pipelines.worlds.street_scene import CLASSES, DOMAINS

TITLE = "Adaptation of unimodal models to a multimodal target"
_FEWEST = [SOURCE, "switch", ORACLE]
NOTES = (
    "Two models are trained on unpaired data of single modalities, then adapted to an unlabeled target in which images "
    "and point clouds are paired; the source data are out of reach. The method is SUMMIT (ICCV 2023), with heads and "
    "norm statistics on cached features instead of whole networks. Nothing here estimates its published figures.",
    "The data are a synthetic street, ray-cast: no real lidar with labels is in any package. Image features are real: "
    "EfficientNet-Lite0 with ImageNet weights, blocks 1, 3, 5 and 11 at 448 x 224 pixels, interpolated at the points. "
    "Features of points are the eigenvalues of their neighborhoods, not learned. Labels of source images are those of "
    "their lidar points; source point clouds are other frames, without images.",
    "mIoU in percent, over seven classes, of the test frames of a domain: 2D / 3D / 2D+3D, the sum of both "
    "probabilities. AF: labels on which both agree. EW: probabilities weighted by certainty; HT: labels recovered by a "
    "hypothesis test. certain: each modality's own certain labels. norm statistics: those of the target, no labels. "
    "switch: only a modality whose own gap exceeds 0.3 is adapted: norm statistics, then EW weighted by the gap, + HT, "
    "then the entropy of the predictions is scaled back. oracle: the true labels of the same frames. The switch is "
    "ours; the code of the paper has none. The oracle learns from more labeled frames than the source models, so "
    "it is above them even where there is no gap. Produced by `python -m pipelines.summit`.",
)


def write_pages(
    folder: Path,
    results: Sequence[Result],
    ablated: Sequence[Result],
    methods: Sequence[str],
    scenarios: Mapping[str, Domains],
    *,
    unlike: Sequence[str],
) -> None:
    """Write `summit.html`, and `summit.md` with `summit.jpg`, into the folder.

    Args:
        folder: folder of the pages, with the caches and runs below it.
        results: results of all scenarios, worlds and seeds.
        ablated: results of the ablations and of calibration noise.
        methods: methods of the tables, in this order.
        scenarios: scenario -> its domains.
        unlike: scenarios of `results` with shifts that chose no setting.
    """
    chosen = [result for result in results if result.scenario not in unlike]
    sections = _sections(results, ablated, methods, unlike)
    figure = _frames(folder, results, scenarios)
    summary = switch_line(chosen or results)
    frames = Section(title="Frames", notes=["The first test frame of each scenario that moves."], figures=[svg(figure)])
    write_report(
        folder / "summit.html",
        title=TITLE,
        summary=summary,
        sections=[Section(title="What is compared", notes=NOTES), frames, *sections],
    )
    blocks = [f"# {TITLE}", *NOTES, summary, f"![{TITLE}](summit.jpg)"]
    for section in sections:
        blocks += [f"## {section.title}", *section.notes]
        blocks += [] if section.table is None else [markdown_table(*section.table)]
    with replacing(folder / "summit.jpg") as temporary:
        figure.savefig(temporary, format="jpg", dpi=110, pil_kwargs={"quality": 80})  # an SVG of photographs is 2 MB
    write_atomic(folder / "summit.md", ("\n\n".join(blocks) + "\n").encode())


def _sections(
    results: Sequence[Result], ablated: Sequence[Result], methods: Sequence[str], unlike: Sequence[str]
) -> list[Section]:
    """Return the sections with tables; arguments are those of `write_pages`."""
    chosen = [result for result in results if result.scenario not in unlike]
    others = [result for result in results if result.scenario in unlike]
    worlds, seeds = ({getattr(result, name) for result in results} for name in ("world", "seed"))
    num_frames = {len(result.counts[SOURCE][BOTH]) for result in results}
    runs = (
        f"worlds {_joined(worlds)}, seeds {_joined(seeds)}, {_joined(num_frames)} test frames per domain; "
        "settings were chosen on worlds 10 and 11"
    )
    sections = [Section(title="All scenarios but fog and roof", notes=[runs], table=summary_table(chosen, methods))]
    if others:
        sections.append(
            Section(title="Shifts unlike those for choosing", notes=[runs], table=summary_table(others, methods))
        )
    note = "2D / 3D / 2D+3D, means over worlds and seeds."
    sections.append(Section(title="Each scenario", notes=[note], table=scenario_table(results, methods)))
    note = "Fraction of points with a label, and of those that are right."
    sections.append(Section(title="Pseudo-labels", notes=[note], table=label_table(results)))
    parts = [result for result in ablated if len(result.counts) > len(_FEWEST)]
    if parts:
        note = "The switch with one part off, in the scenarios in which it moves; one world and seed."
        sections.append(Section(title="Ablations", notes=[note], table=scenario_table(parts, list(parts[0].counts))))
    noises = [result for result in ablated if len(result.counts) <= len(_FEWEST)]
    if noises:
        note = "Points are projected with a wrong orientation, drawn per frame; 0 leaves the data as they are."
        sections.append(Section(title="Calibration noise", notes=[note], table=scenario_table(noises, _FEWEST)))
    note = "2D+3D with 95% intervals over test frames."
    return [*sections, Section(title="Intervals", notes=[note], table=interval_table(results, "switch"))]


def switch_line(results: Sequence[Result]) -> str:
    """Return what the switch does over all results in a sentence."""
    columns, (row,) = summary_table(results, ["switch"])
    values = dict(zip(columns, row, strict=True))
    return (
        f"The switch changes the 2D+3D mIoU by {values['change']} on the mean of {len(results)} results: better by > 2 "
        f"in {values['better by > 2']}, worse by > 0.5 in {values['worse by > 0.5']}; of all figures, "
        f"{values['any view worse']} are worse by > 0.5, and {values['beyond interval']} beyond their "
        f"interval; it closes {values['to oracle']} of the distance to the oracle."
    )


def _frames(folder: Path, results: Sequence[Result], scenarios: Mapping[str, Domains]) -> Any:
    """Draw the first test frame of scenarios in which the switch moved, else of all."""
    first = [result for result in results if (result.world, result.seed) == (results[0].world, results[0].seed)]
    shown = [result for result in first if "switch" in result.labels] or first
    rows = []
    for result in shown[:5]:
        domains, world = scenarios[result.scenario], folder / f"world{result.world}"
        cache, runs = world / domains.target, world / f"seed{result.seed}"
        data = read_points(cache, "test", list(FEATURES)).frames(0, 1)
        row = rows_of(cache, "test")[0]
        key = Cache(cache).samples["key"][int(row)].as_py()
        source = open_source(Cache(cache).info.source["path"], kind=KIND)
        assert isinstance(source, StreetSource)
        panels = {"truth": data.labels_N}
        for name, run in (("source only", "source"), ("switch", "switch"), ("oracle", "oracle")):
            path = runs / "-".join(domains) / run
            module, _ = load_module(path if path.is_dir() else path.with_name("source"))
            assert isinstance(module, PointNetworks)
            prob = [predict_points(module[m], np.asarray(data.features[m], np.float32)).prob_NC for m in FEATURES]
            panels[name] = predict_together(*prob)
        target = DOMAINS[domains.target]
        image, uv_N2 = source.render(key, target), source.scan(key, target)["uv"]
        rows.append(FrameRow(title=result.scenario.replace(" → ", " →\n"), image=image, uv_N2=uv_N2, panels=panels))
    return draw_frames(rows, CLASSES)


def _joined(numbers: set[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))
