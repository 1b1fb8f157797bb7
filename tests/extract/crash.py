"""Runs embedcache and kills it with SIGKILL before, or right after, a file of a given name takes its place.

    python -m tests.extract.crash before|after PATTERN NUMBER argument …

PATTERN is matched with the end of the path; NUMBER counts the matches from 1.
"""

import os
import re
import signal
import sys
from pathlib import Path

from embedcache.cli.main import main

replace = Path.replace


def crash_at(moment: str, pattern: str, number: int) -> None:
    """Every file of a cache comes to be by a rename: kill this process at one of them."""
    left = [number]

    def replace_or_die(self: Path, target: Path) -> Path:
        if re.search(pattern + "$", str(target)):
            left[0] -= 1
        if left[0] == 0 and moment == "after":
            replace(self, target)
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return replace(self, target)

    Path.replace = replace_or_die  # type: ignore[method-assign, assignment]


if __name__ == "__main__":
    _, moment, pattern, number, *arguments = sys.argv
    crash_at(moment, pattern, int(number))
    sys.argv = ["embedcache", *arguments]
    main()
