"""Build and search an index with autofaiss in its own environment: `PYTHON peer_autofaiss.py FOLDER MEMORY K`.

FOLDER holds `vectors/0.npy` and `queries.npy`, float32 rows of length 1; `answers.npz` is written there.
"""

import sys
import time
from pathlib import Path

import numpy as np
from autofaiss import build_index


def main(folder: Path, memory: str, k: int) -> None:
    """Build the index, search with each query alone, then with all at once."""
    queries = np.load(folder / "queries.npy")
    started = time.perf_counter()
    index, _ = build_index(
        embeddings=str(folder / "vectors"),
        index_path=str(folder / "autofaiss.index"),
        index_infos_path=str(folder / "infos.json"),
        max_index_memory_usage=memory,
        current_memory_available="16G",
        metric_type="ip",
        verbose=30,
    )
    build_s = time.perf_counter() - started
    peak = 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    index.search(queries[:1], k)
    seconds, rows = [], []
    for query in queries:
        started = time.perf_counter()
        rows.append(index.search(query[None], k)[1][0])
        seconds.append(time.perf_counter() - started)
    started = time.perf_counter()
    index.search(queries, k)
    batch_s = (time.perf_counter() - started) / len(queries)
    kind = type(index).__name__
    np.savez(
        folder / "answers.npz",
        rows=rows,
        single_ms=1000 * np.median(seconds),
        batch_ms=1000 * batch_s,
        build_s=build_s,
        peak=peak,
        kind=kind,
        size=(folder / "autofaiss.index").stat().st_size,
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
