"""Every setting of a training run."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeAlias

from embedcache.errors import SettingError

Start: TypeAlias = Literal["cca", "procrustes", "ridge", "random"]


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
        if self.shrinkage <= 0:
            raise SettingError(f"shrinkage is {self.shrinkage}; it must be above 0")
        if not 0 <= self.dropout < 1:
            raise SettingError(f"dropout is {self.dropout}; it must be at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class OptimizerSettings:
    """How it is trained: AdamW, linear warm-up, then a cosine to zero.

    Args:
        epochs: passes over the training samples; 0 keeps the closed form as it is.
        batch_size: samples in a batch; every batch is its own set of negatives.
        learning_rate: the highest.
        weight_decay: of matrices; biases, norms and the temperature have none.
        warmup_share: share of all steps with a rising learning rate.
        gradient_norm: gradients are scaled down to this length.
    """

    epochs: int = 30
    batch_size: int = 1024
    learning_rate: float = 1e-3
    weight_decay: float = 0.02
    warmup_share: float = 0.1
    gradient_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise SettingError(f"epochs is {self.epochs}; it must be at least 0")
        if self.batch_size < 2:
            raise SettingError(f"batch size is {self.batch_size}; it must be at least 2: the others are the negatives")
        if self.learning_rate <= 0:
            raise SettingError(f"learning rate is {self.learning_rate}; it must be above 0")


@dataclass(frozen=True, kw_only=True)
class SplitSettings:
    """How samples are cut into train, val and test.

    Args:
        kind: `strict` keeps near-duplicates on one side; `key` cuts by a hash of each key; `column` takes the
            source's `split` column; anything else is the path of another run's split.parquet.
        val_share: share of the samples for validation.
        test_share: share of the samples for test.
        image_cosine: `strict`: images above this cosine are near-duplicates.
        text_cosine: `strict`: captions above this cosine are near-duplicates.
        seed: which of the possible cuts.
    """

    kind: str = "strict"
    val_share: float = 0.1
    test_share: float = 0.25
    image_cosine: float = 0.9
    text_cosine: float = 0.7
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("val_share", "test_share"):
            if not 0 < getattr(self, name) < 1:
                raise SettingError(f"{name} is {getattr(self, name)}; it must lie between 0 and 1")
        if self.val_share + self.test_share >= 1:
            raise SettingError(
                f"val_share {self.val_share} and test_share {self.test_share} leave nothing for training"
            )


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """A whole training run.

    Args:
        model: what is trained.
        optimizer: how.
        split: which samples are held out.
        loss: `multi_positive`, `info_nce`, `siglip`, `sail`, or `module:attribute`.
        language: captions of this language only; None takes all.
        shuffle_pairs: train on wrong pairs: the control that must end at chance.
        seed: of the order, the drawn captions, the initialisation and dropout.
        device: a torch device.
        precision: `bfloat16` trains under autocast.
        threads: torch threads on the CPU; None is one for small steps, where more cost more than they give, else all.
        memory_gb: features that fit into this many 10^9 bytes are read once; larger ones are mapped.
    """

    model: ModelSettings = field(default_factory=ModelSettings)
    optimizer: OptimizerSettings = field(default_factory=OptimizerSettings)
    split: SplitSettings = field(default_factory=SplitSettings)
    loss: str = "multi_positive"
    language: str | None = None
    shuffle_pairs: bool = False
    seed: int = 0
    device: str = "cpu"
    precision: Literal["float32", "bfloat16"] = "float32"
    threads: int | None = None
    memory_gb: float = 4.0

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise SettingError(f"threads is {self.threads}; it must be at least 1")
        if self.memory_gb < 0:
            raise SettingError(f"memory is {self.memory_gb} GB; it must be at least 0")

    def to_json(self) -> Mapping[str, Any]:
        """Give what decides the result as JSON values."""
        return {name: value for name, value in asdict(self).items() if name not in ("memory_gb", "threads")}
