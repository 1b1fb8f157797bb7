"""Factory strings of FAISS, checked before an index is built: some of them crash or hang the process."""

import os
import re
import resource
import signal
import subprocess
import sys

import numpy as np

from embedcache.arrays import normalize
from embedcache.errors import SettingError
from embedcache.search.faiss_gpu import faiss_reason
from embedcache.search.faiss_index import make_index

_SAFE = re.compile(
    r"(IVF\d+(_HNSW32)?,)?(Flat|SQ(4|6|8|fp16)|PQ\d+(x4)?|RaBitQ[1-8]?(,Refine\(SQ8\))?)|HNSW([2-9]|[1-9]\d\d?)"
)
"""Factory strings that FAISS builds or refuses; others may crash the process, such as `HNSW0`, and are tried before."""
_NUM_TRIED = 1000
_NUM_QUERIES, _NUM_NEIGHBORS = 10, 10
_TRIAL_S = 300


def check_factory(factory: str, width: int, num_vectors: int) -> None:
    """Check that FAISS can build an index by a factory string: some strings crash or hang the process.

    Strings that are not known to be safe are tried in a process of their own, with few vectors and lists.

    Raises:
        SettingError: more lists than vectors, or FAISS fails to build such an index.
    """
    for found in re.finditer(r"IVF(\d+)", factory):
        if not 1 <= int(found[1]) <= num_vectors:
            raise SettingError(
                f"factory: expected 1 to {num_vectors:,} lists, as there are so many vectors, got {found[1]} in "
                f"{factory!r}"
            )
    if _SAFE.fullmatch(factory):
        return
    num_tried = min(num_vectors, _NUM_TRIED)
    tried = re.sub(r"IVF(\d+)", lambda found: f"IVF{min(int(found[1]), num_tried, 4)}", factory)
    call = f"_try_factory({tried!r}, {width}, {num_tried})"
    program = f"from embedcache.search.factories import _try_factory; print({call})"
    try:
        done = subprocess.run(
            [sys.executable, "-P", "-c", program],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
            capture_output=True,
            text=True,
            timeout=_TRIAL_S,
            check=False,
        )
        reason = f"it ends with {signal.Signals(-done.returncode).name}" if done.returncode < 0 else done.stdout.strip()
    except subprocess.TimeoutExpired:
        reason = f"it takes more than {_TRIAL_S} s"
    if reason:
        raise SettingError(
            f"factory: expected one with which FAISS indexes {num_tried:,} vectors of width {width}, got {factory!r}: "
            f"{reason}; try --factory Flat"
        )


def _try_factory(factory: str, width: int, num_vectors: int) -> str:
    """Use an index of random vectors as one of a cache is used: empty it, fill it in parts, search it.

    Return why that fails, empty if it does not, or FAISS refuses the string or the training, which is said later.
    """
    machine_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    resource.setrlimit(resource.RLIMIT_AS, (machine_bytes, machine_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    vectors_NP = normalize(np.random.default_rng(0).standard_normal((num_vectors, width)).astype(np.float32))
    rows_N, k = np.arange(num_vectors), min(num_vectors, _NUM_NEIGHBORS)
    try:
        try:
            index = make_index(factory, width, device="cpu")
            index.train(vectors_NP)
        except SettingError:
            return ""
        index.add(rows_N, vectors_NP)
        index = index.emptied()
        for part in np.array_split(rows_N, min(num_vectors, 2)):
            index.add(part, vectors_NP[part])
        scores_QK, _ = index.search(vectors_NP[:_NUM_QUERIES], k)
        if (np.diff(scores_QK) > 0).any():
            return "its scores are no cosines: they rise from the best to the worst"
    except RuntimeError as error:
        return faiss_reason(error)
    except MemoryError:
        return "it takes more memory than this machine has"
    return ""
