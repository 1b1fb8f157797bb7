"""Count which random mutants of core modules the quick tests kill: `python -m tests.mutants 200 --seed 0`.

A mutant changes one comparison, operator, constant, condition or boundary of a slice in a copy of the repository. The
quick tests of its package that run the changed line are run until the first failure, and all quick tests of the package
if these pass. Those that survive are listed with their line: each one is a missing test, or equivalent code.

Which tests run which lines is measured first, once per package. Each mutant is tested in a fork of a process that has
imported the libraries, but nothing of embedcache.
"""

import argparse
import ast
import contextlib
import importlib
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import coverage
import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("metrics", "train", "projectors", "store", "dataset", "search", "curate")
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


LIBRARIES = ("faiss", "matplotlib.pyplot", "pyarrow.parquet", "scipy.sparse", "scipy.stats", "torch")
"""What is imported once, before the forks; pytest must be the first to import its plug-ins."""
QUICK = ("-q", "-x", "-m", "not slow", "-p", "no:cacheprovider")

Tests = Mapping[int, Sequence[str]]
"""Line of a module -> the tests that run it."""


def find_tests(copy: Path, package: str) -> dict[Path, Tests]:
    """Run the quick tests of a package once and return module -> line -> tests; what fixtures run has none."""
    say(f"which tests of {package} run which lines")
    data, settings = copy / f"coverage.{package}", copy / "coverage.ini"
    settings.write_text(f"[run]\ndynamic_context = test_function\nsource = {copy / 'embedcache'}\n")
    words = [sys.executable, "-m", "coverage", "run", f"--rcfile={settings}", f"--data-file={data}", "-m", "pytest"]
    environment = {**os.environ, "PYTHONPATH": str(copy), "CI": "1"}
    done = subprocess.run([*words, *QUICK, f"tests/{package}"], cwd=copy, env=environment, capture_output=True)
    if done.returncode:
        raise SystemExit(f"tests/{package} fail without a mutant:\n{done.stdout.decode()[-2000:]}")
    measured = coverage.CoverageData(str(data))
    measured.read()
    return {
        Path(path): {
            line: sorted({_address(copy, test) for test in tests if test.startswith("tests.")})
            for line, tests in measured.contexts_by_lineno(path).items()
        }
        for path in measured.measured_files()
    }


def _address(copy: Path, test: str) -> str:
    """Return the address of a test for pytest: `tests.x.test_y.TestZ.test_a` is `tests/x/test_y.py::TestZ::test_a`."""
    names = test.split(".")
    length = next(n for n in range(len(names), 0, -1) if (copy / Path(*names[:n]).with_suffix(".py")).is_file())
    return "::".join(["/".join(names[:length]) + ".py", *names[length:]])


def _run_tests(copy: Path, tests: Sequence[str], timeout_s: int) -> NoReturn:
    """Run tests in a fork, which ends with pytest's code, or with a signal after so many seconds of CPU time."""
    code = 1
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_CPU, (timeout_s, timeout_s))
        os.chdir(copy)
        for name in [name for name in sys.modules if name.partition(".")[0] in {"embedcache", "tests"}]:
            del sys.modules[name]
        sys.path[:] = [str(copy), *(entry for entry in sys.path if Path(entry or ".").resolve() != ROOT)]
        os.environ |= {"PYTHONPATH": str(copy), "CI": "1"}
        null = os.open(os.devnull, os.O_RDWR)
        for number in range(3):
            os.dup2(null, number)
        code = pytest.main([*QUICK, *tests])
    finally:
        os._exit(code)


def passes(copy: Path, tests: Sequence[str], timeout_s: int) -> bool:
    """Return whether tests pass in a fork with the copy's modules; one that hangs is killed.

    One that computes without end is killed after `timeout_s` of CPU time, one that waits after 20 times as long: other
    processes may slow a test, which must not count as a mutant that was found.
    """
    child = os.fork()
    if child == 0:
        _run_tests(copy, tests, timeout_s)
    deadline = time.monotonic() + 20 * timeout_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> None:
    """Try mutants and print those that survive."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("num_mutants", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--package", choices=PACKAGES, action="append", help="only these; may be repeated")
    parser.add_argument("--timeout", type=int, default=600, metavar="SECONDS", help="of CPU, per mutant")
    options = parser.parse_args()
    rng, survivors = random.Random(options.seed), 0
    packages = options.package or PACKAGES
    paths = [path for name in packages for path in sorted((ROOT / "embedcache" / name).rglob("*.py"))]
    weights = [len(path.read_text()) for path in paths]
    for library in LIBRARIES:
        importlib.import_module(library)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "repository"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "build", "__pycache__", "*.egg-info"))
        tests = {name: find_tests(copy, name) for name in packages}
        failing = [name for name in packages if not passes(copy, [f"tests/{name}"], options.timeout)]
        if failing:
            raise SystemExit(f"in a fork, these fail without a mutant: {', '.join(failing)}")
        for number in range(options.num_mutants):
            path = rng.choices(paths, weights)[0]
            source = path.read_text()
            tree = ast.parse(source)
            places = list(find_places(tree))
            if not places:
                continue
            node = rng.choice(places)
            change, line = mutate(node), getattr(node, "lineno", 0)
            relative = path.relative_to(ROOT)
            package = relative.parts[1]
            (copy / relative).write_text(ast.unparse(ast.fix_missing_locations(tree)))
            nearest = tests[package].get(copy / relative, {}).get(line, ())
            is_alive = (not nearest or passes(copy, nearest, options.timeout)) and passes(
                copy, [f"tests/{package}"], options.timeout
            )
            survivors += is_alive
            state = "SURVIVED" if is_alive else "killed"
            say(f"{number + 1}: {state} {relative}:{line}: {change}")
            (copy / relative).write_text(source)
    say(f"{survivors} of {options.num_mutants} survived")


if __name__ == "__main__":
    main()
