"""The page of an adaptation: tables, and frames with their points, as HTML and as Markdown with a figure."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embedcache.runs import Run
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from pipelines.results import Part
from pipelines.results import write_pages as write_parts
from pipelines.summit.figures import FrameRow, draw_frames
from pipelines.summit.metrics import predict_together
from pipelines.summit.networks import PointNetworks, predict_points
from pipelines.summit.results import BOTH, Result, scenario_table, summary_table
from pipelines.summit.steps import FEATURES, ORACLE, SOURCE, Adaptation, Domains, read_points, rows_of
from pipelines.worlds.street import KIND, StreetSource
from pipelines.worlds.street_scene import CLASSES, DOMAINS

TITLE = "Adaptation of unimodal models to a multimodal target"
_FEWEST = [SOURCE, "switch", ORACLE]
NOTES = (
    "mIoU in percent, over seven classes, of the test frames of a domain: 2D / 3D / 2D+3D, the sum of both "
    "probabilities. The data are a synthetic street: nothing here estimates published figures. What is compared, and "
    "what each method is: `pipelines/summit/RESULTS.md`.",
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
    """Write `summit.html`, and `summit.md` with its figure, into the folder.

    Args:
        folder: folder of the pages, with the caches and runs below it.
        results: results of all scenarios, worlds and seeds.
        ablated: results of the ablations and of calibration noise.
        methods: methods of the tables, in this order.
        scenarios: scenario -> its domains.
        unlike: scenarios of `results` with shifts that chose no setting.
    """
    chosen = [result for result in results if result.scenario not in unlike]
    others = [result for result in results if result.scenario in unlike]
    worlds, seeds = ({getattr(result, name) for result in results} for name in ("world", "seed"))
    num_frames = {len(result.counts[SOURCE][BOTH]) for result in results}
    runs = (
        f"worlds {_joined(worlds)}, seeds {_joined(seeds)}, {_joined(num_frames)} test frames per domain; "
        "settings were chosen on worlds 10 and 11"
    )
    first = "The first test frame of each scenario that moves."
    parts = [
        Part("Frames", [first], figure=_frames(folder, results, scenarios), name="frames"),
        Part("All scenarios but fog and roof", [runs], summary_table(chosen, methods)),
    ]
    if others:
        parts.append(Part("Shifts unlike those for choosing", [runs], summary_table(others, methods)))
    means = "2D / 3D / 2D+3D, means over worlds and seeds."
    parts.append(Part("Each scenario", [means], scenario_table(results, methods)))
    switched = [result for result in ablated if len(result.counts) > len(_FEWEST)]
    if switched:
        note = "The switch with one part off, in the scenarios in which it moves; one world and seed."
        parts.append(Part("Ablations", [note], scenario_table(switched, list(switched[0].counts))))
    noises = [result for result in ablated if len(result.counts) <= len(_FEWEST)]
    if noises:
        note = "Points are projected with a wrong orientation, drawn per frame; 0 leaves the data as they are."
        parts.append(Part("Calibration noise", [note], scenario_table(noises, _FEWEST)))
    write_parts(folder / "summit", TITLE, parts, notes=NOTES, summary=switch_line(chosen or results))


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
    shown = [result for result in first if max(result.gaps.values()) > Adaptation.threshold] or first
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
            module = Run.open(path if path.is_dir() else path.with_name("source")).module
            assert isinstance(module, PointNetworks)
            prob = [predict_points(module[m], np.asarray(data.features[m], np.float32)).prob_NC for m in FEATURES]
            panels[name] = predict_together(*prob)
        target = DOMAINS[domains.target]
        image, uv_N2 = source.render(key, target), source.scan(key, target)["uv"]
        rows.append(FrameRow(title=result.scenario.replace(" → ", " →\n"), image=image, uv_N2=uv_N2, panels=panels))
    return draw_frames(rows, CLASSES)


def _joined(numbers: set[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))
