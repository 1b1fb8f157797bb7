"""Every setting of a training run."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

from embedcache.cache.split_settings import SplitSettings
from embedcache.errors import SettingError

Start: TypeAlias = Literal["cca", "csa", "procrustes", "ridge", "random"]


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """What is trained and where it starts.

    Args:
        projector: a name in `PROJECTORS` or `module:attribute`, for both sides, or `IMAGE+TEXT`.
        shared_width: P of the shared space.
        start: the closed form that the projectors start from, or `random`; None is `cca` where both sides can start so.
        shrinkage: of the closed form, in units of the mean eigenvalue.
        dropout: share of each tower's input set to zero in training; more for fewer pairs.
    """

    projector: str = "mlp"
    shared_width: int = 256
    start: Start | None = None
    shrinkage: float = 1.0
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.shared_width < 1:
            raise SettingError(f"shared width is {self.shared_width}; it must be at least 1")
        _require_one_of("start", self.start, (None, *get_args(Start)))
        if not 0 < self.shrinkage < math.inf:
            raise SettingError(f"shrinkage is {self.shrinkage}; it must be above 0")
        if not 0 <= self.dropout < 1:
            raise SettingError(f"dropout is {self.dropout}; it must be at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """How it is trained: AdamW, linear warm-up, then a cosine to zero.

    Args:
        epochs: passes over the training samples; 0 keeps the closed form as it is.
        batch_size: samples in a batch, at most; every batch is its own set of negatives. None: 1,024, or all samples
            where they are fewer.
        learning_rate: the highest.
        weight_decay: of matrices; biases, norms and the temperature have none.
        warmup_share: share of all steps with a rising learning rate.
        gradient_norm: gradients are scaled down to this length.
        patience: training ends after so many epochs without a better validation recall; None: never before its end.
    """

    epochs: int = 30
    batch_size: int | None = None
    learning_rate: float = 1e-3
    weight_decay: float = 0.02
    warmup_share: float = 0.1
    gradient_norm: float = 1.0
    patience: int | None = None

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise SettingError(f"epochs is {self.epochs}; it must be at least 0")
        if self.batch_size is not None and self.batch_size < 2:
            raise SettingError(f"batch size is {self.batch_size}; it must be at least 2: the others are the negatives")
        for name in ("learning_rate", "gradient_norm"):
            if not 0 < getattr(self, name) < math.inf:
                raise SettingError(f"{name.replace('_', ' ')} is {getattr(self, name)}; it must be above 0")
        if not 0 <= self.weight_decay < math.inf:
            raise SettingError(f"weight decay is {self.weight_decay}; it must be at least 0")
        if not 0 <= self.warmup_share <= 1:
            raise SettingError(f"warmup share is {self.warmup_share}; it must lie between 0 and 1")
        if self.patience is not None and self.patience < 1:
            raise SettingError(f"patience is {self.patience}; it must be at least 1 epoch")


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """What training makes small.

    Args:
        name: `multi_positive`, `info_nce`, `siglip`, `sail`, or `module:attribute`.
        mixup: a of FuseMix's latent mixup: half of each batch is mixed into the other half, both sides by one share
            drawn from Beta(a, a); 0: none.
        structure: weight of the STRUCTURE regulariser; 0: none.
    """

    name: str = "multi_positive"
    mixup: float = 0.0
    structure: float = 0.0

    def __post_init__(self) -> None:
        for name in ("mixup", "structure"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise SettingError(f"{name} is {getattr(self, name)}; it must be a number of at least 0")


@dataclass(frozen=True, kw_only=True)
class MachineSettings:
    """Where and how it runs.

    Args:
        device: a torch device; under torchrun, `cuda` is each process's own.
        precision: `bfloat16` trains under autocast.
        threads: torch threads on the CPU; None is one for small steps, where more cost more than they give, else all.
        memory_gb: features that fit into this many 10^9 bytes are read once; larger ones are mapped.
        checkpoint_s: seconds between checkpoints.
        tensorboard: write TensorBoard's event files beside the JSON lines.
    """

    device: str = "cpu"
    precision: Literal["float32", "bfloat16"] = "float32"
    threads: int | None = None
    memory_gb: float = 4.0
    checkpoint_s: float = 60.0
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise SettingError(f"threads is {self.threads}; it must be at least 1")
        _require_one_of("precision", self.precision, ("float32", "bfloat16"))
        if not self.memory_gb >= 0:
            raise SettingError(f"memory is {self.memory_gb} GB; it must be at least 0")
        if not self.checkpoint_s >= 0:
            raise SettingError(f"checkpoint seconds is {self.checkpoint_s}; it must be at least 0")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """A whole training run.

    Args:
        model: what is trained.
        loss: what training makes small.
        optimizer: how.
        split: which samples are held out.
        language: captions of this language only; None takes all.
        captions: `draw` takes one caption a sample, drawn anew each epoch; `all` takes all of them as positives.
        selection: path of a selection: only its samples are trained on; what is held out does not change. `{seed}` in
            it stands for the seed: so seeds of one recipe can each have their own.
        shuffle_pairs: train on wrong pairs: the control that must end at chance.
        block_rows: samples that stay neighbours in a batch's order; 1 mixes all. None: 1 where the features fit the
            memory, else 64, as a disk gives neighbours faster.
        seed: of the order, the drawn captions, the initialisation and dropout.
        machine: where it runs.
    """

    model: ModelSettings = field(default_factory=ModelSettings)
    loss: LossSettings = field(default_factory=LossSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    split: SplitSettings = field(default_factory=SplitSettings)
    language: str | None = None
    captions: Literal["draw", "all"] = "draw"
    selection: str | None = None
    shuffle_pairs: bool = False
    block_rows: int | None = None
    seed: int = 0
    machine: MachineSettings = field(default_factory=MachineSettings)

    def __post_init__(self) -> None:
        _require_one_of("captions", self.captions, ("draw", "all"))
        if not 0 <= self.seed < 2**32:
            raise SettingError(f"seed is {self.seed}; it must be at least 0 and below 2^32")
        if self.block_rows is not None and self.block_rows < 1:
            raise SettingError(f"block rows is {self.block_rows}; it must be at least 1")
        if self.captions == "all" and (self.loss.name == "info_nce" or self.loss.mixup):
            other = (
                "info_nce has one positive an image" if self.loss.name == "info_nce" else "mixup mixes single captions"
            )
            raise SettingError(f"captions is 'all', but {other}; use --captions draw or --loss multi_positive")

    @property
    def selection_path(self) -> Path | None:
        """The file that `selection` names."""
        return None if self.selection is None else Path(self.selection.replace("{seed}", str(self.seed)))

    def to_json(self) -> Mapping[str, Any]:
        """Give what decides the result as JSON values."""
        values = asdict(self)
        device = self.machine.device.partition(":")[0]  # which of several GPUs decides nothing
        return {**values, "machine": {"device": device, "precision": self.machine.precision}}


def _require_one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise SettingError(f"{name} is {value!r}; it must be one of {', '.join(map(str, allowed))}")
