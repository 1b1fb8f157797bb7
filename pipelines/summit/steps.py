"""Steps of source-free adaptation on cached features: caches of a street, source models, pseudo-labels, adaptation.

Every step leaves files that a second call reuses: caches of features, derived features, runs, results.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from embedcache.arrays import Floats, Ints
from embedcache.dataset.splits import Split, write_split
from embedcache.derive.derive import derive, derive_from_run
from embedcache.derive.rules import Derivation, Rule
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.runs import Run, RunInput, is_finished
from embedcache.settings import from_flat
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from embedcache.train.settings import FitSettings
from pipelines.summit.encoders import FIELDS, GEOMETRY
from pipelines.summit.metrics import count_frames, predict_together
from pipelines.summit.networks import PointNetworks, norm_gaps, predict_points
from pipelines.summit.pseudo_labels import entropy
from pipelines.summit.rules import AGREE, CERTAIN, LIFT, RECOVER, WEIGHT_BY_ENTROPY, lift_parameters
from pipelines.summit.training import (
    PointData,
    SegmentationInputs,
    save_adapted_norms,
    save_matched_entropy,
    train_adaptation,
    train_source,
)
from pipelines.worlds.street import KIND
from pipelines.worlds.street_scene import CLASSES

IMAGE_ENCODER = "lite:efficientnet-lite0,fit=448x224"
PATCHES = tuple(f"layer{number}.patches" for number in (1, 3, 5, 11))
FEATURES = {"image": "lifted/lifted", "points": "eigen/points"}
"""Modality -> its feature of the points."""

C = len(CLASSES)
SOURCE = "source only"
ORACLE = "oracle"
FUSED = {"AF": (AGREE, None), "EW": (WEIGHT_BY_ENTROPY, None), "EW+HT": (WEIGHT_BY_ENTROPY, 1.0)}
"""Methods of the paper, which adapt both modalities with the same labels -> rule and k of the hypothesis test."""

VIEWS = {"2D": ("image",), "3D": ("points",), "2D+3D": ("image", "points")}
"""View -> modalities whose probabilities are summed to predict."""


class Domains(NamedTuple):
    """Domains of a scenario: the source of each modality, and the target."""

    image: str
    points: str
    target: str


@dataclass(frozen=True, kw_only=True)
class Adaptation:
    """Parts of the adaptation; the defaults are the recommended switch.

    Args:
        threshold: a modality is adapted if its gap exceeds this.
        norms_first: replace its norm statistics before the pseudo-labels are made.
        gap_weighting: lower the weight of a modality in the fused labels by its gap.
        test_k: k of the hypothesis test. If None, no test is made.
        consistency: weight of the imitation of the other modality.
        entropy_matched: keep the mean entropy that the predictions had before training.
        parts: parts of the network that are trained. If None, all are trained.
    """

    threshold: float = 0.3
    norms_first: bool = True
    gap_weighting: bool = True
    test_k: float | None = 1.0
    consistency: float = 0.1
    entropy_matched: bool = True
    parts: tuple[str, ...] | None = None


def make_cache(location: str, domain: str, path: Path) -> Path:
    """Extract the features of one domain of a street and lift image features to the points; return the path.

    `dusk=0.5` is the domain `dusk` with a camera whose orientation is wrong by about 0.5 degrees.
    """
    name, _, calibration = domain.partition("=")
    location = f"{location},domains={name}" + f",calibration={calibration}" * bool(calibration)

    encoders = {"image": [IMAGE_ENCODER], "points": [GEOMETRY, FIELDS]}
    features = (*PATCHES, "points", "xyz", "uv", "label")

    extract(
        open_source(location, kind=KIND),
        path,
        encoder=encoders,
        settings=ExtractSettings(features=features, chunk_size=16),
    )

    # Image features become features of points, so that both modalities have one row per point.
    patches = [f"efficientnet-lite0/{name}" for name in PATCHES]
    inputs = [("points", "fields/uv"), *(("image", name) for name in patches)]
    parameters = lift_parameters(Cache(path), patches)
    derive(path, Derivation(name="lifted", inputs=inputs, rule=LIFT, parameters=parameters))
    return path


def rows_of(cache: Path, split: str) -> Ints:
    """Return the rows of the frames of one split; every frame has one point cloud."""
    return np.flatnonzero(np.array(Cache(cache).samples["split"].to_pylist()) == split)


def read_points(cache: Path, split: str, modalities: Sequence[str]) -> PointData:
    """Read the features of all points of one split into memory."""
    rows = rows_of(cache, split)
    points = Cache(cache)
    labels = points.feature("points", "fields/label").gather_tokens(rows)
    features = {}
    for name in modalities:
        features[name] = np.concatenate(points.feature("points", FEATURES[name]).gather_tokens(rows))
    lengths_G = np.array([len(values) for values in labels])
    return PointData(features=features, labels_N=np.concatenate(labels)[:, 0].astype(np.int64), lengths_G=lengths_G)


def inputs_of(cache: Path, modalities: Sequence[str], labels: str) -> SegmentationInputs:
    """Describe the training data of a run."""
    features = {}
    for name in modalities:
        feature = Cache(cache).feature("points", FEATURES[name])
        features[name] = RunInput(
            modality="points",
            feature=feature.name,
            spec=feature.group.spec,
            fingerprint=feature.fingerprint,
            width=feature.item_shape[-1],
        )
    return SegmentationInputs(features=features, data_digest=f"{Cache(cache).info.index_digest} {labels}")


def train_source_run(cache: Path, modality: str, run: Path, *, seed: int, epochs: int) -> Path:
    """Train a network of one modality on its split of a source domain, and return the run.

    The last sixth of the frames is for validation.
    """
    data = read_points(cache, modality, [modality])

    # Whole frames validate, as the points of one frame are alike.
    num_train = len(data.lengths_G) - max(1, len(data.lengths_G) // 6)
    settings = from_flat(FitSettings, {"epochs": epochs, "lr": 3e-3, "batch_size": 2048, "seed": seed})

    train_source(
        data.frames(0, num_train),
        data.frames(num_train, len(data.lengths_G)),
        run,
        inputs_of(cache, [modality], modality),
        settings,
        num_classes=C,
    )
    return run


class Scenario:
    """Two source runs and the cache of a target domain; runs go into a folder.

    Args:
        sources: modality -> source run.
        cache: cache of the target domain.
        folder: folder of the runs.
        seed: random seed of the adaptation.
        epochs: epochs of the adaptation.
    """

    def __init__(self, sources: Mapping[str, Path], cache: Path, folder: Path, *, seed: int, epochs: int) -> None:
        self.cache = cache
        self.folder = folder
        self.seed = seed
        self.epochs = epochs
        self.target = read_points(cache, "target", list(sources))
        self.test = read_points(cache, "test", list(sources))
        self.sources = self.adapt_norms(sources, [], "source")

    @cached_property
    def module(self) -> PointNetworks:
        """The source networks."""
        return _load(self.sources)

    @cached_property
    def gaps(self) -> dict[str, float]:
        """Modality -> gap between source and target, the mean over both normalizations. This needs no labels."""
        gaps = {}
        for name in FEATURES:
            values = np.asarray(self.target.features[name], np.float32)
            gaps[name] = float(np.mean(norm_gaps(self.module[name], values)))
        return gaps

    @cached_property
    def split(self) -> Path:
        """Split of the target cache in which the frames to adapt to are the training part."""
        path = self.folder / "target.parquet"
        if not path.is_file():
            cache = Cache(self.cache)
            parts = ["train" if split == "target" else "" for split in cache.column("split").to_pylist()]
            path.parent.mkdir(parents=True, exist_ok=True)
            write_split(path, [cache], Split(parts=parts, groups=list(range(len(parts)))))
        return path

    def adapt_norms(self, sources: Mapping[str, Path], modalities: Sequence[str], name: str) -> Path:
        """Join runs, replace the norm statistics of some modalities by the target's, and return the new run."""
        run = self.folder / name
        if not is_adapted(run, sources, modalities):
            save_adapted_norms(sources, self.target.features, modalities, run)
        return run

    def labels(
        self, run: Path, *, rule: Rule, gaps: Mapping[str, float] | None = None, test_k: float | None = None
    ) -> dict[str, str]:
        """Derive pseudo-labels from the predictions of a run, and return modality -> feature.

        Args:
            run: a run of both modalities.
            rule: `CERTAIN` gives each modality its own labels; `AGREE` (AF) and `WEIGHT_BY_ENTROPY` (EW) one for both.
            gaps: modality -> gap that lowers its weight in EW.
            test_k: k of the hypothesis test for points that EW leaves out. If None, no test is made.
        """
        prob = {name: self._output(run, f"{name}-prob") for name in FEATURES}
        hidden = {name: self._output(run, f"{name}-hidden") for name in FEATURES}

        if rule is WEIGHT_BY_ENTROPY:
            weights = {"gap": gaps["image"], "other_gap": gaps["points"]} if gaps else {}

            # Image first: `gap` is the gap of the first input of the rule.
            fused = self._derive(run, "fused" + "-gap" * bool(gaps), rule, list(prob.values()), "prob", weights)
            label = self._derive(run, f"{fused.split('/')[0]}-certain", CERTAIN, [fused], "label")
            if test_k is not None:
                predictions = [feature for name in FEATURES for feature in (prob[name], hidden[name])]
                test_name = f"{label.split('/')[0]}-test-{test_k:g}"
                label = self._derive(run, test_name, RECOVER, [label, *predictions], "label", {"k": test_k})
            return dict.fromkeys(FEATURES, label)

        certain = {name: self._derive(run, f"{name}-certain", CERTAIN, [prob[name]], "label") for name in FEATURES}
        if rule is CERTAIN:
            return certain
        return dict.fromkeys(FEATURES, self._derive(run, "agree", rule, list(certain.values()), "label"))

    def read_labels(self, feature: str) -> Ints:
        """Return the pseudo-labels of all points to adapt to."""
        values = Cache(self.cache).feature("points", feature).gather_tokens(rows_of(self.cache, "target"))
        return np.concatenate(values)[:, 0].astype(np.int64)

    def train(
        self,
        name: str,
        start: Path,
        labels: Mapping[str, Ints],
        *,
        consistency: float = 0.1,
        parts: Sequence[str] | None = None,
    ) -> Path:
        """Adapt the modalities that have labels, starting from a run of both, and return the new run."""
        # A modality without labels is not trained, but teaches the other one.
        trainable = [f"{name}-{part}" for name in labels for part in parts] if parts else list(labels)
        options = {
            "epochs": self.epochs,
            "lr": 1e-3,
            "batch_size": 2048,
            "seed": self.seed,
            "init_from": tuple(f"{name}={start}" for name in FEATURES),
            "trainable": "+".join(trainable),
        }

        train_adaptation(
            self.target,
            labels,
            self.folder / name,
            inputs_of(self.cache, list(FEATURES), name),
            from_flat(FitSettings, options),
            num_classes=C,
            consistency=consistency,
        )
        return self.folder / name

    def switch(self, name: str, options: Adaptation) -> Path:
        """Adapt the modalities whose gap exceeds the threshold, and return the run."""
        moved = [name for name in FEATURES if self.gaps[name] > options.threshold]
        if not moved:
            return self.sources

        # Norm statistics come first, so that the pseudo-labels already come from better predictions.
        start = self.sources
        if options.norms_first:
            start = self.adapt_norms(dict.fromkeys(FEATURES, self.sources), moved, f"norms-{'-'.join(moved)}")

        gaps = self.gaps if options.gap_weighting else None
        feature = self.labels(start, rule=WEIGHT_BY_ENTROPY, gaps=gaps, test_k=options.test_k)["image"]
        labels = dict.fromkeys(moved, self.read_labels(feature))
        run = self.train(f"{name}-trained", start, labels, consistency=options.consistency, parts=options.parts)

        if not options.entropy_matched:
            return run
        if not _is_matched(self.folder / name, run):
            # Pseudo-labels make the moved networks more certain than the other one, which they would outvote.
            source = _load(start)
            entropies = {}
            for modality in moved:
                prob_NC = _predict(source, modality, self.target.features[modality])
                entropies[modality] = float(entropy(prob_NC).mean())
            save_matched_entropy(run, self.target.features, entropies, self.folder / name)
        return self.folder / name

    def adapt_all(self, switches: Mapping[str, Adaptation], *, baselines: bool = True) -> dict[str, Path]:
        """Adapt with every method, and return method -> run.

        Args:
            switches: name -> options of a switch.
            baselines: whether to adapt with the methods that the switch is compared to.
        """
        runs = {SOURCE: self.sources}
        start = dict.fromkeys(FEATURES, self.sources)
        if baselines:
            for name, (rule, test_k) in FUSED.items():
                feature = self.labels(self.sources, rule=rule, test_k=test_k)["image"]
                runs[name] = self.train(name, self.sources, dict.fromkeys(FEATURES, self.read_labels(feature)))

            certain = self.labels(self.sources, rule=CERTAIN)
            labels = {name: self.read_labels(feature) for name, feature in certain.items()}
            runs["certain"] = self.train("certain", self.sources, labels)

            moved = [name for name in FEATURES if self.gaps[name] > Adaptation.threshold]
            runs["norm statistics"] = self.adapt_norms(start, list(FEATURES), "norms")
            runs["norm statistics by the gap"] = self.adapt_norms(start, moved, "norms-by-gap")

        for name, options in switches.items():
            runs[name] = self.switch(name.replace(" ", "-"), options)

        # The oracle trains on the true labels of the target: an upper bound.
        runs[ORACLE] = self.train(ORACLE, self.sources, dict.fromkeys(FEATURES, self.target.labels_N))
        return runs

    def evaluate(self, run: Path) -> dict[str, Ints]:
        """Count the points of each test frame by true and predicted class: `2D`, `3D`, `2D+3D` -> (G, C, C)."""
        module = _load(run)
        prob = {name: _predict(module, name, self.test.features[name]) for name in FEATURES}
        counts = {}
        for view, modalities in VIEWS.items():
            predicted_N = predict_together(*(prob[name] for name in modalities))
            counts[view] = count_frames(self.test.labels_N, predicted_N, self.test.lengths_G, C)
        return counts

    def _output(self, run: Path, output: str) -> str:
        name = self._name(run, output)
        derive_from_run(self.cache, run, output, name=name)
        return f"{name}/{output}"

    def _derive(
        self,
        run: Path,
        name: str,
        rule: Rule,
        inputs: Sequence[str],
        output: str,
        parameters: Mapping[str, float] | None = None,
    ) -> str:
        prefix = self._name(run, "")
        name = prefix + name.removeprefix(prefix)
        derivation = Derivation(
            name=name,
            inputs=[("points", feature) for feature in inputs],
            rule=rule,
            parameters=parameters or {},
            dtype="int16" if output == "label" else "float16",
            fit_split=None if rule.fit is None else self.split,
        )
        derive(self.cache, derivation)
        return f"{name}/{output}"

    def _name(self, run: Path, what: str) -> str:
        """Return the folder in the cache for features that are derived from a run."""
        return f"{self.folder.parent.name}-{self.folder.name}-{run.name}-{what}"


def is_adapted(run: Path, sources: Mapping[str, Path], modalities: Sequence[str]) -> bool:
    """Return whether a run joins these source runs as they are now, with these modalities' norm statistics replaced."""
    if not is_finished(run):
        return False
    weights = {f"init_from {name}": Run.open(source).info.weights for name, source in sources.items()}
    info = Run.open(run).info
    return info.digests == weights and info.settings.get("norm statistics") == list(modalities)


def _is_matched(matched: Path, run: Path) -> bool:
    """Return whether a run has the scaled predictions of another one."""
    return is_finished(matched) and Run.open(matched).info.digests == {"scaled": Run.open(run).info.weights}


def _load(run: Path) -> PointNetworks:
    module = Run.open(run).module
    assert isinstance(module, PointNetworks)
    return module


def _predict(module: PointNetworks, modality: str, features_ND: Floats) -> Floats:
    return predict_points(module[modality], np.asarray(features_ND, np.float32)).prob_NC
