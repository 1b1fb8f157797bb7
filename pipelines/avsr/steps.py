"""Steps of audio-visual speech recognition on cached features: a world, caches, runs of one stream, fusions, results.

Every step leaves files that a second call reuses.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from embedcache.cli.console import open_progress
from embedcache.dataset.inputs import PLAIN
from embedcache.derive.derive import derive_from_run
from embedcache.extract.extract import extract
from embedcache.extract.settings import ExtractSettings
from embedcache.metrics import MetricValues
from embedcache.progress import Progress
from embedcache.runs import Run
from embedcache.settings import from_flat
from embedcache.sources import open_source
from embedcache.sources.media import decode_video
from embedcache.store.cache import Cache
from embedcache.train.settings import FitSettings
from pipelines.avsr.decoding import Decoding
from pipelines.avsr.edits import count_word_errors
from pipelines.avsr.evaluate import recognize_utterances
from pipelines.avsr.network import to_text
from pipelines.avsr.noise import VIEW
from pipelines.avsr.stacks import FAMILY, fit_stacks
from pipelines.avsr.train import SpeechRecipe, train_speech
from pipelines.avsr.utterances import (
    SpeechAugmentation,
    Utterances,
    open_for_run,
    open_utterances,
    shuffle_videos,
    word_clusters,
)
from pipelines.results import Result, keep_result
from pipelines.worlds.talking import KIND, WorldSettings, write_world
from pipelines.worlds.talking import TINY as TINY_WORLD

LEVELS_DB = (10, 5, 0, -5, -10)
TALKER_DB = (5, 0, -5)
"""Signal-to-noise ratios of babble, in training and tests, and of a single talker, in training only."""
TRAINING_VIEWS = (
    PLAIN,
    *(f"babble{level}dB" for level in LEVELS_DB),
    *(f"talker{level}dB" for level in TALKER_DB),
)
TEST_VIEWS = (PLAIN, *(f"babble-test{level}dB" for level in LEVELS_DB))
FEATURES = {"audio": "tiny.en/states", "video": "mouth/states"}
ENCODERS = ("audio", "video")
READOUTS = ("ctc", "attention")
PARTS = "fusion+ctc+attention"
DECODING = Decoding(ctc_weight=0.5)
"""The paper's 0.1 loses words here: an attention decoder that was trained on a thousand utterances ends too early.
0.5 had the fewest errors of 0.1, 0.3, 0.5 and 0.8, for the run on sound in the sets `valid` and K."""


@dataclass(frozen=True, kw_only=True)
class Size:
    """Sizes of the world, the networks and the training.

    Args:
        world: settings of the world.
        epochs: epochs of each stage: lips by CTC only, audio, video, and each fusion.
        align_epochs: first epochs of the run on sound, with CTC only.
        batch_size: utterances per batch, of each stage.
        lr: peak learning rate of each stage.
        model: arguments of the networks.
        dropout: dropout of the network of each stage.
        num_fitted: clips that the mouth encoder is fitted to.
    """

    world: WorldSettings = field(default_factory=WorldSettings)
    epochs: Mapping[str, int] = field(default_factory=lambda: {"lips": 80, "audio": 40, "video": 15, "fusion": 20})
    align_epochs: int = 12
    batch_size: Mapping[str, int] = field(default_factory=lambda: {"lips": 8, "audio": 8, "video": 8, "fusion": 16})
    lr: Mapping[str, float] = field(
        default_factory=lambda: {**dict.fromkeys(("lips", "audio", "video"), 1e-3), "fusion": 2e-3}
    )
    model: Mapping[str, Any] = field(default_factory=dict)
    dropout: Mapping[str, float] = field(default_factory=lambda: {"audio": 0.1, "fusion": 0.1})
    num_fitted: int = 400


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A fusion and its training.

    Args:
        kind: `concat` or `gated`.
        readouts: stream whose run CTC and attention start from. If None, they start from random weights.
        noise: view of the sound -> probability.
        missing: stream -> probability that it is missing.
        shift_s, swapped: as in `SpeechAugmentation`.
    """

    kind: str = "gated"
    readouts: str | None = "audio"
    noise: Mapping[str, float] = field(default_factory=dict)
    missing: Mapping[str, float] = field(default_factory=dict)
    shift_s: float = 0.0
    swapped: float = 0.0

    @property
    def augmentation(self) -> SpeechAugmentation:
        """Changes of the utterances in training."""
        views = {"audio": dict(self.noise)} if self.noise else {}
        return SpeechAugmentation(views=views, missing=self.missing, shift_s=self.shift_s, swapped=self.swapped)


def _noise(plain: float, babble: Sequence[float], talker: float) -> dict[str, float]:
    """Return view -> probability: no noise, babble at each of `LEVELS_DB`, and a talker at any of `TALKER_DB`."""
    babble_levels = {f"babble{level}dB": weight for level, weight in zip(LEVELS_DB, babble, strict=True)}
    talker_levels = {f"talker{level}dB": talker / len(TALKER_DB) for level in TALKER_DB}
    return {PLAIN: plain, **babble_levels, **talker_levels}


WIDE = _noise(0.3, (0.1, 0.1, 0.1, 0.1, 0.1), 0.2)
LOUD = _noise(0.25, (0.06, 0.08, 0.14, 0.14, 0.18), 0.15)
NARROW = {PLAIN: 0.5, "babble5dB": 0.25, "babble0dB": 0.25}
"""View of the sound -> probability in training. `WIDE` trains the run on sound. `LOUD` trains fusions, which have to
learn when to leave the sound. `NARROW` is close to the released recipe."""


AUDIO = "audio"
VIDEO = "video"
DEEP = "video, as deep as the fusion"
FUSION = "both"
NARROW_NOISE = "both, narrow noise"
MISSING = {"audio": 0.3, "video": 0.1}
FUSIONS: Mapping[str, Variant] = {
    FUSION: Variant(noise=LOUD, missing=MISSING),
    DEEP: Variant(readouts="video", missing={"audio": 1.0}),
}
ABLATIONS: Mapping[str, Variant] = {
    NARROW_NOISE: Variant(noise=NARROW, missing=MISSING),
    "both, concatenated": Variant(kind="concat", readouts=None, noise=LOUD),
    "both, nothing missing": Variant(noise=LOUD),
    "both, lips swapped and shifted": Variant(noise=LOUD, missing=MISSING, swapped=0.1, shift_s=0.04),
}
"""Model -> its training. The ablations run with the first seed only."""


def make_caches(folder: Path, size: Size, sets: Sequence[str]) -> dict[str, Path]:
    """Write the world, fit the mouth encoder to training clips without their labels, and extract each set."""
    world = folder / "world"
    progress = open_progress()
    write_world(world, size.world, progress, sets=("train", "valid", *sets))

    # The mouth encoder sees only as many evenly spaced clips as it needs.
    mouth = folder / "mouth.safetensors"
    if not mouth.is_file():
        clips = sorted((world / "train").glob("*.mp4"))
        step = max(1, len(clips) // size.num_fitted)
        fit_stacks((decode_video(path.read_bytes()) for path in clips[::step]), mouth)

    caches = {}
    for name in ("train", "valid", *sets):
        caches[name] = folder / "caches" / name
        extract(
            open_source(str(world / name), kind=KIND),
            caches[name],
            encoder={"audio": ["whisper:tiny.en"], "video": [f"{FAMILY}:{mouth.absolute()}"]},
            settings=ExtractSettings(features=("states",), views=noise_views(world, name), chunk_size=64),
            progress=progress,
        )
    return caches


def noise_views(world: Path, name: str) -> tuple[str, ...]:
    """Return the views of a set as `extract` names them. Test sets have the noise of other talkers."""
    tapes = world / "tapes"
    if name not in ("train", "valid"):
        return tuple(f"{VIEW}:{level},tape={tapes / 'babble-test.wav'}" for level in LEVELS_DB)

    babble = (f"{VIEW}:{level},tape={tapes / 'babble.wav'}" for level in LEVELS_DB)
    talker = (f"{VIEW}:{level},tape={tapes / 'talker.wav'}" for level in TALKER_DB)
    return (*babble, *talker)


@dataclass(frozen=True, kw_only=True)
class Runs:
    """The runs of one seed, with the caches that they read.

    Args:
        folder: folder of the runs.
        caches: set -> cache.
        seed: random seed of all trainings.
    """

    folder: Path
    caches: Mapping[str, Path]
    seed: int
    size: Size

    def path(self, name: str) -> Path:
        """Return the folder of a run, whose name may have spaces."""
        return self.folder / name.replace(" ", "-").replace(",", "")

    def train_audio(self, *, progress: Progress | None = None) -> None:
        """Train a recognizer of sound, and derive the states of its encoder."""
        recipe = SpeechRecipe(
            model=self._model("audio"),
            augmentation=SpeechAugmentation(views={"audio": WIDE}),
            measured=(PLAIN, "babble0dB"),
            align_epochs=self.size.align_epochs,
        )
        self._train_stream("audio", "audio", recipe, progress)
        self._derive_states("audio", TRAINING_VIEWS, progress)

    def train_lips(self, *, progress: Progress | None = None) -> None:
        """Train a recognizer of lips by CTC only: with an attention decoder it takes far longer to align."""
        self._train_stream("lips", "video", self._lips_recipe(ctc_weight=1.0), progress)

    def train_video(self, *, progress: Progress | None = None) -> None:
        """Train the recognizer of lips from that encoder and the readouts of the run on sound, and derive its states.

        A decoder that can spell learns in a few epochs which frames to attend to; a new one may need more than all
        epochs. The encoders of both streams also learn to give the readouts similar states, which a gated fusion sums.
        """
        starts = (f"video={self.path('lips')}", *(f"{part}={self.path('audio')}" for part in READOUTS))
        self._train_stream("video", "video", self._lips_recipe(), progress, init_from=starts)
        self._derive_states("video", (PLAIN,), progress)

    def train_fusion(self, name: str, variant: Variant, *, progress: Progress | None = None) -> None:
        """Train a fusion on the states of both finished runs, whose encoders are frozen."""
        recipe = SpeechRecipe(
            model={**self._model("fusion"), "fusion": variant.kind, "fusion_layers": 2},
            augmentation=variant.augmentation,
            measured=(PLAIN, "babble0dB", "babble-10dB"),
        )

        # Encoders start from the run of their own stream, readouts from the stream of the variant.
        sources = {**dict.fromkeys(ENCODERS, ""), **dict.fromkeys(READOUTS, variant.readouts)}
        starts = tuple(f"{part}={self.path(run or part)}" for part, run in sources.items() if run is not None)
        settings = self._settings("fusion", init_from=starts, trainable=PARTS)

        train, valid = [self._utterances(part, ENCODERS) for part in ("train", "valid")]
        states = (self._states("train"), self._states("valid"))
        train_speech(train, valid, self.path(name), recipe, settings, states=states, progress=progress)

    def evaluate(self, name: str, question: "Question", *, progress: Progress | None = None) -> Result:
        """Recognize a test set, unless there is a result of these weights already."""
        weights = Run.open(self.path(name)).info.weights
        compute = partial(self._recognize, self.path(name), question)
        return keep_result(self.folder, question.model, question.test_set, weights, compute, progress)

    def _recognize(self, run: Path, question: "Question") -> Result:
        cache = Cache(self.caches[question.test_set])
        utterances = open_for_run(cache, run, views=TEST_VIEWS, streams=question.streams)

        videos_of = shuffle_videos(utterances, seed=self.seed) if question.is_shuffled else None
        hypotheses = recognize_utterances(run, utterances, TEST_VIEWS, decoding=question.decoding, videos_of=videos_of)

        # References go through the symbols, so that both sides have the same spelling.
        references = [to_text(symbols) for symbols in utterances.symbols]
        clusters_M = word_clusters(utterances)
        return Result(
            seed=self.seed,
            num_examples=len(utterances),
            measures={
                view: MetricValues(count_word_errors(references, texts), clusters_M)
                for view, texts in hypotheses.items()
            },
        )

    def _train_stream(
        self, stage: str, stream: str, recipe: SpeechRecipe, progress: Progress | None, **options: Any
    ) -> None:
        train, valid = [self._utterances(part, (stream,)) for part in ("train", "valid")]
        train_speech(train, valid, self.path(stage), recipe, self._settings(stage, **options), progress=progress)

    def _lips_recipe(self, **options: Any) -> SpeechRecipe:
        return SpeechRecipe(model=self._model("video"), augmentation=SpeechAugmentation(masked=0.05), **options)

    def _derive_states(self, name: str, views: Sequence[str], progress: Progress | None) -> None:
        output = f"{name}-states"
        run_name = f"seed{self.seed}-{name}"
        for part in ("train", "valid"):
            derive_from_run(self.caches[part], self.path(name), output, name=run_name, view=views, progress=progress)

    def _model(self, stage: str) -> dict[str, Any]:
        return {**self.size.model, "dropout": self.size.dropout.get(stage, 0.0)}

    def _utterances(self, part: str, names: Sequence[str]) -> Utterances:
        features = {name: FEATURES[name] for name in names}
        return open_utterances(Cache(self.caches[part]), features, views=_views(names))

    def _states(self, part: str) -> Utterances:
        features = {name: f"seed{self.seed}-{name}/{name}-states" for name in ENCODERS}
        return open_utterances(Cache(self.caches[part]), features, views=_views(ENCODERS))

    def _settings(self, stage: str, **options: Any) -> FitSettings:
        values = {name: getattr(self.size, name)[stage] for name in ("epochs", "batch_size", "lr")}
        return from_flat(FitSettings, {**values, "seed": self.seed, "threads": 1, **options})


@dataclass(frozen=True, kw_only=True)
class Question:
    """A measurement of a run.

    Args:
        model: name of the row in tables.
        test_set: set to recognize.
        streams: streams to use (all if None).
        decoding: the decoder.
        is_shuffled: whether each utterance gets the lips of another one.
    """

    model: str
    test_set: str
    streams: tuple[str, ...] | None = None
    decoding: Decoding = DECODING
    is_shuffled: bool = False


def _views(names: Sequence[str]) -> dict[str, Sequence[str]]:
    return {name: TRAINING_VIEWS if name == "audio" else (PLAIN,) for name in names}


TINY = Size(
    world=TINY_WORLD,
    epochs={"lips": 1, "audio": 2, "video": 1, "fusion": 2},
    align_epochs=1,
    batch_size={"lips": 3, "audio": 3, "video": 3, "fusion": 3},
    model={"width": 32, "num_layers": 1, "decoder_layers": 1, "num_heads": 2, "feed_forward": 64},
    num_fitted=8,
)
"""For tests: everything runs, nothing is learned."""
