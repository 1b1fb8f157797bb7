"""The pipeline of one network for every task: its results over seeds, and all of it from the data to its page."""

import importlib.util
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from safetensors.numpy import load_file

from embedcache.arrays import Array, Floats, normalize
from embedcache.derive.rules import Block
from embedcache.errors import DataError, EmbedcacheError, SettingError
from embedcache.metrics import MetricValues
from embedcache.runs import Run
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from embedcache.store.layout import Axis
from pipelines.results import Result, Results
from pipelines.uniperceiver.answer import answer_question, compute_probabilities
from pipelines.uniperceiver.data import AUDIO_TOKENS, IMAGE_TOKENS, JOIN_GRIDS, WORD_VECTORS, Data
from pipelines.uniperceiver.evaluation import SHUFFLED, load_shared
from pipelines.uniperceiver.measures import MEASURED, MODELS, ZERO_SHOT
from pipelines.uniperceiver.page import COLUMNS, model_table, pretraining_table
from pipelines.uniperceiver.runs import PRETRAINED, Runs, adapted_run, question_name, tuned_run
from pipelines.uniperceiver.tables import EASY_VQA, EMOJI, FASHION, LETTERS, TINY
from pipelines.uniperceiver.tasks import read_tokens
from pipelines.uniperceiver.words import Vocabulary
from pipelines.worlds import easy_vqa
from pipelines.worlds.examples import in_split
from pipelines.worlds.label_sets import FASHION_FOLDER
from tests.pipelines.one_core import run_tiny
from tests.pipelines.test_shapes import HAS_LETTERS

PARTS = ("train", "valid", "test")


def make_result(model: str, question: str, num_right: int, *, seed: int = 0, first_item: int = 0) -> Result:
    """A result on ten examples, of which some are right, and none with items of others."""
    items = np.arange(first_item, first_item + 10)
    measures = {name: MetricValues(np.arange(10) < num_right, items) for name in ("accuracy", "accuracy: open")}
    wrong = {name: MetricValues(np.zeros(10, bool), items) for name in measures}
    return Result(
        model=model,
        question=question,
        seed=seed,
        num_examples=10,
        measures=measures,
        controls={SHUFFLED: wrong},
        chance={"accuracy": 0.25},
        captions={"test/00000": "a red circle"},
    )


def test_joined_tokens_hold_the_cells_that_they_cover() -> None:
    fine = np.arange(64, dtype=np.float32).reshape(1, 64, 1)  # cell number on an 8 x 8 grid
    coarse = -np.arange(16, dtype=np.float32).reshape(1, 16, 1)
    tokens = JOIN_GRIDS.apply([Block(fine), Block(coarse)], {})["tokens"]
    assert isinstance(tokens, np.ndarray)
    assert tokens.shape == (1, 16, 5)
    assert tokens[0, 0].tolist() == [0, 0, 1, 8, 9]
    assert tokens[0, 6].tolist() == [-6, 20, 21, 28, 29]
    assert JOIN_GRIDS.outputs is not None
    assert JOIN_GRIDS.outputs([(64, 40), (16, 112)], {}) == {"tokens": (16, 272)}
    with pytest.raises(SettingError, match="a fraction of its side, got 49 and 16 cells"):
        JOIN_GRIDS.outputs([(49, 40), (16, 112)], {})


def test_tables_hold_means_over_seeds_beside_controls() -> None:
    question = question_name(EASY_VQA, 0.01)
    assert question == "easy-VQA 1 %"
    results = Results(make_result("prompts", question, 4 + seed, seed=seed) for seed in (0, 2))
    columns, (row, chance) = model_table(results, EASY_VQA, 0.01, ["prompts", "missing"], COLUMNS[EASY_VQA])
    assert columns[:3] == ["in %", "all", "open"]
    assert row[0] == "prompts"
    assert row[2].startswith("50.0 [")
    assert row[3:5] == ["", ""]  # not measured
    assert row[5] == "0.0 [0.0, 0.0]"
    assert chance == ["chance", "25.0", "", "", "", "", ""]
    results = Results([make_result(PRETRAINED, "classes", 9)])
    (first, _) = pretraining_table(results, ["classes"])[1]
    assert first[0] == "classes: accuracy"
    assert first[1].startswith("90.0 [")
    assert first[2:] == ["items of others: 0.0", "25.0", "10"]


def test_models_are_compared_on_the_same_items() -> None:
    found = [make_result(model, "q", 4 + seed, seed=seed, first_item=seed) for model in ("a", "b") for seed in (0, 1)]
    results = Results([*found, make_result("other", "q", 6, first_item=1), make_result("other", "q", 7, seed=1)])
    estimate = results.estimate("a", "q", "accuracy")
    assert estimate is not None
    assert estimate.value == pytest.approx(0.45)  # seeds may have items of their own
    means = results.resample([("a", "q"), ("b", "q")], "accuracy")
    np.testing.assert_array_equal(means[:, 0], means[:, 1])  # on the same resamples
    with pytest.raises(DataError, match="expected the same items for all models of a seed"):
        results.resample([("a", "q"), ("other", "q")], "accuracy")
    fewer = Results([*found, make_result("other", "q", 6, first_item=0)])
    with pytest.raises(DataError, match="expected the same seeds for all models on q, got 0, 1 of a, 0 of other"):
        fewer.resample([("a", "q"), ("other", "q")], "accuracy")
    with pytest.raises(DataError, match="expected a result of a, b, other on q, got 'blind'"):
        results.seeds("blind", "q")


@pytest.fixture(scope="class")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny pipeline."""
    folder = tmp_path_factory.mktemp("uniperceiver")
    run_tiny("uniperceiver.__main__", folder)
    return folder


@pytest.mark.slow
@pytest.mark.pipeline
@pytest.mark.skipif(
    not (HAS_LETTERS and FASHION_FOLDER.is_dir() and importlib.util.find_spec("easy_vqa")),
    reason="needs easy-vqa and the packages of .ci/run",
)
@pytest.mark.filterwarnings("ignore:The number of unique classes:UserWarning:sklearn")  # of a few examples
class TestTinyPipeline:
    def test_data_is_complete(self, folder: Path) -> None:
        data = Data(folder)
        for name in ("shapes", "vqa", "emoji", "fashion"):
            feature = Cache(data.cache(name)).feature("image", IMAGE_TOKENS)
            assert feature.shape[1:] == (16, 272)
            assert feature.axis == Axis(kind="grid", rows=4, columns=4, box=(0.0, 0.0, 1.0, 1.0))
        assert Cache(data.cache("letters")).feature("audio", AUDIO_TOKENS).shape == (52, -1, 384)
        words = data.words_path.read_text().split()
        vocabulary = Vocabulary(words)
        cache = Cache(data.cache("words"))
        assert cache.feature("text", WORD_VECTORS).shape == (len(words), 384)
        caches = {"descriptions": None, "vqa": "vqa", "emoji-captions": "emoji", "letters-classes": "letters"}
        caches |= {f"shapes-{name}": "shapes" for name in ("classes", "captions", "statements")}
        caches["fashion-classes"] = "fashion"
        for name, home in caches.items():
            examples = data.examples(name)
            texts = [text for column in ("text", "target") for text in data.distinct(name, column)]
            assert vocabulary.require_known(texts, name).num_texts == len(texts)
            if home is not None:
                keys = pc.unique(examples["key"].combine_chunks())
                known = Cache(data.cache(home)).samples["key"].combine_chunks()
                assert pc.all(pc.is_in(keys, known)).as_py()

    def test_writes_its_page(self, folder: Path) -> None:
        html = (folder / "uniperceiver.html").read_text()
        assert "No figure of the paper is repeated" in html
        assert html.count("<svg") == 2
        page = (folder / "uniperceiver.md").read_text()
        for name in ("uniperceiver-curves.svg", "uniperceiver-images.jpg"):
            assert name in page
            assert (folder / name).is_file()
        results, (fraction,) = Results.read(folder), TINY.fractions
        for question in MEASURED:
            assert f"| {question}: " in page
        assert results.seeds(PRETRAINED, "captions")[0].captions
        for data, part in [(EASY_VQA, fraction), *TINY.other_fractions.items()]:
            assert results.models(question_name(data, 0)) == [ZERO_SHOT]
            assert set(results.models(question_name(data, part))) == set(MODELS[data])
        assert set(results.models(question_name(LETTERS, 1))) == set(MODELS[LETTERS])
        (heard,) = results.seeds("new adapter", question_name(LETTERS, 1))
        assert len(np.unique(heard.measures["accuracy"].clusters_M)) == heard.num_examples == 52  # each recording once
        assert heard.num_trained == 26

    def test_runs_train_what_they_should(self, folder: Path) -> None:
        runs = Runs(folder=folder / "seed0", data=Data(folder), seed=0, size=TINY)
        _, groups = runs.tables.test_of(EASY_VQA)
        assert groups.keys() == {"open", "yes-no", "negated"}
        assert (np.stack(list(groups.values())).sum(axis=0) == 1).all()  # each question is of one kind
        check_parts(runs)
        check_trained(runs)

    def test_answers_about_an_image_as_about_cached_tokens(self, folder: Path, tmp_path: Path) -> None:
        runs = Runs(folder=folder / "seed0", data=Data(folder), seed=0, size=TINY)
        run = runs.path(tuned_run("prompts", EASY_VQA, TINY.fractions[0]))
        source = open_source("8", kind=easy_vqa.KIND)
        sample = next(iter(source.samples()))
        (tmp_path / "photo.jpg").write_bytes(source.read(sample.images[0]))  # a PNG by another name
        answers = answer_question(run, tmp_path / "photo.jpg", "what color is the shape?")

        media = runs.tables.media("vqa")
        tokens = read_tokens(media, media.find_rows(pa.chunked_array([[sample.key]])), device="cpu")
        names = runs.data.distinct("vqa")
        network, _ = load_shared(run)
        (expected,) = compute_probabilities(
            network, tokens, names, kind="answer", questions=["what color is the shape?"]
        )
        assert answers == pytest.approx(dict(zip(names, expected.tolist(), strict=True)))

        (tmp_path / "text.png").write_text("not an image")
        for path, message in ((tmp_path / "text.png", "cannot be decoded"), (tmp_path / "none.png", "not a file")):
            with pytest.raises(EmbedcacheError, match=message):
                answer_question(run, path, "what?")
        with pytest.raises(DataError, match="one task of answers"):
            answer_question(runs.path(PRETRAINED), tmp_path / "photo.jpg", "what?")

    def test_resumes(self, folder: Path) -> None:
        made = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
        run_tiny("uniperceiver.__main__", folder)
        changed = {path for path in made if path.stat().st_mtime_ns != made[path]}
        assert not [path for path in changed if path.suffix == ".parquet" or path.name == "words.txt"]
        assert not [path for path in changed if path.suffix in {".json", ".safetensors"} and "seed0" in path.parts]


def check_parts(runs: Runs) -> None:
    """No item is in two of training, validation and test; no two captions of emoji in two parts are alike."""
    for data in (EASY_VQA, FASHION, EMOJI):
        task = runs.tables.tuning(data, 1, seed=0)[0]
        parts = [task.train, task.validation, runs.tables.test_of(data)[0]]
        rows = [np.unique(part.rows_N) for part in parts if part.rows_N is not None]
        assert len(rows) == 3
        assert len(np.unique(np.concatenate(rows))) == sum(map(len, rows))
    captions = {part: set(in_split(runs.data.emoji_captions(), part)["target"].to_pylist()) for part in PARTS}
    texts, vectors_ND = open_texts(runs.data)
    near = vectors_ND @ vectors_ND.T > 0.7
    part_N = [next(part for part, of_part in captions.items() if text in of_part) for text in texts]
    assert all(part_N[a] == part_N[b] for a, b in zip(*np.nonzero(near), strict=True))
    assert set(part_N) == set(PARTS)
    names = runs.tables.speakers()
    assert len(np.unique(runs.tables.letters(*names).train.rows_N)) == 26 * len(names)


def open_texts(data: Data) -> tuple[list[str], Floats]:
    """Return the captions of emoji and their vectors, of length 1."""
    cache = Cache(data.cache("emoji"))
    feature = cache.feature("text", WORD_VECTORS)
    texts = cache.items("text")["text"].to_pylist()
    return texts, normalize(np.asarray(feature.gather(np.arange(len(texts))), np.float32))


def check_trained(runs: Runs) -> None:
    """A new adapter is all that is trained for recordings; the transformer stays as it was in prompt tuning."""
    start = load_weights(runs.path(PRETRAINED))
    for run, changed in [
        (adapted_run("new adapter", runs.tables.speakers()[0]), ("adapters.audio.", "classifiers.classify.")),
        (tuned_run("prompts", EMOJI, 1), ("prompts.", "norm", "classifiers.")),
    ]:
        weights = load_weights(runs.path(run))
        assert all(
            name in start and np.array_equal(values, start[name])
            for name, values in weights.items()
            if not any(part in name for part in changed)
        )
    settings = Run.open(runs.path(adapted_run("new adapter", "klettres-us"))).info.settings
    assert settings["parts"]["trainable"] == "audio+scale-classify"


def load_weights(run: Path) -> dict[str, Array]:
    """Return the weights of a run by name."""
    return load_file(run / "model.safetensors")
