"""Count which random mutants of core modules the quick tests kill: `python -m tests.mutants 200 --seed 0`.

A mutant changes one comparison, operator, constant, condition or boundary of a slice in a copy of the repository, and
runs the quick tests of its package until the first failure. Those that survive are listed with their line: each one is
a missing test, or equivalent code. Takes the time of a package's tests per mutant.
"""

import argparse
import ast
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

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


def survives(copy: Path, package: str, timeout_s: float) -> bool:
    """Return whether the quick tests of a package pass in a copy of the repository; one that hangs is killed."""
    words = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", f"tests/{package}"]
    environment = {**os.environ, "PYTHONPATH": str(copy), "CI": "1"}
    try:
        done = subprocess.run(words, cwd=copy, env=environment, capture_output=True, timeout=timeout_s, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


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
    parser.add_argument("--timeout", type=float, default=600, metavar="SECONDS", help="per mutant")
    options = parser.parse_args()
    rng, survivors = random.Random(options.seed), 0
    packages = options.package or PACKAGES
    paths = [path for name in packages for path in sorted((ROOT / "embedcache" / name).rglob("*.py"))]
    weights = [len(path.read_text()) for path in paths]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "repository"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", "build", "__pycache__", "*.egg-info"))
        for number in range(options.num_mutants):
            path = rng.choices(paths, weights)[0]
            source = path.read_text()
            tree = ast.parse(source)
            places = list(find_places(tree))
            if not places:
                continue
            node = rng.choice(places)
            change = mutate(node)
            relative = path.relative_to(ROOT)
            (copy / relative).write_text(ast.unparse(ast.fix_missing_locations(tree)))
            is_alive = survives(copy, relative.parts[1], options.timeout)
            survivors += is_alive
            state = "SURVIVED" if is_alive else "killed"
            say(f"{number + 1}: {state} {relative}:{getattr(node, 'lineno', 0)}: {change}")
            (copy / relative).write_text(source)
    say(f"{survivors} of {options.num_mutants} survived")


if __name__ == "__main__":
    main()
