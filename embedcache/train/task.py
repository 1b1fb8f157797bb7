"""The interface of what the training loop trains: a module, its loss, its batches and its validation.

`embedcache.train.pair.PairTask` is one; a task of your own is any object with these attributes and methods.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

from torch import nn

from embedcache.errors import EmbedcacheError


class TaskLoader(Protocol):
    """The batches of a task. `embedcache.train.batches.Loader` reads them ahead.

    Which items a batch holds must depend on nothing but the number of the epoch, or a resumed run would differ.
    """

    num_samples: int
    """Training samples per epoch."""
    num_steps: int
    """Batches per epoch."""
    waited_s: float
    """Seconds that the training loop has waited for batches."""

    def epoch(self, number: int, *, first_step: int) -> Iterator[Any]:
        """Iterate over the batches of one epoch, from a step on; under torchrun over this process's part of each."""
        ...


class Task(Protocol):
    """What `Trainer` trains. Attributes may be properties; `objective` is first read under the seed of the run."""

    @property
    def module(self) -> nn.Module:
        """The module whose weights are saved; after training it has those of the best epoch."""
        ...

    @property
    def objective(self) -> nn.Module:
        """A module that contains `module` and maps a batch to its loss, a scalar; all its parameters are trained.

        Under torchrun `DistributedDataParallel` wraps it, which averages gradients over the processes.
        """
        ...

    @property
    def loader(self) -> TaskLoader:
        """The training batches."""
        ...

    @property
    def parts(self) -> Mapping[str, Sequence[str]]:
        """Name of a part -> names of its submodules and parameters in `module`, for `init_from` and `trainable`."""
        ...

    @property
    def unit(self) -> str:
        """What a sample is called in progress messages, in the plural."""
        ...

    @property
    def forward_flops(self) -> float:
        """Operations of a forward pass of one batch: below 7e9 a step runs on one thread."""
        ...

    def count(self, batch: Any) -> int:
        """Return the number of samples of a batch, over all processes."""
        ...

    def measure(self) -> Mapping[str, float]:
        """Compute the validation metrics with `module` in evaluation mode; called on the first process only."""
        ...

    def score(self, measures: Mapping[str, float]) -> float:
        """Return the number by which epochs are compared; a higher one is better."""
        ...

    def watch(self) -> Mapping[str, float]:
        """Return values to log with each step, such as a temperature; may be empty."""
        ...

    def explain(self, batch: Any, *, loss: float, step: int) -> EmbedcacheError:
        """Return the error to raise for a loss that is NaN or infinite; it should name the samples of the batch."""
        ...
