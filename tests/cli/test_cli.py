import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest

from embedcache.cli.main import main
from tests.pictures import write_pictures

pytestmark = pytest.mark.slow

TOY = ["--image", "tests.toy:open_toy", "--text-encoder", "tests.toy:open_toy"]


def embedcache(*words: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "embedcache", *map(str, words)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with photos, a cache, a run and an index, made as a newcomer would."""
    folder = tmp_path_factory.mktemp("newcomer")
    write_pictures(folder / "photos", 150)
    for words in (
        ["extract", "photos", "cache", *TOY],
        ["train", "cache", "run", "--projector", "mlp", "--split", "key", "--epochs", "5", "--batch-size", "64"],
        ["evaluate", "retrieval", "cache", "run", "--json", "figures.json"],
        ["curate", "index", "cache", "index", "--projected", "run"],
    ):
        done = embedcache(*words, cwd=folder)
        assert done.returncode == 0, done.stderr
        (folder / f"{words[0]}.out").write_text(done.stdout)
    return folder


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    program = (
        "import sys; sys.argv = ['embedcache', '--help']\n"
        "from embedcache.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'timm', 'transformers', 'faiss', 'zarr', 'pyarrow', 'scipy', 'matplotlib', 'PIL'}\n"
        "print('HEAVY', sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert "HEAVY []" in done.stdout
    for name in ("quickstart", "extract", "train", "evaluate", "curate", "inspect"):
        assert name in done.stdout


def test_the_version_is_the_packages() -> None:
    assert embedcache("--version").stdout == f"embedcache {version('embedcache')}\n"


def test_a_newcomers_commands_give_figures_and_hits(folder: Path) -> None:
    assert "encoded 150 images" in (folder / "extract.out").read_text()
    assert "best epoch" in (folder / "train.out").read_text()
    assert "chance" in (folder / "evaluate.out").read_text()
    figures = json.loads((folder / "figures.json").read_text())
    assert figures["task"] == "zeroshot_retrieval"
    assert figures["details"]["num_images"] == 38
    assert "recall@10" in (folder / "curate.out").read_text()
    found = embedcache("curate", "search", "index", "red bar left on white", "-k", "3", "--json", cwd=folder)
    hits = json.loads(found.stdout)["hits"]
    assert len(hits) == 3
    assert hits[0]["score"] >= hits[1]["score"]


def test_an_index_is_asked_with_everything_at_once(folder: Path) -> None:
    (folder / "queries.txt").write_text("red bar left on white\n\nblue bar top on red\n")
    (folder / "concepts.json").write_text(json.dumps({"red": ["red bar left on white", "red bar top on blue"]}))
    assert embedcache("extract", "prompts:concepts.json", "concepts", *TOY[2:], cwd=folder).returncode == 0
    np.save(folder / "vectors.npy", np.eye(256, dtype=np.float16)[:2])
    picture = "photos/00007.png"
    asked = [
        "--queries",
        "queries.txt",
        "--image",
        picture,
        "--key",
        "00009",
        "--concepts",
        "concepts",
        "--concept",
        "red",
    ]
    found = embedcache("curate", "search", "index", *asked, "--vectors", "vectors.npy", "-k", "2", "--json", cwd=folder)
    assert found.returncode == 0, found.stderr
    answers = [json.loads(line) for line in found.stdout.splitlines()]
    names = ["red bar left on white", "blue bar top on red", picture, "00009", "red", "vector 0", "vector 1"]
    assert [answer["query"] for answer in answers] == names
    assert answers[2]["hits"][0]["key"] == "00007"
    assert answers[3]["hits"][0]["key"] == "00009"
    (folder / "keys.txt").write_text("00001\n00002\n")
    some = embedcache("curate", "search", "index", "red", "--selection", "keys.txt", "--json", cwd=folder)
    assert {hit["key"] for hit in json.loads(some.stdout)["hits"]} == {"00001", "00002"}


def test_duplicates_and_leaks_are_found_and_training_goes_without_them(folder: Path) -> None:
    write_pictures(folder / "others", 20, seed=5)
    shutil.copy(folder / "photos" / "00000.png", folder / "others" / "00000.png")
    outputs = []
    for words in (
        ["extract", "others", "others-cache", *TOY],
        ["curate", "dedup", "cache", "--html", "look.html", "--json", "look.json"],
        ["curate", "dedup", "cache", "kept.parquet", "--cosine", "0.999", "--html", "dedup.html"],
        ["curate", "dedup", "cache", "texts.parquet", "--copies", "--text", "open_toy", "--json", "texts.json"],
        ["curate", "leaks", "cache", "others-cache", "--selection-out", "clean.parquet", "--html", "leaks.html"],
        ["train", "cache", "kept-run", "--selection", "kept.parquet", "--split", "key", "--epochs", "1"],
    ):
        done = embedcache(*words, cwd=folder)
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert "copies only" in outputs[1]
    assert "samples stay" in outputs[2]
    assert json.loads((folder / "texts.json").read_text())["num_removed"] > 0
    assert "equal" in outputs[4]
    for name in ("look", "dedup", "leaks"):
        assert "data:image/webp" in (folder / f"{name}.html").read_text()


def test_classes_are_told_apart_without_training_on_them(folder: Path) -> None:
    for name, seed in (("red", 1), ("blue", 2)):
        write_pictures(folder / "labeled" / name, 10, seed=seed)
    (folder / "classes.txt").write_text("blue\nred\n")
    evaluate = ["evaluate", "zero-shot", "labeled-cache", "run", "--prompts"]
    for words in (
        ["extract", "labeled", "labeled-cache", *TOY[:2]],
        ["extract", "prompts:classes.txt", "prompts", *TOY[2:]],
        [
            "evaluate",
            "zero-shot",
            "labeled-cache",
            "run",
            "--prompts",
            "prompts",
            "--html",
            "z.html",
            "--json",
            "z.json",
        ],
    ):
        done = embedcache(*words, cwd=folder)
        assert done.returncode == 0, done.stderr
    assert "all samples: 20 images, 2 classes of 1 prompts" in done.stdout
    assert "chance" in done.stdout
    assert (folder / "z.html").read_text().count("<svg") == 3
    assert (folder / "z.json").is_file()
    wrong = embedcache(*evaluate, "cache", cwd=folder)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (1, 1)
    assert "is no set of prompts" in wrong.stderr


def test_retrieval_is_shown_as_a_page(folder: Path) -> None:
    done = embedcache("evaluate", "retrieval", "cache", "run", "--part", "all", "--html", "page.html", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "WARNING" in done.stdout  # the training part is among all
    assert "median rank" in (folder / "page.html").read_text()


def test_inspect_shows_what_there_is(folder: Path) -> None:
    shown = embedcache("inspect", "cache", cwd=folder).stdout
    assert "150 samples with 150 images, 150 texts" in shown
    for words in ("open_toy/cls", "150 × 48", "float16", "1/1"):
        assert words in shown


def test_verify_says_what_is_wrong_and_exits_with_1(folder: Path, tmp_path: Path) -> None:
    whole = embedcache("verify", "cache", cwd=folder)
    assert (whole.returncode, whole.stdout) == (0, "cache: 0 damaged chunks or tables, 0 chunks not extracted yet\n")
    shutil.copytree(folder / "cache", tmp_path / "cache")
    (tmp_path / "cache/image/open_toy/cls/c/0/0").unlink()
    damaged = embedcache("verify", tmp_path / "cache")
    assert damaged.returncode == 1
    assert "open_toy/cls chunk 0:" in damaged.stdout
    assert "1 damaged chunks or tables, 0 chunks not extracted yet" in damaged.stdout


MISTAKES = [
    (["extract", "nowhere", "c", *TOY], "nowhere"),
    (["extract", "photos", "c", "--image", "tim:resnet18"], "unknown encoder family 'tim'; did you mean 'timm'"),
    (["extract", "photos", "c", "--image", "timm:resnet81"], "resnet81"),
    (["extract", "photos", "c"], "no encoder is named"),
    (["extract", "photos", "c", *TOY, "--feature", "patchs"], "did you mean 'patches'"),
    (["extract", "photos", "c", *TOY, "--source-type", "foldr"], "did you mean 'folder'"),
    (["extract", "photos", "cache", "--image", "tests.toy:open_toy,scale=2"], "weights:"),
    (["extract", "photos", "photos/00000.png", *TOY], "is a file"),
    (["extract", "photos", "photos", *TOY], "not a cache and not empty"),
    (["train", "cache", "r", "--projector", "mpl"], "did you mean 'mlp'"),
    (["train", "cache", "r", "--image", "open_toy/csl"], "did you mean 'open_toy/cls'"),
    (["train", "cache", "r", "--split", "stricct"], "did you mean 'strict'"),
    (["train", "cache", "r"], "leaves nothing to hold out"),
    (["evaluate", "retrieval", "cache", "run", "--json", "figures.json/x"], "is a file"),
    (["train", "cache", "r", "--batch-size", "1"], "batch size is 1"),
    (["train", "cache", "photos", "--split", "key"], "is not a run and not empty"),
    (["train", "cache", "r", "--split", "key", "--device", "cuda:77"], "no device 'cuda:77' here"),
    (["evaluate", "retrieval", "cache", "run", "--control", "run"], "a control must be trained with --shuffle-pairs"),
    (["evaluate", "retrieval", "cache", "run", "run"], "runs to average must differ in their seed"),
    (["curate", "index", "cache", "photos", "--projected", "run"], "is not an index and not empty"),
    (["train", "photos", "r"], "has no cache.json"),
    (["train", "cache", "run", "--seed", "7"], "training.seed: 0 there, 7 asked"),
    (["evaluate", "retrieval", "cache", "nowhere"], "nowhere does not exist"),
    (["curate", "search", "index", "x", "-k", "9999"], "k is 9999"),
    (["curate", "search", "index"], "no query; give at least one text, image"),
    (["curate", "search", "index", "x", "--label", "cat"], "have no column 'label'"),
    (["curate", "search", "index", "--queries", "nowhere.txt"], "nowhere.txt does not exist"),
    (["curate", "search", "index", "--concept", "red"], "give it with --concepts CACHE"),
    (["curate", "index", "cache", "other", "--projected", "run", "--memory", "4X"], "'4X' is no size"),
    (["curate", "index", "cache", "other", "--projected", "run", "--memory", "1K"], "fits 1,024 bytes of memory"),
    (
        ["curate", "index", "cache", "other", "--projected", "run", "--factory", "PQ1x1"],
        "no index reaches recall@10 0.95",
    ),
    (["curate", "search", "cache", "x"], "has no card.json"),
    (["curate", "dedup", "cache", "--cosine", "0.9"], "a limit and a file for what stays go together"),
    (["curate", "dedup", "cache", "kept.parquet", "--cosine", "95"], "--cosine is 95.0; it must be above 0"),
    (["curate", "leaks", "cache", "cache"], "hold the same samples"),
    (["inspect", "nowhere"], "nowhere does not exist"),
]


@pytest.mark.parametrize(("words", "expected"), MISTAKES, ids=[" ".join(words)[:60] for words, _ in MISTAKES])
def test_a_mistake_is_one_clear_line_and_exit_1(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], words: list[str], expected: str
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["embedcache", *words])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert expected in line


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small disk")
def test_a_full_disk_is_one_clear_line_and_loses_nothing(folder: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", disk], check=False)
    if mounted.returncode:
        pytest.skip("this machine does not let tests mount a small disk")
    words = [
        "extract",
        "photos",
        disk / "cache",
        *TOY,
        "--chunk-size",
        "8",
        "--feature",
        "tokens",
        "--feature",
        "patches",
    ]
    try:
        done = embedcache(*words, cwd=folder)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert "no space left on the disk" in line
        assert "run the same command again" in line
        assert not list(disk.rglob("*.partial"))
        committed = len(list(disk.rglob("chunks/*.parquet")))
        assert committed > 0
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        done = embedcache(*words, cwd=folder)
        assert done.returncode == 0, done.stderr
        reused = sum(map(int, re.findall(r"reused (\d+)", done.stdout)))
        assert 8 * (committed - 1) < reused <= 8 * committed  # the last chunk may be a short one
    finally:
        subprocess.run(["umount", disk], check=True)


def test_our_own_bug_shows_its_traceback(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "broken_plugin.py").write_text("def source(location, settings):\n    raise ZeroDivisionError('ours')\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}
    command = [
        sys.executable,
        "-m",
        "embedcache",
        "extract",
        "photos",
        "c",
        *TOY,
        "--source-type",
        "broken_plugin:source",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, env=environment)
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError: ours" in done.stderr


def test_a_terminal_shows_bars_with_rates(folder: Path) -> None:
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "embedcache", "extract", "photos", "cache3", *TOY]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "TERM": "xterm", "COLUMNS": "150"}
    process = subprocess.Popen(command, stderr=theirs, stdout=subprocess.DEVNULL, cwd=folder, env=environment)
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 65_536):
            shown += part
    except OSError:  # how a closed terminal ends
        pass
    assert process.wait() == 0, shown
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode())
    assert re.search(r"indexing.*150 · [\d,]+ samples/s", text)
    assert re.search(r"encoding images.*150/150 · [\d,]+ images/s", text)


def test_plain_progress_has_no_escape_codes(folder: Path) -> None:
    done = embedcache("extract", "photos", "cache2", *TOY, cwd=folder)
    assert re.search(r"encoding images: 150 images in [\d.]+ s, [\d,]+ images/s", done.stderr)
    assert "\x1b" not in done.stderr + done.stdout


def test_a_plan_says_bytes_and_time_and_writes_no_feature(folder: Path, tmp_path: Path) -> None:
    done = embedcache("extract", folder / "photos", tmp_path / "c", *TOY, "--plan", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert re.search(r"open_toy/cls +│ +150 +│ +96 +│ 0\.02 MB", done.stdout)
    assert re.search(r"images: [\d,.]+ a second, measured; [\d.]+ seconds", done.stdout)
    assert re.search(r"memory: 0\.39 MB a process for the outputs of two chunks", done.stdout)
    assert re.search(r"disk: 0\.03 MB; [\d,.]+ GB are free", done.stdout)
    assert not list(tmp_path.glob("c/*/*/chunks/*"))


def test_a_retry_is_nothing_else(folder: Path) -> None:
    done = embedcache("extract", "photos", "cache", *TOY, "--retry-failed", "--plan", cwd=folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert "leave --plan and --extend out" in done.stderr


def test_a_share_of_nothing_is_refused_before_anything_is_read(folder: Path) -> None:
    done = embedcache("verify", "cache", "--probe", "0", cwd=folder)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: the share to encode again is 0; it must be above 0 and at most 1")


def test_an_empty_source_is_refused(tmp_path: Path) -> None:
    done = embedcache("extract", "", "c", *TOY, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("error: the source is an empty text; a source is a folder of images")


def test_captions_that_cannot_be_read_are_told(tmp_path: Path) -> None:
    write_pictures(tmp_path / "photos", 8)
    for number in range(6):
        (tmp_path / f"photos/{number:05d}.txt").write_bytes(b"\xff")
    done = embedcache("extract", "photos", "c", *TOY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = "6 samples have captions that cannot be read, and count as having none\n  key 00000: 00000.txt is not UTF-8"
    for output in (done.stdout, embedcache("inspect", "c", cwd=tmp_path).stdout):
        assert told in output
        assert "  … and 1 more" in output


def test_ctrl_c_says_how_to_go_on(tmp_path: Path) -> None:
    write_pictures(tmp_path / "photos", 64)
    command = [sys.executable, "-m", "embedcache", "extract", "photos", "c", "--chunk-size", "8"]
    command += ["--image", "tests.toy:open_toy,delay_ms=300"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env=environment) as process:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("c/image/*/chunks/*")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        assert process.stderr is not None
        assert process.stderr.read().endswith(
            "stopped; what is committed is kept: run the same command again to go on\n"
        )
    assert process.returncode == 130
