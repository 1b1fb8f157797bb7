"""Fenced code blocks of the documentation, and how tests run them."""

import contextlib
import io
import itertools
import linecache
import re
import shlex
import subprocess
from pathlib import Path
from typing import NamedTuple

from tests.cli.run import embedcache

ROOT = Path(__file__).parents[1]
TUTORIAL = ROOT / "docs" / "tutorial.md"
BLOCK = re.compile(r"^(?:<!-- (.+?) -->\n)?```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)
"""The HTML comment right above, the language and the content of a block."""
NOT_RUN = "not run: "
VARIES = "varies: "
"""Beginnings of such comments; the reason follows."""


class Block(NamedTuple):
    """A fenced block of a page."""

    page: str
    comment: str
    language: str
    code: str

    @property
    def is_run(self) -> bool:
        """Whether no comment says that the block is not run."""
        return not self.comment.startswith(NOT_RUN)


def blocks_of(page: Path) -> list[Block]:
    """Return all blocks of a page, in order."""
    return [Block(str(page.relative_to(ROOT)), *found) for found in BLOCK.findall(page.read_text())]


def run_block(block: Block, folder: Path) -> str:
    """Run a block in a folder and return its output; commands of embedcache and Python run in this process."""
    if block.language == "python":
        output = io.StringIO()
        with contextlib.chdir(folder), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            name = f"<block of {block.page}>"
            lines = block.code.splitlines(keepends=True)
            linecache.cache[name] = (len(block.code), None, lines, name)  # the source of functions, not the page
            exec(compile(block.code, name, "exec"), {"__name__": "__main__"})  # noqa: S102
        return output.getvalue()
    parts = itertools.groupby(block.code.splitlines(), key=lambda line: line.startswith("embedcache "))
    return "".join(run_lines(list(lines), folder, is_command=is_command) for is_command, lines in parts)


def run_lines(lines: list[str], folder: Path, *, is_command: bool) -> str:
    """Run lines of a shell block, which are commands of embedcache or a script."""
    if is_command:
        results = [embedcache(*shlex.split(line)[1:], cwd=folder) for line in lines]
        assert all(result.code == 0 for result in results), results
        return "".join(result.stdout + result.stderr for result in results)
    done = subprocess.run(["bash", "-euc", "\n".join(lines)], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr
