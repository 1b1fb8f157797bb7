"""python -m benchmarks [name …]"""

import importlib
import sys

NAMES = ("help", "gather", "extract", "decode")

for name in sys.argv[1:] or NAMES:
    if name not in NAMES:
        sys.exit(f"unknown benchmark {name!r}; known: {', '.join(NAMES)}")
    importlib.import_module(f"benchmarks.{name}").main()
