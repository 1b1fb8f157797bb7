"""What the pipeline of audio-visual speech recognition compares: models, what is measured of each, and their page."""

from collections.abc import Collection, Mapping, Sequence

from embedcache.networks.settings import DecodingSettings
from pipelines.speech.page import Layout
from pipelines.speech.results import Roles
from pipelines.speech.steps import LOUD, NARROW, Question, Variant

AUDIO, VIDEO, DEEP = "audio", "video", "video, as deep as the fusion"
FUSION, NARROW_NOISE, PAPER = "both", "both, narrow noise", "both, concatenated"
MISSING = {"audio": 0.3, "video": 0.1}
FUSIONS: Mapping[str, Variant] = {
    FUSION: Variant(noise=LOUD, missing=MISSING),
    DEEP: Variant(readouts="video", missing={"audio": 1.0}),
}
ABLATIONS: Mapping[str, Variant] = {
    NARROW_NOISE: Variant(noise=NARROW, missing=MISSING),
    PAPER: Variant(kind="concat", readouts=None, noise=LOUD),
    "both, nothing missing": Variant(noise=LOUD),
    "both, lips swapped and shifted": Variant(noise=LOUD, missing=MISSING, swapped=0.1, shift_s=0.04),
}
GREEDY, AS_PUBLISHED = DecodingSettings(decoder="ctc"), DecodingSettings()


def questions(name: str, sets: Sequence[str]) -> list[tuple[str, Question]]:
    """Return what is measured of a run."""
    if name == DEEP:
        return [(name, Question(model=name, test_set="A", streams=("video",)))]
    asked = [Question(model=name, test_set=of) for of in (sets if name in (AUDIO, VIDEO, FUSION) else ("A",))]
    if name in (AUDIO, FUSION):
        asked.append(Question(model=f"{name}, greedy", test_set="A", decoding=GREEDY))
        asked.append(Question(model=f"{name}, λ 0.1", test_set="A", decoding=AS_PUBLISHED))
    if name == FUSION:
        asked.append(Question(model=f"{name}, lips of others", test_set="A", is_shuffled=True))
        asked.append(Question(model=f"{name}, without video", test_set="A", streams=("audio",)))
        asked.append(Question(model=f"{name}, without audio", test_set="A", streams=("video",)))
    return [(name, question) for question in asked]


def page_layout(models: Collection[str]) -> Layout:
    """Return what the page shows of the fusions that were trained."""
    roles = Roles(
        fusion=FUSION,
        audio=AUDIO,
        video=VIDEO,
        deep_video=DEEP,
        without_video=f"{FUSION}, without video",
        without_audio=f"{FUSION}, without audio",
        shuffled=f"{FUSION}, lips of others",
        greedy=(f"{FUSION}, greedy",),
    )
    tried = [name for name in models if name not in FUSIONS]
    return Layout(
        models=[AUDIO, VIDEO, *FUSIONS],
        curves=[AUDIO, VIDEO, *FUSIONS, *(name for name in tried if name == NARROW_NOISE)],
        controls=[NARROW_NOISE, DEEP],
        roles=[roles],
        single=(AUDIO, VIDEO),
        confused=[AUDIO, FUSION],
        ablations={
            "One stream, decoders": [
                *(f"{name}{decoder}" for name in (AUDIO, FUSION) for decoder in ("", ", greedy", ", λ 0.1")),
                *(f"{FUSION}, {how}" for how in ("without video", "without audio", "lips of others")),
            ],
            **({"What else was tried": [FUSION, *tried]} if tried else {}),
        },
    )
