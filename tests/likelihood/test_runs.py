"""`train --task likelihood` and `evaluate likelihood`, as a shell would run them."""

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import embedcache as package
from embedcache.dataset.settings import SplitSettings
from embedcache.likelihood.runs import train_tasks
from embedcache.store.cache import Cache
from embedcache.train.settings import FitSettings, LikelihoodSettings, OptimizerSettings
from tests.cli.run import Result, embedcache, succeed
from tests.train.likelihood_cases import tables
from tests.train.runs import interrupted_after

TASKS = """
[caption]
kind = "caption"
weight = 2
batch_size = 16

[classify]
kind = "classify"
examples = "classes.parquet"

[color]
kind = "answer"
examples = "answers.parquet"
candidates = "colors.txt"
has_head = true

[masked]
kind = "masked"

[retrieve]
kind = "retrieve"
mined = 2

[texts]
kind = "answer"
examples = "texts.parquet"
validation = "texts.parquet"
"""
SIZES = "--width 32 --num-layers 1 --num-heads 2 --feed-forward 32"
SHORT = "--epochs 1 --steps-per-epoch 6 --threads 1"


@pytest.fixture(scope="module")
def folder(squares_paths: tuple[Path, Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the caches `cache` and `words`, tables of examples, and `tasks.toml`."""
    folder = tmp_path_factory.mktemp("tasks")
    for name, path in (("cache", squares_paths[0]), ("words", squares_paths[2])):
        (folder / name).symlink_to(path)
    found = tables(Cache(squares_paths[0]))
    parts = pa.array(["val" if number % 5 == 1 else "test" if number % 5 == 2 else "train" for number in range(60)])
    pq.write_table(found["classify"], folder / "classes.parquet")
    pq.write_table(found["answer"].append_column("split", parts), folder / "answers.parquet")
    pq.write_table(found["texts"], folder / "texts.parquet")
    pq.write_table(pa.table({"target": ["a"], "split": [["train"]]}), folder / "lists.parquet")
    blanks = {"text": ["_ is _"] * 2, "target": ["red"] * 2, "split": ["train", "val"]}
    pq.write_table(pa.table(blanks), folder / "blanks.parquet")
    (folder / "colors.txt").write_text("red\ngreen\n\nblue\n")
    (folder / "tasks.toml").write_text(TASKS)
    return folder


def train(run: str, options: str = "", *, sizes: str = SIZES) -> list[str]:
    line = f"--task likelihood --task-file tasks.toml --words words --split key {sizes} {SHORT} {options}"
    return ["train", "cache", run, *line.split()]


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    """A run of all tasks, and what was printed."""
    (folder / "train.out").write_text(succeed(*train("run"), cwd=folder))
    return folder / "run"


@pytest.mark.slow
def test_a_run_is_trained_and_reused(folder: Path, run: Path) -> None:
    assert "run: trained: " in (folder / "train.out").read_text()
    config = json.loads((run / "config.json").read_text())
    assert [task["name"] for task in config["training"]["tasks"]] == [
        *("caption", "classify", "color", "masked", "retrieve", "texts")
    ]
    assert config["training"]["tasks"][2]["candidates"] == ["red", "green", "blue"]
    assert config["training"]["tasks"][4]["mined"]["k"] == 2
    assert (config["arguments"]["width"], config["arguments"]["heads"]) == (32, {"color": 3})
    assert (run / "split.parquet").is_file()
    assert "reused" in succeed(*train("run"), cwd=folder)
    again = "train cache run --config run/config.json --task-file tasks.toml --words words"
    assert "reused" in succeed(*again.split(), cwd=folder)
    other = embedcache(*train("run", "--lr 0.5"), cwd=folder)
    assert (other.code, other.stderr.count("\n")) == (1, 1)
    assert "lr: stored 0.001, requested 0.5" in other.stderr


@pytest.mark.slow
def test_a_run_is_measured_on_its_tasks(folder: Path, run: Path) -> None:
    line = "evaluate likelihood cache run --task-file tasks.toml --shuffle-items --omit-items --output report.json"
    shown = succeed(*line.split(), cwd=folder)
    for expected in ("caption accuracy", "word accuracy", "item to text r@1", "items of others", "chance"):
        assert expected in shown
    assert "WARNING: run was trained on these examples of texts" in shown
    assert "of color" not in shown
    (model,) = json.loads((folder / "report.json").read_text())["models"]
    tasks = {task["task"]: task for task in model["tasks"]}
    # of 60 samples: 15 by their keys, 12 by the column of the table, all of the texts
    counts = {name: task["num_examples"] for name, task in tasks.items()}
    assert counts == {"caption": 15, "classify": 15, "color": 12, "masked": 15, "retrieve": 15, "texts": 60}
    assert set(tasks["color"]["controls"]) == {"items of others", "without items"}
    assert tasks["retrieve"]["controls"] == {}
    assert tasks["color"]["chance"] == {"accuracy": pytest.approx(1 / 3, abs=1e-4)}
    assert tasks["color"]["measures"]["accuracy"]["interval"][0] >= 0
    assert len(tasks["caption"]["captions"]) == 15


@pytest.mark.slow
def test_training_examples_among_all_are_named(folder: Path, run: Path) -> None:
    (folder / "two.toml").write_text(
        '[color]\nkind = "answer"\nexamples = "answers.parquet"\n[retrieve]\nkind = "retrieve"\n'
    )
    shown = {
        part: succeed(*f"evaluate likelihood cache run --task-file two.toml --part {part}".split(), cwd=folder)
        for part in ("all", "train", "val")
    }
    for task in ("color", "retrieve"):
        warned = {part: f"WARNING: run was trained on these examples of {task}" in text for part, text in shown.items()}
        assert warned == {"all": True, "train": True, "val": False}


def test_a_run_answers_with_its_own_candidates(run: Path, folder: Path) -> None:
    model = package.load(run, kind="likelihood")
    cache = Cache(folder / "cache")
    scores = model.answer(cache, "what color is the left square?", task="color")
    assert scores.names == ("red", "green", "blue")
    assert len(model.caption(cache, max_length=2)) == 60


@pytest.mark.slow
def test_a_label_head_is_used_for_its_own_candidates_only(folder: Path, run: Path) -> None:
    def measure(candidates: str) -> dict[str, Any]:
        (folder / "own.toml").write_text(f'[color]\nkind = "answer"\nexamples = "answers.parquet"\n{candidates}')
        shown = succeed(*["evaluate", "likelihood", "cache", "run", "--task-file", "own.toml", "--json"], cwd=folder)
        found: dict[str, Any] = json.loads(shown)["models"][0]["tasks"][0]
        return found

    expected = measure("")
    assert measure('candidates = ["blue", "red", "green"]')["measures"] == expected["measures"]
    assert measure('candidates = ["red", "green", "blue", "left"]')["chance"]["accuracy"] == pytest.approx(0.25)


@pytest.mark.slow
def test_seeds_are_averaged_and_prompts_tuned(folder: Path, run: Path) -> None:
    (folder / "color.toml").write_text(TASKS[TASKS.index("[color]") : TASKS.index("[masked]")])
    line = "train cache RUN --task likelihood --task-file color.toml --words words --init-from run"
    line += f" --trainable prompts+norms+scales+heads --num-prompts 2 {SHORT} --seed SEED"
    for seed in "01":
        shown = succeed(*line.replace("RUN", f"tuned-{seed}").replace("SEED", seed).split(), cwd=folder)
        assert f"tuned-{seed}: trained" in shown
    evaluate = "evaluate likelihood cache tuned-0 tuned-1 run --task-file color.toml --json"
    models = json.loads(succeed(*evaluate.split(), cwd=folder))["models"]
    assert [(model["model"], len(model["runs"])) for model in models] == [("tuned", 2), ("run", 1)]


def test_a_cache_by_several_paths_is_split_once(folder: Path) -> None:
    """A task may name the cache of the command, by another path or a URL: it is measured on the same test part."""
    (folder / "again").symlink_to(folder / "cache")
    named = [f'[m{number}]\nkind = "masked"\n{line}\n' for number, line in enumerate(("", 'cache = "again"'))]
    url = f'[c]\nkind = "caption"\ncache = "file://{folder}/cache"\n'
    (folder / "paths.toml").write_text("".join([*named, url]))
    succeed(*train("by-paths", "--task-file paths.toml"), cwd=folder)
    shown = succeed(*["evaluate", "likelihood", "cache", "by-paths", "--task-file", "paths.toml", "--json"], cwd=folder)
    (model,) = json.loads(shown)["models"]
    assert {task["task"]: task["num_examples"] for task in model["tasks"]} == dict.fromkeys(("m0", "m1", "c"), 15)


@pytest.mark.slow
def test_removed_samples_are_in_no_part(folder: Path) -> None:
    keys = Cache(folder / "cache").column("key").to_pylist()
    shutil.copytree(folder / "cache", folder / "less")
    package.remove_samples(folder / "less", keys[::2])
    (folder / "kept.txt").write_text("\n".join(keys[1::2]))
    package.cut_cache(folder / "cache", folder / "kept.txt", folder / "cut")
    (folder / "masked.toml").write_text('[m]\nkind = "masked"\n')
    settings = LikelihoodSettings(task_file=str(folder / "masked.toml"), words=str(folder / "words"))
    fit, split, parts = FitSettings(optimizer=OptimizerSettings(epochs=0)), SplitSettings(kind="key"), []
    for name in ("less", "cut"):
        train_tasks(folder / name, folder / f"{name}-run", settings, fit, split=split)
        rows = pq.read_table(folder / f"{name}-run" / "split.parquet").to_pylist()
        parts.append({row["key"]: row["part"] for row in rows if row["part"]})
    assert parts[0] == parts[1]


def test_a_run_without_its_split_is_neither_measured_nor_reused(folder: Path, run: Path) -> None:
    (run / "split.parquet").rename(folder / "aside")
    try:
        for command in ([*["evaluate", "likelihood", "cache", "run", "--task-file", "tasks.toml"]], train("run")):
            message = one_error(embedcache(*command, cwd=folder))
            assert "split.parquet: expected the split that config.json was written for, got none; restore it" in message
    finally:
        (folder / "aside").rename(run / "split.parquet")


@pytest.mark.slow
def test_ctrl_c_keeps_what_is_done(folder: Path) -> None:
    with interrupted_after(4, KeyboardInterrupt):
        stopped = embedcache(*train("stopped", "--checkpoint-s 0"), cwd=folder)
    assert (stopped.code, "rerun the same command" in stopped.stderr) == (130, True)
    resumed = embedcache(*train("stopped", "--checkpoint-s 0"), cwd=folder)
    assert resumed.code == 0
    assert "resumed from the checkpoint after step 4" in resumed.stderr


def one_error(done: Result) -> str:
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert (done.code, "Traceback" in done.stderr) == (1, False)
    return error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--projector mlp", "--projector: expected none with --task likelihood, got mlp"),
        ("--image-feature a/b", "--image-feature: expected none"),
        ("--batch-size 8", "--batch-size: expected none, as each task has its own, got 8"),
        ("--split strict", "--split: expected key, column or a file"),
        ("--split column", "expected train and test, got train"),
        ("--width 30", "--width: expected a multiple of 16, 4 times the heads, got 30"),
        ("--width 0", "--width: expected a whole number from 4 to 65536, got 0"),
        ("--words cache", "text features"),
        ("--words nowhere", "nowhere does not exist"),
        ("--word-feature open_toy/men", "did you mean 'open_toy/mean'"),
        ("--init-from run --num-layers 2", "--num-layers: expected none with --init-from run"),
        ("--init-from nowhere", "nowhere does not exist"),
        ("--trainable prompt", "unknown part 'prompt'"),
        ("--task-file nowhere.toml", "got nowhere.toml"),
        ("--task-file colors.txt", "expected TOML"),
    ],
)
def test_a_wrong_option_is_one_line(folder: Path, run: Path, options: str, message: str) -> None:
    sizes = "" if "--init-from" in options or "--width" in options else SIZES
    assert message in one_error(embedcache(*train("wrong", options, sizes=sizes), cwd=folder))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("kind = 'caption'\nexamples = 'none.parquet'", "bad: expected a Parquet file of examples, got none.parquet"),
        ("kind = 'caption'\nexamples = 'colors.txt'", "bad: colors.txt: expected a Parquet file"),
        ("kind = 'caption'\nexamples = 'texts.parquet'", "bad: examples: expected the columns key, text and target"),
        (
            "kind = 'caption'\ncache = 'words'",
            "bad: modality: expected items of one modality in words, got texts alone",
        ),
        ("kind = 'caption'\nfeature = 'open_toy/pathces'", "did you mean 'open_toy/patches'"),
        ("kind = 'caption'\nmodality = 'sound'", "bad: unknown modality 'sound'"),
        ("kind = 'caption'\nbatch_size = 0", "bad: batch_size: expected a whole number of at least 1, got 0"),
        ("kind = 'caption'\nhas_head = true", "bad: has_head: expected a closed set"),
        ("kind = 'answer'", "bad: expected examples with texts to answer"),
        ("kind = 'answer'\nexamples = 'texts.parquet'", "name a file of examples as validation"),
        (
            "kind = 'answer'\nexamples = 'answers.parquet'\ncandidates = ['red']",
            "bad: expected targets that are candidates",
        ),
        ("kind = 'classify'\nexamples = 'classes.parquet'\ncandidates = ['violet']", "got 'violet' in 'violet'"),
        ("kind = 'classify'\ncandidates = 'none.txt'", "bad: candidates: expected a list, or a text file"),
        ("kind = 'classify'\ncandidates = 'texts.parquet'", "bad: candidates: expected a list, or a text file"),
        ("kind = 'classify'\ncandidates = [1]", "bad: candidates: expected"),
        ("kind = 'masked'\nexamples = 'lists.parquet'", "bad: examples: column split: expected texts, got list"),
        ("kind = 'masked'\ncache = 'nowhere'", "bad: nowhere does not exist"),
        ("kind = 'answer'\nexamples = 'blanks.parquet'", "bad: text: expected at most one blank, got 2 in example 0"),
        ("kind = 'caption'\n[bad.worse]\nkind = 'caption'", "unknown option 'worse' of the task bad in "),
    ],
)
def test_a_wrong_task_is_one_line_with_its_name(folder: Path, tmp_path: Path, table: str, message: str) -> None:
    (folder / "bad.toml").write_text(f"[bad]\n{table}\n")
    line = [*train(str(tmp_path / "wrong")), "--task-file", "bad.toml"]
    assert message in one_error(embedcache(*line, cwd=folder))
    assert not (tmp_path / "wrong").exists()


def test_options_of_a_likelihood_are_refused_for_a_pair(folder: Path) -> None:
    error = one_error(embedcache("train", "cache", "pair", "--words", "words", cwd=folder))
    assert error.startswith("error: --words: expected none with --task pair, got words")
    for missing, message in (("words", "--words: expected a path"), ("task-file", "--task-file: expected a path")):
        words = train("wrong")
        place = words.index(f"--{missing}")
        assert message in one_error(embedcache(*words[:place], *words[place + 2 :], cwd=folder))


@pytest.mark.slow
def test_wrong_evaluations_are_one_line(folder: Path, run: Path) -> None:
    for line, message in (
        (
            "cache nowhere --task-file tasks.toml",
            "nowhere does not exist; make one with: embedcache train CACHE nowhere --task l",
        ),
        ("cache run --task-file none.toml", "got none.toml"),
        ("cache run run --task-file tasks.toml", "expected each run once, got run twice"),
        (
            "cache run --task-file tasks.toml --part val",
            "texts: expected val examples, got none among 60; use --part all",
        ),
        ("cache run --task-file tasks.toml --beam 0", "--beam: expected a whole number from 1 to 1000, got 0"),
    ):
        assert message in one_error(embedcache("evaluate", "likelihood", *line.split(), cwd=folder))
    assert "--task-file: expected a path such as tasks.toml, got none" in one_error(
        embedcache("train", "cache", "r", "--config", "run/config.json", cwd=folder)
    )
