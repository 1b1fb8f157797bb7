"""Training steps of one likelihood relative to their matrix products, captions with and without kept keys and values.

CPU time of one thread. The network and the batch sizes are those of `pipelines/uniperceiver`: 3 layers of width 128 on
16 image tokens of width 272 and a word table of width 384, all random and in memory: the forward and backward passes,
clipping and AdamW, not the reading. Texts of a batch have one length.

The floor is the time of the step's matrix products alone, forward and backward, on matrices of the same shapes: linear
layers, attention, readouts, and logits of all candidates. Gradients of image tokens and word vectors, which are frozen,
do not count, nor does the second computation of logits, which is what keeps them from being held.

Captions are searched by an untrained network, whose words are about equally probable, by the mean log-probability of
their words, so that nearly all hypotheses live to the last one.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from inspect import signature
from typing import Any, Literal, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import added_peak_gb, in_own_process, median_rates, use_one_core, warmed_up
from benchmarks.products import Product, attention, cpu_seconds, linears, make_products
from embedcache.cli.console import print_line, print_table
from embedcache.networks import captions
from embedcache.networks.candidates import Candidates
from embedcache.networks.shared import SharedNetwork, Tokens, Words
from embedcache.networks.words import BLANK, END, NUM_SPECIAL
from embedcache.train.likelihood import LikelihoodObjective, LoadedTask
from embedcache.train.likelihood_batches import TaskBatch
from embedcache.train.settings import OptimizerSettings
from embedcache.train.trainer import keep_freed_memory, make_optimizer, update

IMAGE = {"width": 272, "axis": {"kind": "grid", "rows": 4, "columns": 4, "box": [0, 0, 1, 1]}}
NUM_TOKENS, WORD_WIDTH, NUM_WORDS = 16, 384, 20_000
REPEATS = 15


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step of one task.

    Args:
        read: where inputs are read; `next`: after each word of a caption.
        batch_size: examples per batch.
        num_words: words per input text; 0: none.
        num_blanks: blanks per input text.
        num_candidates: candidates, of `candidate_words` words each.
        is_symmetric: whether candidates are compared with inputs, too.
        model: sizes of the network that are not its defaults.
    """

    read: Literal["task", "blank", "next"]
    batch_size: int
    num_words: int = 0
    num_blanks: int = 0
    num_candidates: int = 1024
    candidate_words: int = 1
    is_symmetric: bool = False
    model: Mapping[str, Any] | None = None

    @property
    def num_read(self) -> int:
        """Number of representations of a batch that have a target."""
        of_item = {"task": 1, "blank": self.num_blanks, "next": self.num_words + 1}
        return self.batch_size * of_item[self.read]

    def network(self) -> SharedNetwork:
        """Create the network in training mode, with a random word table."""
        words = [str(number) for number in range(NUM_WORDS)]
        network = SharedNetwork(
            modalities={"image": IMAGE}, words=words, word_width=WORD_WIDTH, families=["task"], **(self.model or {})
        )
        network.set_words(np.random.default_rng(0).standard_normal((NUM_WORDS, WORD_WIDTH), np.float32))
        return network.train()


CASES = {
    "classes, 34 names": Case(read="task", batch_size=128, num_candidates=34, candidate_words=2),
    "retrieval": Case(read="task", batch_size=128, num_candidates=128, candidate_words=10, is_symmetric=True),
    "captions, 48 words": Case(read="next", batch_size=64, num_words=12, num_candidates=48),
    "masked words": Case(read="blank", batch_size=96, num_words=12, num_blanks=2, num_candidates=48),
    "answers, 13 names": Case(read="blank", batch_size=128, num_words=9, num_blanks=1, num_candidates=13),
    "captions, 1,024 words": Case(read="next", batch_size=64, num_words=12),
    "captions, 20,000 words": Case(read="next", batch_size=64, num_words=12, num_candidates=20_000),
}


class Costs(NamedTuple):
    """CPU seconds of a step and of its matrix products alone, and the largest resident memory above the imports."""

    step: float
    products: float
    peak_gb: float


def main(*, quick: bool) -> None:
    """Print the tables of training steps and of captions."""
    rows = []
    for name, case in CASES.items():
        costs: Costs = in_own_process(_measure, name, 1 if quick else REPEATS)[0]
        width = case.network().output_width
        held_gb = 4 * case.num_read * case.num_candidates / 1e9
        rows.append(
            [
                f"{name}, batch {case.batch_size}",
                f"{sum(product.flops for product in products_of(case)) / 1e9:,.1f}",
                f"{1 / costs.step:.1f}",
                f"{1 / costs.products:.1f}",
                f"{costs.step / costs.products:.2f}",
                f"{costs.peak_gb:.2f}",
                f"{held_gb:.3f}",
                f"{held_gb * width:,.2f}",
            ]
        )
    columns = ["CPU time of a training step", "GFLOP", "steps per s", "products alone, per s", "ratio to the products"]
    print_table([*columns, "added peak, GB", "logits, GB", "logits x width, GB"], rows)
    _show_captions(1 if quick else REPEATS // 3)


def _measure(name: str, repeats: int) -> Costs:
    """Alternate a step and its products on one core; call it in a process of its own."""
    use_one_core()
    case = CASES[name]
    step, peak_gb = added_peak_gb(lambda: warmed_up(make_step(case)))
    calls = {"step": step, "products": make_products(products_of(case))}
    calls["products"]()
    costs = median_rates({key: cpu_seconds(call) for key, call in calls.items()}, repeats=repeats)
    return Costs(costs["step"], costs["products"], peak_gb)


class _Task(NamedTuple):
    """What the objective reads of a task."""

    family: str = "task"
    loss_weight: float = 1.0
    smoothing: float = 0.0


def make_step(case: Case) -> Callable[[], None]:
    """Return a training step on one batch: forward and backward passes, clipping and AdamW, as the training loop."""
    objective = LikelihoodObjective(case.network(), [_Task()])
    optimizer, loaded = make_optimizer(objective, OptimizerSettings()), LoadedTask(0, make_batch(case))
    keep_freed_memory()

    def step() -> None:
        objective(loaded).backward()
        update(objective, optimizer, 1e-3, 1.0, torch.amp.GradScaler("cpu", enabled=False))

    return step


def make_batch(case: Case) -> TaskBatch:
    """Draw tokens, texts, candidates and which of them is right."""
    generator = torch.Generator().manual_seed(0)

    def texts(count: int, num_words: int) -> Words:
        numbers = torch.randint(NUM_SPECIAL, NUM_WORDS + NUM_SPECIAL, (count, num_words), generator=generator)
        return Words(numbers, torch.full((count,), num_words))

    words = texts(case.batch_size, case.num_words) if case.num_words else None
    if words is not None:
        words.numbers_BL[:, : case.num_blanks] = BLANK
    return TaskBatch(
        family="task",
        tokens={"image": Tokens(torch.randn(case.batch_size, NUM_TOKENS, IMAGE["width"], generator=generator))},
        words=words,
        read=case.read,
        candidates=texts(case.num_candidates, case.candidate_words),
        positives=(
            torch.arange(case.num_read),
            torch.arange(case.num_read) % case.num_candidates
            if case.is_symmetric
            else torch.randint(case.num_candidates, (case.num_read,), generator=generator),
        ),
        is_read=torch.ones(case.batch_size, case.num_words + 1, dtype=torch.bool) if case.read == "next" else None,
        is_symmetric=case.is_symmetric,
    )


def products_of(case: Case) -> list[Product]:
    """Return the matrix products of a training step."""
    batch, shapes = make_batch(case), _Shapes(case)
    num_read = {"task": 1, "blank": case.num_words, "next": case.num_words + 1}[case.read]
    lists = [] if batch.words is None else [batch.words.numbers_BL]
    num_positions = NUM_TOKENS + case.num_words
    if case.read == "next":
        num_positions += case.num_words + 1
        lists.append(torch.tensor([BLANK]))
    num_rows = case.num_read if case.read == "blank" else case.batch_size * num_read
    products = [
        *linears(case.batch_size * NUM_TOKENS, IMAGE["width"], shapes.width),
        *shapes.words(lists),
    ]
    products = [product._replace(num_gradients=1) for product in products]  # tokens and word vectors are frozen
    products += shapes.transformer(case.batch_size, 1 + num_positions, num_read, num_rows)
    products += [product._replace(num_gradients=1) for product in shapes.words([batch.candidates.numbers_BL])]
    products += shapes.transformer(case.num_candidates, 1 + case.candidate_words, 1, case.num_candidates)
    sizes = [(case.num_read, case.num_candidates), (case.num_candidates, case.num_read)]
    logits = [Product(1, rows, shapes.width, columns) for rows, columns in sizes]
    return products + (logits if case.is_symmetric else logits[:1])


class _Shapes:
    """Shapes of the products of the network of a case."""

    def __init__(self, case: Case) -> None:
        defaults = {name: value.default for name, value in signature(SharedNetwork).parameters.items()}
        self.sizes: Mapping[str, Any] = {**defaults, **(case.model or {})}
        self.width = self.sizes["width"]

    def words(self, lists: list[Tensor]) -> Iterator[Product]:
        """The adapter of words, of which each distinct one is mapped once."""
        for numbers in lists:
            yield from linears(len(torch.unique(numbers)), WORD_WIDTH, self.width)

    def transformer(self, items: int, positions: int, num_read: int, num_rows: int) -> Iterator[Product]:
        """The layers, the last one for the positions that are read alone, and the readout of some rows of them."""
        for number in range(self.sizes["num_layers"]):
            queries = num_read if number == self.sizes["num_layers"] - 1 else positions
            yield from linears(items * positions, self.width, 2 * self.width)
            yield from linears(items * queries, self.width, self.width)
            yield from attention(items, self.sizes["num_heads"], queries, positions, self.width)
            yield from linears(items * queries, self.width, self.width)
            yield from linears(items * queries, self.width, self.sizes["feed_forward"], self.width)
        yield from linears(num_rows, self.width, self.width)


BATCH, BEAM, MAX_LENGTH, VOCABULARY = 32, 5, 12, 1000


def _show_captions(repeats: int) -> None:
    found: dict[str, float] = in_own_process(_measure_captions, repeats)[0]
    base = next(iter(found.values()))
    rows = [[name, f"{1000 * seconds / BATCH:.1f}", f"{seconds / base:.2f}"] for name, seconds in found.items()]
    print_table(["beam search of captions, CPU time", "ms per caption", "ratio to the first"], rows)
    print_line(f"{BATCH} images, beam {BEAM}, up to {MAX_LENGTH} of {VOCABULARY:,} words")


@torch.no_grad()
def _measure_captions(repeats: int) -> dict[str, float]:
    """Return the CPU seconds of captions of one batch, by the way in which they are searched."""
    use_one_core()
    network = Case(read="next", batch_size=BATCH).network().eval()
    numbers = torch.tensor([END, *range(NUM_SPECIAL, NUM_SPECIAL + VOCABULARY)])
    vocabulary = numbers, Candidates(network.encode_words(numbers))
    values = torch.randn(BATCH, NUM_TOKENS, IMAGE["width"], generator=torch.Generator().manual_seed(0))

    def write(rows: slice) -> list[captions.Caption]:
        tokens = {"image": Tokens(values[rows])}
        likelihood = network.likelihood("task")
        options = {"beam": BEAM, "max_length": MAX_LENGTH, "length_power": 1.0}
        return captions.write_captions(network, tokens, likelihood, vocabulary, **options)

    def recompute() -> None:
        with mock.patch.object(captions, "CaptionSteps", RecomputedSteps):
            write(slice(None))

    calls: dict[str, Callable[[], object]] = {
        "together, kept keys and values": lambda: write(slice(None)),
        "one by one, kept keys and values": lambda: [write(slice(row, row + 1)) for row in range(BATCH)],
        "together, all computed anew at each word": recompute,
    }
    for call in calls.values():
        call()
    return median_rates({name: cpu_seconds(call) for name, call in calls.items()}, repeats=repeats)


class RecomputedSteps:
    """Captions that grow by one word per call, as `CaptionSteps`, on nothing that was computed before."""

    def __init__(self, network: SharedNetwork, tokens: Mapping[str, Tokens]) -> None:
        self._network, self._values_NTD = network, tokens["image"].values_BTD
        self._words_NL = torch.empty((len(self._values_NTD), 0), dtype=torch.int64)

    def __call__(self, numbers_N: Tensor | None, parents_N: Tensor) -> Tensor:
        """Append a word to N captions, and return the representations of the blank after it: (N, P)."""
        self._values_NTD, self._words_NL = self._values_NTD[parents_N], self._words_NL[parents_N]
        if numbers_N is not None:
            self._words_NL = torch.cat([self._words_NL, numbers_N[:, None]], dim=1)
        blanks_N1 = torch.full((len(parents_N), 1), BLANK)
        texts = torch.cat([self._words_NL, blanks_N1], dim=1)
        lengths_N = torch.full((len(texts),), self._words_NL.shape[1])
        return self._network.predict_words({"image": Tokens(self._values_NTD)}, Words(texts, lengths_N))[
            :, self._words_NL.shape[1]
        ]
