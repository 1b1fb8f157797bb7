"""Source-free adaptation of unimodal models to multimodal targets, on a synthetic street: SUMMIT (ICCV 2023).

    python -m pipelines.summit work/                     # three worlds, two seeds; an hour or two on 2 cores
    python -m pipelines.summit work/ --worlds 1 --seeds 0
    python -m pipelines.summit work/ --tiny              # one scenario on a few frames

One model of images and one of point clouds are trained on unpaired data of a source domain: images with labeled points
of some frames, point clouds of other frames. After that only the two runs remain of the source. The target is unlabeled
and paired. Results are kept in the folder; a second call goes on. The threshold and the other settings of the switch
were chosen on worlds 10 and 11, without the scenarios of fog and of the camera on the roof.
"""

import argparse
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch

from embedcache.cli.console import print_line, print_table, run_program
from pipelines.summit import steps
from pipelines.summit.page import write_pages
from pipelines.summit.results import Result, summary_table
from pipelines.summit.steps import FUSED, ORACLE, SOURCE, Adaptation, Domains, Scenario

SCENARIOS = {
    "day → Singapore-like": Domains("day", "day", "sg"),
    "day → dusk": Domains("day", "day", "dusk"),
    "day → night": Domains("day", "day", "night"),
    "A2D2-like → KITTI-like": Domains("a2", "a2", "sk"),
    "2D day, 3D night → KITTI-like": Domains("day", "night", "sk"),
    "2D night, 3D day → KITTI-like": Domains("night", "day", "sk"),
    "2D day, 3D Singapore-like → KITTI-like": Domains("day", "sg", "sk"),
    "2D Singapore-like, 3D day → KITTI-like": Domains("sg", "day", "sk"),
}
"""Scenarios of the paper's shifts."""
UNLIKE = {"day → fog": Domains("day", "day", "fog"), "day → camera on the roof": Domains("day", "day", "roof")}
"""Scenarios of other shifts, on which no setting was chosen."""
ABLATIONS = {
    "norm statistics not replaced first": Adaptation(norms_first=False),
    "no weighting by the gap": Adaptation(gap_weighting=False),
    "no hypothesis test": Adaptation(test_k=None),
    "no consistency": Adaptation(consistency=0.0),
    "entropy not matched": Adaptation(entropy_matched=False),
    "heads and norms only": Adaptation(parts=("heads", "norms")),
}
METHODS = (SOURCE, *FUSED, "certain", "norm statistics", "norm statistics by the gap", "switch", ORACLE)
ABLATED = {name: SCENARIOS[name] for name in ("day → dusk", "day → night", "2D night, 3D day → KITTI-like")}
ABLATED["day → night, headlight only"] = Domains("day", "day", "headlight")
NOISES = {f"day → dusk, camera off by {noise}°": Domains("day", "day", f"dusk={noise}") for noise in (0, 0.5, 1, 2, 4)}


def main() -> None:
    """Make caches, train source models, adapt in every scenario, write the pages."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("workdir", type=Path)
    parser.add_argument("--worlds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument(
        "--ablations", action="store_true", help="each part off, in the first world with the first seed"
    )
    parser.add_argument("--tiny", action="store_true", help="one scenario on a few frames")
    options = parser.parse_args()

    torch.set_num_threads(1)
    scenarios = {"day → night": SCENARIOS["day → night"]} if options.tiny else {**SCENARIOS, **UNLIKE}
    worlds = options.worlds[:1] if options.tiny else options.worlds
    seeds = options.seeds[:1] if options.tiny else options.seeds
    epochs = 3 if options.tiny else 12
    frames = "frames=4,test=2" if options.tiny else "frames=24,test=14"

    folder = options.workdir
    results = []
    for world in worlds:
        for seed in seeds:
            for name, domains in scenarios.items():
                results.append(run_scenario(folder / f"world{world}", name, domains, world, seed, epochs, frames))
                print_line(f"world {world}, seed {seed}: {results[-1].line('switch')}")

    # The ablations run only in scenarios in which the switch moves; calibration noise needs no ablations.
    ablation_results = []
    if options.ablations:
        for name, domains in {**ABLATED, **NOISES}.items():
            place = (folder / f"world{worlds[0]}", name, domains, worlds[0], seeds[0], epochs, frames)
            ablation_results.append(run_scenario(*place, ablations=ABLATIONS if name in ABLATED else {}))

    print_table(*summary_table([result for result in results if result.scenario not in UNLIKE], METHODS))
    write_pages(folder, results, ablation_results, METHODS, scenarios, unlike=list(UNLIKE))


def run_scenario(
    folder: Path,
    name: str,
    domains: Domains,
    world: int,
    seed: int,
    epochs: int,
    frames: str,
    ablations: Mapping[str, Adaptation] | None = None,
) -> Result:
    """Adapt with every method and measure on the test frames, unless there is a result of these settings already."""
    runs = folder / f"seed{seed}"

    # A result is reused only with the settings it was computed with.
    path = runs / f"{'-'.join(domains)}{'-ablations' * bool(ablations)}.json"
    settings = {"domains": domains, "world": world, "seed": seed, "epochs": epochs, "frames": frames}
    settings["ablations"] = {method: asdict(options) for method, options in (ablations or {}).items()}
    if stored := Result.read(path, settings):
        return stored

    # The scenarios share caches and source runs, which are made once.
    caches = {domain: steps.make_cache(f"world={world},{frames}", domain, folder / domain) for domain in set(domains)}
    sources = {
        modality: steps.train_source_run(
            caches[domain], modality, runs / f"source-{domain}-{modality}", seed=seed, epochs=epochs
        )
        for modality, domain in (("image", domains.image), ("points", domains.points))
    }

    scenario = Scenario(sources, caches[domains.target], runs / "-".join(domains), seed=seed, epochs=epochs)

    # Ablations change only the switch, so the other methods need not run again.
    switches = {"switch": Adaptation(), **(ablations or {})}
    adapted_runs = scenario.adapt_all(switches, baselines=ablations is None)
    counts = {method: scenario.evaluate(run) for method, run in adapted_runs.items()}
    result = Result(scenario=name, world=world, seed=seed, gaps=scenario.gaps, counts=counts)
    result.write(path, settings)
    return result


if __name__ == "__main__":
    run_program(main)
