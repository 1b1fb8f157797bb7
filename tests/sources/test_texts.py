import json
from pathlib import Path

import pytest

from embedcache.sources import Sample, Source, SourceSettings, open_source
from embedcache.testing.sources import SourceContract
from tests.sources.files import reopen, write

NAMES = "T-shirt/top\nTrouser\nankle boot\n"
TEMPLATES = "a photo of a {c}.\n{c}, on a table\n"


class TestPrompts(SourceContract):
    has_images = False

    @pytest.fixture
    def source(self, tmp_path: Path) -> Source:
        write(tmp_path, {"names.txt": NAMES, "templates.txt": TEMPLATES})
        return open_source(f"prompts:{tmp_path}/names.txt+{tmp_path}/templates.txt")


def samples_of(location: object, *languages: str) -> list[Sample]:
    return list(open_source(f"prompts:{location}", settings=SourceSettings(languages=languages)).samples())


def prompts(sample: Sample) -> list[str]:
    return [item.text for item in sample.texts]


def test_class_columns_and_prompts(tmp_path: Path) -> None:
    write(tmp_path, {"names.txt": NAMES, "templates.txt": TEMPLATES})
    found = samples_of(f"{tmp_path}/names.txt+{tmp_path}/templates.txt")
    assert [sample.columns for sample in found] == [
        {"class": "T-shirt/top", "label": 0},
        {"class": "Trouser", "label": 1},
        {"class": "ankle boot", "label": 2},
    ]
    assert prompts(found[2]) == ["a photo of a ankle boot.", "ankle boot, on a table"]
    assert prompts(samples_of(tmp_path / "names.txt")[1]) == ["Trouser", "a photo of a Trouser."]


def test_sub_folders_are_classes(tmp_path: Path) -> None:
    write(tmp_path, {"pecan_pie/1.jpg": b"", "apple_pie/1.jpg": b""})
    found = samples_of(tmp_path)
    assert [sample.columns["class"] for sample in found] == ["apple_pie", "pecan_pie"]
    assert prompts(found[0]) == ["apple pie", "a photo of a apple pie."]


def test_json_prompts(tmp_path: Path) -> None:
    write(tmp_path, {"p.json": json.dumps({"cat": ["Eine Katze.", "Sie miaut."], "dog": "Ein Hund."})})
    assert [prompts(sample) for sample in samples_of(tmp_path / "p.json")] == [
        ["Eine Katze.", "Sie miaut."],
        ["Ein Hund."],
    ]


@pytest.mark.slow
def test_clip_benchmark_datasets() -> None:
    found = samples_of("imagenet1k")
    assert len(found) == 1000
    assert {len(sample.texts) for sample in found} == {80}
    assert len({sample.key for sample in found}) == 1000  # two names occur twice
    assert prompts(found[0])[0] == "a bad photo of a tench."
    assert prompts(samples_of("flowers+imagenet1k")[0])[0] == "a bad photo of a pink primrose."
    assert samples_of("imagenet1k", "it")[1].texts[0].text == "una brutta foto di un pesce rosso"


@pytest.mark.parametrize(("classes", "templates"), [("c+x/n.txt", "t.txt"), ("c+x", "t.txt")])
def test_paths_of_classes_may_have_plus(
    tmp_path: Path, classes: str, templates: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = classes if classes.endswith(".txt") else f"{classes}/classnames.txt"
    write(tmp_path, {names: NAMES, templates: TEMPLATES, "c": ""})
    monkeypatch.chdir(tmp_path)
    source = open_source(f"prompts:{classes}+{templates}")
    assert source.describe()["path"] == f"{tmp_path}/{classes}+{tmp_path}/{templates}"
    samples = list(source.samples())
    assert [prompts(sample) for sample in samples][1] == ["a photo of a Trouser.", "Trouser, on a table"]
    assert list(reopen(source.describe()).samples()) == samples


TEXTS = ["a photo of a cat", "ein Käse", "猫"]


class TestTextFile(SourceContract):
    has_images = False

    @pytest.fixture
    def source(self, tmp_path: Path) -> Source:
        return open_source(write(tmp_path, {"prompts.txt": "\n".join(TEXTS)}) / "prompts.txt")


def test_one_sample_per_line(tmp_path: Path) -> None:
    write(tmp_path, {"p.txt": "\ufeffone \r\n\r\nthree\n"})
    samples = list(open_source(tmp_path / "p.txt").samples())
    assert [item.text for sample in samples for item in sample.texts] == ["one", "", "three"]
    assert [sample.key for sample in samples] == ["p/0", "p/1", "p/2"]
