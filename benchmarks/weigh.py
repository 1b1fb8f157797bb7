#!/usr/bin/env python3
"""Weigh a checkout: code lines per package, how airy the code is, and how much tests and docs weigh.

    python benchmarks/weigh.py                # the table, from the project's root
    python benchmarks/weigh.py --json         # the same figures as JSON

Code lines leave out docstrings, comments and blank lines.
"""

import ast
import collections
import io
import json
import pathlib
import re
import sys
import tokenize

Counter = collections.Counter[str]
COMPREHENSIONS = (ast.ListComp, ast.DictComp, ast.SetComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DOCUMENTED = (ast.Module, ast.ClassDef, *FUNCTIONS)
# Participles, adverbs and prepositions that name nothing; a local of this kind makes its reader guess.
VAGUE = set(
    """
    found own others other left held named before after which where known taken given kept lost drawn asked gone
    seen told put made read wanted needed missing same both within above below alone again least most wide across down
    """.split()
)


def docstring_lines(tree: ast.Module) -> set[int]:
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            text = node.body[0]
            lines.update(range(text.lineno, (text.end_lineno or text.lineno) + 1))
    return lines


def weigh(path: pathlib.Path) -> Counter:
    source = path.read_text(encoding="utf-8", errors="replace")
    count: Counter = collections.Counter(modules=1, lines=source.count("\n"))
    try:
        tree = ast.parse(source)
    except SyntaxError:
        return count
    documented, lines = docstring_lines(tree), source.split("\n")
    code: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            count["comments"] += not re.search(r"noqa|type: ignore|pragma|SPDX", token.string)
        elif token.type not in (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER):
            code.update(set(range(token.start[0], token.end[0] + 1)) - documented)
    count["code"] = len(code)
    count["non_blank"] = sum(bool(line.strip()) for line in lines)
    for node in ast.walk(tree):
        if isinstance(node, FUNCTIONS):
            count["functions"] += 1
            body = node.body[1:] if ast.get_docstring(node) else node.body
            if body:
                inside = lines[body[0].lineno - 1 : node.end_lineno]
                count["body"] += len(inside)
                count["blank"] += sum(not line.strip() for line in inside)
        elif isinstance(node, ast.ClassDef):
            count["classes"] += 1
        elif isinstance(node, COMPREHENSIONS):
            count["comprehensions"] += 1
        elif isinstance(node, ast.Assign):
            target = node.targets[0]
            values = node.value
            if isinstance(target, ast.Tuple) and isinstance(values, ast.Tuple) and len(values.elts) > 1:
                count["tuple_assignments"] += 1
            names = [n.id for n in ast.walk(target) if isinstance(n, ast.Name)]
            count["locals"] += len(names)
            count["vague_locals"] += sum(name in VAGUE for name in names)
    return count


def total(folder: str) -> tuple[Counter, dict[str, Counter]]:
    whole: Counter = collections.Counter()
    parts: dict[str, Counter] = collections.defaultdict(collections.Counter)
    for path in sorted(pathlib.Path(folder).rglob("*.py")):
        count = weigh(path)
        relative = path.relative_to(folder).parts
        parts[relative[0] if len(relative) > 1 else "."].update(count)
        whole.update(count)
    return whole, dict(parts)


def main() -> None:
    package, parts = total("embedcache")
    pages = list(pathlib.Path("docs").rglob("*.md"))
    figures = {
        "modules": package["modules"],
        "code": package["code"],
        "lines": package["lines"],
        "functions": package["functions"],
        "classes": package["classes"],
        "comments per 100 lines": round(100 * package["comments"] / max(1, package["non_blank"]), 1),
        "blank % inside functions": round(100 * package["blank"] / max(1, package["body"]), 1),
        "tuple assignments per 1,000": round(1000 * package["tuple_assignments"] / max(1, package["non_blank"]), 1),
        "comprehensions per 1,000": round(1000 * package["comprehensions"] / max(1, package["non_blank"]), 1),
        "vague locals %": round(100 * package["vague_locals"] / max(1, package["locals"]), 1),
        "tests lines": total("tests")[0]["lines"],
        "pipelines code": total("pipelines")[0]["code"],
        "benchmarks lines": total("benchmarks")[0]["lines"],
        "docs pages": len(pages),
        "docs words": sum(len(path.read_text(encoding="utf-8").split()) for path in pages),
    }
    if "--json" in sys.argv:
        print(json.dumps(figures))
        return
    for name, value in figures.items():
        print(f"{name:32} {value:>10,}")
    print("\npackage            code   lines modules")
    for name, count in sorted(parts.items(), key=lambda item: -item[1]["code"]):
        print(f"{name:15} {count['code']:>7,} {count['lines']:>7,} {count['modules']:>7}")


if __name__ == "__main__":
    main()
