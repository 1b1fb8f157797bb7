import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from embedcache.arrays import Inputs, normalize
from embedcache.dataset.vectors import Vectors
from embedcache.errors import DataError, EmbedcacheError, FingerprintError, PathError, SourceError, UnknownNameError
from embedcache.extract.extract import extract
from embedcache.progress import to_progress
from embedcache.projectors.base import project
from embedcache.runs import Run
from embedcache.search import concepts as concepts_module
from embedcache.search.concepts import open_concepts
from embedcache.sources import open_source
from embedcache.store.cache import Cache
from embedcache.vectors.opening import open_vectors
from tests.images import COLORS, write_images
from tests.toy import IMAGE, TEXT
from tests.vectors.cases import import_files, write_tree
from tests.vectors.runs import SIDES, train_run

NAMES = sorted(COLORS)
TEMPLATES = ("bar on {c}", "a {c} ground", "{c}")


@pytest.fixture(scope="module")
def run_path(cache_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_run(cache_path, tmp_path_factory.mktemp("run") / "run", *SIDES["vectors"])


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prompt_cache(tmp_path_factory.mktemp("prompts"), NAMES)


@pytest.fixture(scope="module")
def labeled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty images in a folder for each background, one of them broken."""
    folder = tmp_path_factory.mktemp("labeled")
    return labeled_cache(folder, 60, broken=["00007"])


def prompt_cache(folder: Path, names: Sequence[str], text: str = TEXT) -> Path:
    (folder / "names.txt").write_text("\n".join(names))
    (folder / "templates.txt").write_text("\n".join(TEMPLATES))
    source = open_source(f"prompts:{folder / 'names.txt'}+{folder / 'templates.txt'}")
    extract(source, folder / "prompts", text_encoder=[text])
    return folder / "prompts"


def labeled_cache(folder: Path, count: int, *, broken: Sequence[str] = (), image: str = IMAGE) -> Path:
    image_folder = write_images(folder / "all", count, seed=5)
    for path in sorted(image_folder.glob("*.png")):
        back = path.with_suffix(".txt").read_text().split()[-1]
        (folder / "sorted" / back).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / "sorted" / back)
        if path.stem in broken:
            (folder / "sorted" / back / path.name).write_bytes(b"not an image")
    extract(open_source(folder / "sorted"), folder / "cache", image_encoder=[image])
    return folder / "cache"


def test_prompts_are_averaged(cache_path: Path, prompts: Path) -> None:
    concepts = open_concepts(prompts, Vectors(cache_path, "text", "open_toy/mean"))
    texts = normalize(Cache(prompts).feature("text").load())
    expected = normalize(texts.reshape(len(NAMES), len(TEMPLATES), -1).mean(axis=1))
    np.testing.assert_allclose(concepts.vectors, expected, atol=1e-6)
    assert concepts.names == NAMES
    assert concepts.counts.tolist() == [len(TEMPLATES)] * len(NAMES)
    assert concepts.source["texts"] == [template.replace("{c}", NAMES[0]) for template in TEMPLATES]


@pytest.mark.parametrize("modality", ["image", "text"])
def test_run_projects_prompts(cache_path: Path, prompts: Path, run_path: Path, modality: str) -> None:
    concepts = open_concepts(prompts, Vectors(cache_path, modality, run_path=run_path))
    run = Run.open(run_path)
    texts = project(run.pair.tower("text"), Inputs(Cache(prompts).feature("text").load()))
    expected = normalize(texts.reshape(len(NAMES), len(TEMPLATES), -1).mean(axis=1))
    np.testing.assert_allclose(concepts.vectors, expected, atol=1e-5)
    assert (concepts.source["run"], concepts.source["run_weights"]) == (str(run_path), run.info.weights)


def test_prototypes_are_means_of_examples(cache_path: Path, labeled: Path) -> None:
    concepts = open_concepts(labeled, Vectors(cache_path, "image", "open_toy/cls"))
    feature = Cache(labeled).feature("image", "open_toy/cls")
    labels = np.array(Cache(labeled).samples["label"].to_pylist())
    images = normalize(np.nan_to_num(feature.load()))
    assert concepts.names == NAMES
    for number, name in enumerate(NAMES):
        chosen = (labels == name) & feature.valid
        np.testing.assert_allclose(concepts.vectors[number], normalize(images[chosen].mean(axis=0)), atol=1e-5)
        assert concepts.counts[number] == chosen.sum()
    assert concepts.counts.sum() == 59


def test_examples_are_a_sample(cache_path: Path, labeled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(concepts_module, "MAX_EXAMPLES", 3)
    one, again = (open_concepts(labeled, Vectors(cache_path, "image", "open_toy/cls")) for _ in range(2))
    assert one.counts.tolist() == [3] * len(NAMES)
    assert np.array_equal(one.vectors, again.vectors)
    np.testing.assert_allclose(np.linalg.norm(one.vectors, axis=1), 1, atol=1e-6)


def test_run_projects_examples(cache_path: Path, labeled: Path, run_path: Path) -> None:
    concepts = open_concepts(labeled, Vectors(cache_path, "text", run_path=run_path))
    feature = Cache(labeled).feature("image", "open_toy/cls")
    labels = np.array(Cache(labeled).samples["label"].to_pylist())
    rows = np.flatnonzero((labels == NAMES[0]) & feature.valid)
    images = project(Run.open(run_path).pair.image, Inputs(feature.gather(rows)))
    np.testing.assert_allclose(concepts.vectors[0], normalize(images.mean(axis=0)), atol=1e-5)


def test_labeled_images_may_have_a_column_class(tmp_path: Path) -> None:
    image_folder = write_images(tmp_path / "images", 4)
    rows = [f"{path},red bar,{kind},x\n" for path, kind in zip(sorted(image_folder.glob("*.png")), "abab", strict=True)]
    for header, encoders in (("image,caption,class,label", {"text_encoder": [TEXT]}), ("image,about,class,label", {})):
        (tmp_path / "table.csv").write_text("".join([f"{header}\n", *rows]))
        path = tmp_path / header.replace(",", "-")
        extract(open_source(tmp_path / "table.csv"), path, image_encoder=[IMAGE], **encoders)  # type: ignore[arg-type]
        concepts = open_concepts(path, Vectors(path, "image", "open_toy/cls"), label="class")
        assert (concepts.names, concepts.counts.tolist(), concepts.source["of"]) == (["a", "b"], [2, 2], "examples")
    assert open_concepts(path, Vectors(path, "image", "open_toy/cls")).names == ["x"]  # there are no prompts


def test_incomparable_concepts_raise(
    cache_path: Path, prompts: Path, labeled: Path, run_path: Path, tmp_path: Path
) -> None:
    images, texts = Vectors(cache_path, "image", "open_toy/cls"), Vectors(cache_path, "text", "open_toy/mean")
    other = prompt_cache(tmp_path, NAMES, f"{TEXT},scale=2")
    wrong: list[tuple[Path, Vectors, dict[str, Any], type[EmbedcacheError], str]] = [
        (prompts, images, {}, DataError, "prompts"),
        (labeled, texts, {}, UnknownNameError, "text features"),
        (labeled, images, {"label": "labl"}, UnknownNameError, "labl"),
        (other, texts, {}, FingerprintError, "weights"),
        (other, Vectors(cache_path, "image", run_path=run_path), {}, FingerprintError, "run's text"),
    ]
    for path, pool, options, error, word in wrong:
        with pytest.raises(error, match=word):
            open_concepts(path, pool, **options)


def test_names_of_a_file_are_encoded_once(
    cache_path: Path, run_path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They are the prompts of `extract prompts:FILE`; the same bytes reuse the folder, others have one of their own."""
    names = tmp_path / "names.txt"
    names.write_text("\n".join(NAMES))
    extract(open_source(f"prompts:{names}"), tmp_path / "prompts", text_encoder=[TEXT])
    pool = Vectors(cache_path, "image", run_path=run_path)

    concepts = open_concepts(names, pool, progress=to_progress(True))
    expected = open_concepts(tmp_path / "prompts", pool)
    folder = Path(concepts.source["cache"])
    assert concepts.names == expected.names == NAMES
    np.testing.assert_array_equal(concepts.vectors, expected.vectors)
    assert str(folder) in capsys.readouterr().err

    files = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert open_concepts(names, Vectors(cache_path, "text", "open_toy/mean")).source["cache"] == str(folder)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == files

    names.write_text("\n".join(NAMES[1:]))
    assert open_concepts(names, pool).names == NAMES[1:]
    assert open_concepts(folder, pool).names == NAMES


def test_names_that_cannot_be_compared_write_nothing(cache_path: Path, run_path: Path, tmp_path: Path) -> None:
    (tmp_path / "names.txt").write_text("red\n\nblue")
    wrong: list[tuple[str, Vectors, type[EmbedcacheError]]] = [
        ("names.txt", Vectors(cache_path, "image", "open_toy/cls"), DataError),
        ("names.txt", Vectors(cache_path, "image", run_path=run_path), SourceError),
        ("none.txt", Vectors(cache_path, "image", run_path=run_path), PathError),
    ]
    for name, pool, error in wrong:
        with pytest.raises(error, match=r"\.txt"):
            open_concepts(tmp_path / name, pool)
    assert [path.name for path in tmp_path.iterdir()] == ["names.txt"]


def test_repeated_names_are_refused_or_joined(cache_path: Path, tmp_path: Path) -> None:
    names = ["red", "blue", "green", "white", "black", "yellow"]
    cache, pool = Cache(prompt_cache(tmp_path, names * 2)), Vectors(cache_path, "text", "open_toy/mean")
    with pytest.raises(DataError, match="'red' 2 times"):
        open_concepts(cache.path, pool)
    concepts = open_concepts(cache.path, pool, join_names=True)
    assert (concepts.names, concepts.counts.tolist()) == (names, [6] * 6)
    texts = normalize(cache.feature("text").load()).reshape(2, 6, 3, -1)
    np.testing.assert_allclose(concepts.vectors, normalize(texts.mean(axis=(0, 2))), atol=1e-6)


def test_examples_that_cancel_and_missing_labels_raise(tmp_path: Path) -> None:
    unit = np.eye(8, dtype=np.float16)[[0, 1, 2, 2, 3, 4]]
    unit[3] *= -1
    labels: list[object] = ["a", "a", "b", "b", None, ""]
    tree = write_tree(tmp_path / "tree", unit, label=labels, none=[None, "", None, "", None, ""])
    cache, _ = import_files(open_vectors("clip-retrieval", tree), tmp_path / "cache")
    with pytest.raises(DataError, match="zero"):
        open_concepts(cache.path, Vectors(cache.path, "image"))
    with pytest.raises(DataError, match="none"):
        open_concepts(cache.path, Vectors(cache.path, "image"), label="none")


def test_concept_without_example_raises(cache_path: Path, tmp_path: Path) -> None:
    (tmp_path / "p.csv").write_text("class,caption\nred,red\nblue,\n")
    extract(open_source(tmp_path / "p.csv"), tmp_path / "prompts", text_encoder=[TEXT])
    with pytest.raises(DataError, match="blue"):
        open_concepts(tmp_path / "prompts", Vectors(cache_path, "text", "open_toy/mean"))
    reds = [f"{number:05d}" for number in range(60)]
    broken = Cache(labeled_cache(tmp_path, 2, broken=reds[1:]))
    with pytest.raises(DataError, match="label"):
        open_concepts(broken.path, Vectors(cache_path, "image", "open_toy/cls"))
