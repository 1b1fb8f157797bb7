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
    "mIoU in percent, over seven classes, of the test frames of a domain: 2D / 3D / 2D+3D, where the last one is the "
    "sum of both probabilities. The data are a synthetic street, so these figures do not estimate published ones. "
    "The methods are explained in `pipelines/summit/RESULTS.md`.",
)


def write_pages(
    folder: Path,
    results: Sequence[Result],
    ablation_results: Sequence[Result],
    methods: Sequence[str],
    scenarios: Mapping[str, Domains],
    *,
    unlike: Sequence[str],
) -> None:
    """Write `summit.html`, and `summit.md` with its figure, into the folder.

    Args:
        folder: folder of the pages, with the caches and runs below it.
        results: results of all scenarios, worlds and seeds.
        ablation_results: results of the ablations and of calibration noise.
        methods: methods of the tables, in this order.
        scenarios: scenario -> its domains.
        unlike: scenarios of `results` on whose shifts no setting was chosen.
    """
    similar = [result for result in results if result.scenario not in unlike]
    dissimilar = [result for result in results if result.scenario in unlike]
    worlds = {result.world for result in results}
    seeds = {result.seed for result in results}
    num_frames = {len(result.counts[SOURCE][BOTH]) for result in results}
    runs = (
        f"worlds {_joined(worlds)}, seeds {_joined(seeds)}, {_joined(num_frames)} test frames per domain; "
        "settings were chosen on worlds 10 and 11"
    )
    caption = "The first test frame of each scenario that moves."
    parts = [
        Part("Frames", [caption], figure=_frames(folder, results, scenarios), name="frames"),
        Part("All scenarios but fog and roof", [runs], summary_table(similar, methods)),
    ]
    if dissimilar:
        parts.append(Part("Shifts unlike those for choosing", [runs], summary_table(dissimilar, methods)))

    means = "2D / 3D / 2D+3D, means over worlds and seeds."
    parts.append(Part("Each scenario", [means], scenario_table(results, methods)))

    # Results of ablations have more methods than results of calibration noise.
    ablated = [result for result in ablation_results if len(result.counts) > len(_FEWEST)]
    if ablated:
        note = "The switch with one part off, in the scenarios in which it moves; one world and seed."
        parts.append(Part("Ablations", [note], scenario_table(ablated, list(ablated[0].counts))))

    noises = [result for result in ablation_results if len(result.counts) <= len(_FEWEST)]
    if noises:
        note = "Points are projected with a wrong orientation, drawn per frame; 0 leaves the data as they are."
        parts.append(Part("Calibration noise", [note], scenario_table(noises, _FEWEST)))

    write_parts(folder / "summit", TITLE, parts, notes=NOTES, summary=switch_line(similar or results))


def switch_line(results: Sequence[Result]) -> str:
    """Describe the effect of the switch over all results in a sentence."""
    columns, (row,) = summary_table(results, ["switch"])
    values = dict(zip(columns, row, strict=True))
    return (
        f"The switch changes the mean 2D+3D mIoU of {len(results)} results by {values['change']}. It is better by > 2 "
        f"in {values['better by > 2']} results, and worse by > 0.5 in {values['worse by > 0.5']}. In all views "
        f"together, {values['any view worse']} figures are worse by > 0.5, and {values['beyond interval']} are worse "
        f"beyond their interval. The switch closes {values['to oracle']} of the distance to the oracle."
    )


def _frames(folder: Path, results: Sequence[Result], scenarios: Mapping[str, Domains]) -> Any:
    """Draw the first test frame of scenarios in which the switch moved, or of all if it moved in none."""
    first_run = [result for result in results if (result.world, result.seed) == (results[0].world, results[0].seed)]
    shown = [result for result in first_run if max(result.gaps.values()) > Adaptation.threshold] or first_run

    rows: list[FrameRow] = []
    for result in shown[:5]:
        domains = scenarios[result.scenario]
        world = folder / f"world{result.world}"
        cache = world / domains.target
        runs = world / f"seed{result.seed}"

        data = read_points(cache, "test", list(FEATURES)).frames(0, 1)
        row = rows_of(cache, "test")[0]
        key = Cache(cache).samples["key"][int(row)].as_py()
        source = open_source(Cache(cache).info.source["path"], kind=KIND)
        assert isinstance(source, StreetSource)

        panels = {"truth": data.labels_N}
        for name, run_name in (("source only", "source"), ("switch", "switch"), ("oracle", "oracle")):
            # A switch that moved nothing has no run; its predictions are the source's.
            path = runs / "-".join(domains) / run_name
            module = Run.open(path if path.is_dir() else path.with_name("source")).module
            assert isinstance(module, PointNetworks)
            probabilities = []
            for modality in FEATURES:
                values = np.asarray(data.features[modality], np.float32)
                probabilities.append(predict_points(module[modality], values).prob_NC)
            panels[name] = predict_together(*probabilities)

        target = DOMAINS[domains.target]
        title = result.scenario.replace(" → ", " →\n")
        image = source.render(key, target)
        rows.append(FrameRow(title=title, image=image, uv_N2=source.scan(key, target)["uv"], panels=panels))
    return draw_frames(rows, CLASSES)


def _joined(numbers: set[int]) -> str:
    return ", ".join(map(str, sorted(numbers)))
