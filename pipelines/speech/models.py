"""What the pipeline of audio-visual speech recognition compares: models, what is measured of each, and their page."""

from collections.abc import Collection, Mapping, Sequence

from embedcache.networks.settings import DecodingSettings
from pipelines.speech.page import Layout
from pipelines.speech.results import Roles
from pipelines.speech.steps import LOUD, NARROW, Question, Variant

AUDIO, VIDEO, DEEP = "audio", "video", "video, as deep as the fusion"
FUSION, ROBUST, NARROW_NOISE, PAPER = "both", "both, dropout", "both, narrow noise", "both, concatenated"
FUSIONS: Mapping[str, Variant] = {
    FUSION: Variant(noise=LOUD, missing={"audio": 0.1}),
    ROBUST: Variant(noise=LOUD, missing={"audio": 0.2, "video": 0.15}),
    DEEP: Variant(readouts="video", missing={"audio": 1.0}),
    NARROW_NOISE: Variant(noise=NARROW),
}
ABLATIONS: Mapping[str, Variant] = {
    PAPER: Variant(kind="concat", readouts=None, noise=LOUD),
    "both, concatenated, readouts of audio": Variant(kind="concat", noise=LOUD, missing={"audio": 0.1}),
    "both, gated, new readouts": Variant(readouts=None, noise=LOUD, missing={"audio": 0.1}),
    "both, readouts of video": Variant(readouts="video", noise=LOUD, missing={"audio": 0.1}),
    "both, lips swapped and shifted": Variant(noise=LOUD, missing={"audio": 0.1}, swapped=0.1, shift_s=0.04),
}
GREEDY, AS_PUBLISHED = DecodingSettings(decoder="ctc"), DecodingSettings()


def questions(name: str, sets: Sequence[str]) -> list[tuple[str, Question]]:
    """Return what is measured of a run."""
    if name == DEEP:
        return [(name, Question(model=name, test_set="A", streams=("video",)))]
    asked = [Question(model=name, test_set=of) for of in (sets if name in (AUDIO, VIDEO, FUSION, ROBUST) else ("A",))]
    if name in (AUDIO, FUSION):
        asked.append(Question(model=f"{name}, greedy", test_set="A", decoding=GREEDY))
        asked.append(Question(model=f"{name}, λ 0.1", test_set="A", decoding=AS_PUBLISHED))
    if name in (FUSION, ROBUST):
        asked.append(Question(model=f"{name}, lips of others", test_set="A", is_shuffled=True))
    if name == ROBUST:
        asked.append(Question(model=f"{name}, without video", test_set="A", streams=("audio",)))
        asked.append(Question(model=f"{name}, without audio", test_set="A", streams=("video",)))
    return [(name, question) for question in asked]


def page_layout(fusions: Collection[str], *, is_ablated: bool) -> Layout:
    """Return what the page shows of the models that were trained."""
    roles = [
        Roles(
            fusion=name,
            audio=AUDIO,
            video=VIDEO,
            deep_video=DEEP if DEEP in fusions else None,
            without_video=f"{name}, without video" if name == ROBUST else None,
            without_audio=f"{name}, without audio" if name == ROBUST else None,
            shuffled=f"{name}, lips of others",
            greedy=(f"{name}, greedy",) if name == FUSION else (),
        )
        for name in fusions
        if name in (FUSION, ROBUST)
    ]
    return Layout(
        models=[AUDIO, VIDEO, *fusions],
        curves=[AUDIO, VIDEO, *fusions],
        controls=[NARROW_NOISE, DEEP],
        roles=roles,
        single=(AUDIO, VIDEO),
        confused=[AUDIO, FUSION],
        ablations={
            "Decoders": [f"{name}{decoder}" for name in (AUDIO, FUSION) for decoder in ("", ", greedy", ", λ 0.1")],
            **({"What else was tried": [FUSION, *ABLATIONS]} if is_ablated else {}),
        },
    )
