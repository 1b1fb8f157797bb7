"""Count which random mutants of all packages their tests kill: `python -m tests.mutants FOLDER 400 --seed 0`.

`--packages curate,store` tries the same mutants of these packages only.
A mutant changes one comparison, operator, constant, condition or boundary of a slice in a copy of the repository. The
tests of its package that run the changed line, or that use a shared fixture that runs it, are run until the first
failure; tests marked `no_mutants`, which would take too long, are left out. Mutants that survive are listed with their
line: each one is a missing test, or equivalent code.

The folder is made if it is missing. It holds the repository as it was then, which tests run which lines (measured once
per package), and a line of JSON per mutant: the same command continues where an interrupted one stopped. Each mutant is
tested in a fork of a process that has imported the libraries, but nothing of embedcache.
"""

import argparse
import ast
import contextlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import coverage
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = tuple(sorted(path.name for path in (ROOT / "embedcache").iterdir() if (path / "__init__.py").is_file()))
MOST_PER_PACKAGE = 40
LIBRARIES = (
    *("faiss", "matplotlib.pyplot", "PIL.Image", "pyarrow.compute", "pyarrow.parquet", "safetensors.torch"),
    *("scipy.sparse.csgraph", "scipy.stats", "torch.utils.checkpoint", "torch.utils.data"),
)
"""What is imported once, before the forks; pytest must be the first to import its plug-ins, which zarr is one of."""
OPTIONS = ("-q", "-x", "-m", "not no_mutants", "-p", "no:cacheprovider", "--assert=plain")
"""Those of pytest; its differences of bytes would take minutes."""
OTHERS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.FloorDiv,
    ast.FloorDiv: ast.Mult,
    ast.Div: ast.Mult,
}
"""Operator -> the one that takes its place."""


def main() -> None:
    """Try mutants and print what became of each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("num_mutants", type=int, nargs="?", default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--packages", default=",".join(PACKAGES), help="try mutants of these, separated by commas")
    options = parser.parse_args()
    folder = options.folder.resolve()
    prepare(folder)
    results = folder / f"seed-{options.seed}.jsonl"
    states = [json.loads(line)["state"] for line in results.read_text().splitlines()] if results.is_file() else []
    with tempfile.TemporaryDirectory() as temporary, results.open("a") as file:
        copy = Path(temporary).resolve() / "repository"
        shutil.copytree(folder / "repository", copy)
        places = draw(copy, options.num_mutants, options.seed, options.packages.split(","))
        for number, (path, index) in enumerate(places[len(states) :], start=len(states) + 1):
            result = {"number": number, **try_mutant(folder, copy, path, index, number)}
            file.write(json.dumps(result) + "\n")
            file.flush()
            say("{number}: {state} {path}:{line}: {change}".format(**result))
            states.append(str(result["state"]))
    say(", ".join(f"{count} {state}" for state, count in Counter(states).most_common()))


def prepare(folder: Path) -> None:
    """Copy the repository into a new folder, and import what every fork needs."""
    if not (folder / "repository").is_dir():
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = folder / "unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        ignore = shutil.ignore_patterns(".git", "*_cache", "build", "__pycache__", "*.egg-info")
        shutil.copytree(ROOT, unfinished, ignore=ignore)
        unfinished.rename(folder / "repository")
    for library in LIBRARIES:
        importlib.import_module(library)


def draw(copy: Path, num_mutants: int, seed: int, packages: list[str]) -> list[tuple[Path, int]]:
    """Return the path of each mutant, drawn by its length, and the number of the place that is changed.

    A package has its share of `num_mutants` by length, at most 40; its mutants are the same, whatever else is drawn.
    """
    lengths = {name: sum(len(path.read_text()) for path in list_modules(copy, name)) for name in PACKAGES}
    places: list[tuple[Path, int]] = []
    for package in packages:
        rng = random.Random(f"{seed} {package}")
        paths = list_modules(copy, package)
        texts = [path.read_text() for path in paths]
        counts = [sum(1 for _ in find_places(ast.parse(text))) for text in texts]
        weights = [len(text) if count else 0 for text, count in zip(texts, counts, strict=True)]

        share = round(num_mutants * lengths[package] / sum(lengths.values()))
        for number in rng.choices(range(len(paths)), weights, k=min(share, MOST_PER_PACKAGE)):
            places.append((paths[number], rng.randrange(counts[number])))
    return places


def list_modules(copy: Path, package: str) -> list[Path]:
    """Return the modules of a package, by name."""
    return sorted((copy / "embedcache" / package).rglob("*.py"))


def name_places(text: str) -> list[tuple[object, ...]]:
    """Return for each place of a module its line, its change, and how often both occurred before it."""
    lines = text.splitlines()
    counts = Counter[tuple[str, str]]()
    names: list[tuple[object, ...]] = []
    for node in find_places(ast.parse(text)):
        name = lines[getattr(node, "lineno", 1) - 1].strip(), mutate(deepcopy(node))
        names.append((*name, counts[name]))
        counts[name] += 1
    return names


def find_places(tree: ast.AST) -> Iterator[ast.AST]:
    """Iterate over the nodes that `mutate` changes, in order; texts and type annotations are left alone."""
    for node in ast.walk(tree):
        has_operator = isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in OTHERS
        is_compared = isinstance(node, ast.Compare) and type(node.ops[0]) in OTHERS
        is_whole = isinstance(node, ast.Constant) and type(node.value) is int
        if has_operator or is_compared or is_whole or isinstance(node, ast.IfExp | ast.If):
            yield node


def mutate(node: ast.AST) -> str:
    """Change a node in place and say how."""
    before = ast.unparse(node.test if isinstance(node, ast.If | ast.IfExp) else node)
    if isinstance(node, ast.BinOp | ast.BoolOp):
        node.op = OTHERS[type(node.op)]()  # type: ignore[assignment]
    elif isinstance(node, ast.Compare):
        node.ops[0] = OTHERS[type(node.ops[0])]()  # type: ignore[call-overload]
    elif isinstance(node, ast.Constant):
        node.value = int(node.value) + 1  # type: ignore[arg-type]
    elif isinstance(node, ast.If | ast.IfExp):
        node.test = ast.UnaryOp(op=ast.Not(), operand=node.test)
    after = ast.unparse(node.test if isinstance(node, ast.If | ast.IfExp) else node)
    return f"{before} -> {after}"


def try_mutant(folder: Path, copy: Path, path: Path, index: int, number: int) -> dict[str, object]:
    """Test one mutant and restore its module; return what was changed and what became of it.

    The state is `killed` by a test, `stopped` after too long, `SURVIVED`, or `not run` by any test.
    """
    relative = path.relative_to(copy)
    runs = measure(folder, copy, relative.parts[1])
    text, _, repeat = name_places(path.read_text())[index]
    tree = ast.parse(path.read_text())
    node = list(find_places(tree))[index]
    line = getattr(node, "lineno", 0)
    tests = runs.find_tests(str(relative), line, tree)
    change = mutate(node)
    path.write_text(ast.unparse(ast.fix_missing_locations(tree)))
    os.utime(path, (number, number))  # a time of its own, so that its byte code is never taken for another mutant's
    start, state = time.monotonic(), "not run"
    if tests:
        timeout_s = 30 + 5 * round(sum(runs.seconds[test] for test in tests))
        code = run_fork(copy, folder / "output", timeout_s, lambda: run_pytest(Chosen(tests)))
        state = {0: "SURVIVED", 1: "killed"}.get(code, "stopped" if code < 0 else f"ended with {code}")
    shutil.copy2(folder / "repository" / relative, path)
    what = {"path": str(relative), "line": line, "text": text, "change": change, "repeat": repeat}
    return {**what, "state": state, "num_tests": len(tests), "seconds": round(time.monotonic() - start)}


@dataclass(kw_only=True)
class Runs:
    """Which tests of a package run which of its lines."""

    seconds: dict[str, float]
    """Test -> its seconds of CPU time while its lines are recorded."""
    lines: dict[str, dict[str, list[str]]]
    """Module -> line -> the tests that run it; none if it runs while modules are imported."""

    def find_tests(self, module: str, line: int, tree: ast.AST) -> list[str]:
        """Return the tests that run a line, the quickest file's first; all if it runs while modules are imported.

        A line of a long statement that has no code of its own has the tests of the one before it.
        """
        lines = self.lines.get(module, {})
        statements = [node for node in ast.walk(tree) if isinstance(node, ast.stmt)]
        first = max(node.lineno for node in statements if node.lineno <= line <= (node.end_lineno or 0))
        known = next((str(number) for number in range(line, first - 1, -1) if str(number) in lines), None)
        if known is None:
            return []
        tests, costs = lines[known] or list(self.seconds), Counter[str]()
        for test in tests:
            costs[file_of(test)] += self.seconds[test]  # type: ignore[assignment]
        return sorted(tests, key=lambda test: (costs[file_of(test)], file_of(test)))


def measure(folder: Path, copy: Path, package: str) -> Runs:
    """Run the tests of a package once in a fork, or read what was measured earlier."""
    path, output = folder / f"{package}.json", folder / f"{package}.output"
    if not path.is_file():
        say(f"which tests of {package} run which lines")
        if run_fork(copy, output, 3600, lambda: record_lines(copy, package, path)):
            raise SystemExit(f"tests/{package} fail without a mutant:\n{output.read_text()[-2000:]}")
    return Runs(**json.loads(path.read_text()))


def record_lines(copy: Path, package: str, path: Path) -> int:
    """Run the tests of a package in this process and write `Runs` as JSON; return the exit code of pytest."""
    recorder = coverage.Coverage(data_file=None, config_file=False, source=[str(copy / "embedcache" / package)])
    recorder.start()
    contexts = Contexts(recorder, package)
    code = run_pytest(contexts)
    recorder.stop()
    data = recorder.get_data()
    lines = {
        str(Path(module).relative_to(copy)): {
            line: sorted({test for context in found for test in contexts.tests[context]})
            for line, found in data.contexts_by_lineno(module).items()
        }
        for module in data.measured_files()
    }
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(json.dumps({"seconds": contexts.seconds, "lines": lines}))
    if not code:
        unfinished.rename(path)
    return code


class Contexts:
    """A plug-in of pytest that tells coverage which test is run, or which fixture that several tests share."""

    def __init__(self, recorder: coverage.Coverage, package: str) -> None:
        self.files = [f"tests/{package}"]
        self.recorder = recorder
        self.seconds: dict[str, float] = {}
        self.tests: dict[str, list[str]] = {"": []}
        """Context -> its tests; none while modules are imported."""
        self.current = ""

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """List the tests of each test and of each shared fixture, which are all that name it."""
        for item in items:
            self.tests[item.nodeid] = [item.nodeid]
            for name in getattr(item, "fixturenames", ()):
                self.tests.setdefault(f"fixture {name}", []).append(item.nodeid)

    @contextlib.contextmanager
    def run_in(self, context: str) -> Iterator[None]:
        """Record lines for a context, then again for the one before."""
        before, self.current = self.current, context
        self.recorder.switch_context(context)
        try:
            yield
        finally:
            self.current = before
            self.recorder.switch_context(before)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[Any]:
        """Record a test with its own fixtures."""
        start = sum(os.times()[:4])
        with self.run_in(item.nodeid):
            result = yield
        self.seconds[item.nodeid] = round(sum(os.times()[:4]) - start, 3)
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Iterator[Any]:
        """Record a fixture, unless each test has its own."""
        context = f"fixture {fixturedef.argname}"
        is_shared = fixturedef.scope != "function" and context in self.tests
        with self.run_in(context) if is_shared else contextlib.nullcontext():
            return (yield)


class OneFailure:
    """A plug-in of pytest that makes Hypothesis fail at once, with a failure of any size."""

    def pytest_sessionstart(self) -> None:
        """Load settings that are inherited by those of each test."""
        import hypothesis  # pytest has to import it first

        phases = (hypothesis.Phase.explicit, hypothesis.Phase.generate)
        hypothesis.settings.register_profile("mutants", max_examples=50, deadline=None, derandomize=True, phases=phases)
        hypothesis.settings.load_profile("mutants")


class Chosen:
    """A plug-in of pytest that runs some tests, in this order."""

    def __init__(self, tests: list[str]) -> None:
        self.files = list(dict.fromkeys(map(file_of, tests)))
        self.order = {test: number for number, test in enumerate(tests)}

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Keep the chosen tests."""
        items[:] = sorted((item for item in items if item.nodeid in self.order), key=lambda i: self.order[i.nodeid])


def file_of(test: str) -> str:
    """Return the file of a test."""
    return test.partition("::")[0]


def run_pytest(plugin: Contexts | Chosen) -> int:
    """Run tests of a plug-in's files in this process; return the exit code of pytest."""
    return int(pytest.main([*OPTIONS, *plugin.files], plugins=[plugin, OneFailure()]))


def run_fork(copy: Path, output: Path, timeout_s: int, run: Callable[[], int]) -> int:
    """Run a function in a fork that imports the copy's modules; return its exit code, or that of a signal, below 0.

    One that computes without end is killed after `timeout_s` of CPU time, one that waits after 20 times as long: other
    processes may slow a test, which must not count as a mutant that was found.
    """
    child = os.fork()
    if child == 0:
        _run_and_exit(copy, output, timeout_s, run)
    deadline = time.monotonic() + 20 * timeout_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _run_and_exit(copy: Path, output: Path, timeout_s: int, run: Callable[[], int]) -> NoReturn:
    """Run a function as in a new process that was started in the copy."""
    code = 3
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (timeout_s, timeout_s))
        os.chdir(copy)
        for name in [name for name in sys.modules if name.partition(".")[0] in {"embedcache", "tests"}]:
            del sys.modules[name]
        sys.path[:] = [str(copy), *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT)]
        sys.dont_write_bytecode = False  # the next fork starts sooner
        os.environ |= {"PYTHONPATH": str(copy), "CI": "1"}
        os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        written = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
        os.dup2(written, 1)
        os.dup2(written, 2)
        code = run()
    except BaseException:
        traceback.print_exc()
        raise
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
