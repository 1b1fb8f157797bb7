"""Settings of a training run. Nothing heavy is imported here, so that the command line starts quickly."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeAlias

from pydantic import PositiveInt, field_serializer

from embedcache.dataset.settings import LANGUAGE_DEFAULT, SELECTION_HELP, WHERE, SplitSettings, with_split_seed
from embedcache.errors import SettingError
from embedcache.processes import AUTO, Precision
from embedcache.settings import (
    Settings,
    flat_settings,
    from_flat,
    get_setting,
    group,
    parse_size,
    setting,
    to_flat,
    to_words,
)

Initialization: TypeAlias = Literal["cca", "csa", "procrustes", "ridge", "random"]


class ModelSettings(Settings):
    """Architecture of the projectors and their initialization.

    Example:
        >>> settings = TrainSettings(model=ModelSettings(projector="linear", shared_width=64))
        >>> settings.model.projector, settings.model.dropout
        ('linear', 0.1)
    """

    projector: str = setting(
        "mlp",
        "Projector of both modalities: linear, mlp, glu, fusemix, token, asif, … or module:attribute; IMAGE+TEXT names "
        "one for each.",
        metavar="NAME[+NAME]",
    )
    shared_width: int = setting(256, "Width of the shared space.", ge=1, le=2**16)
    initialization: Initialization | None = setting(
        None,
        "Closed-form solution that training starts from, or random weights.",
        default_text="cca if both projectors can start from it, else random",
    )
    shrinkage: float = setting(1.0, "Regularization of the closed form, in units of the mean eigenvalue.", gt=0)
    dropout: float = setting(
        0.1, "Fraction of each input set to zero in training; use more for fewer pairs.", ge=0, lt=1
    )


class OptimizerSettings(Settings):
    """Settings of AdamW, whose learning rate warms up linearly and then decays to zero along a cosine.

    Example:
        >>> settings = TrainSettings(optimizer=OptimizerSettings(epochs=5, batch_size=256))
        >>> settings.optimizer.epochs, settings.optimizer.lr
        (5, 0.001)
    """

    epochs: int = setting(30, "Passes over the training samples; 0 keeps the closed form as it is.", ge=0, le=10**6)
    batch_size: int | None = setting(
        None,
        "Samples per batch; the other samples of the batch are the negatives.",
        ge=2,
        default_text="1024, or all samples if fewer",
    )
    lr: float = setting(1e-3, "Peak learning rate, reached after warm-up.", gt=0)
    weight_decay: float = setting(0.02, "AdamW weight decay (weight matrices only).", ge=0)
    warmup_fraction: float = setting(0.1, "Fraction of all steps used for linear warm-up.", ge=0, le=1)
    max_grad_norm: float = setting(1.0, "Clip gradients to this L2 norm.", gt=0)
    patience: int | None = setting(
        None,
        "Stop after this many epochs without a better validation recall.",
        ge=1,
        default_text="train for all epochs",
    )


class LossSettings(Settings):
    """Settings of the training loss.

    Example:
        >>> settings = TrainSettings(loss=LossSettings(name="siglip", widths=(64, 128)))
        >>> settings.loss.name, settings.loss.widths
        ('siglip', (64, 128))
    """

    name: str = setting(
        "multi_positive",
        "Training loss: multi_positive, info_nce, siglip, sail or module:attribute.",
        flat_name="loss",
        metavar="NAME",
    )
    temperature: float | None = setting(
        None,
        "Temperature that training begins with; it is learned, unless --trainable leaves it out.",
        ge=0.001,
        le=0.5,
        default_text="0.07, or that of --init-from",
    )
    mixup: float = setting(0.0, "FuseMix alpha: mix each batch with lambda ~ Beta(alpha, alpha); 0 disables it.", ge=0)
    structure: float = setting(0.0, "Weight of the STRUCTURE regularizer; 0 disables it.", ge=0)
    widths: tuple[PositiveInt, ...] = setting(
        (),
        "Matryoshka: add the loss of the first components of the shared space, for each of these widths, such as "
        "64,128.",
        metavar="N,...",
    )


class MachineSettings(Settings):
    """Settings of the machine: device, precision, threads and memory.

    Example:
        >>> settings = TrainSettings(machine=MachineSettings(device="cpu", threads=1))
        >>> settings.machine.device, settings.machine.precision
        ('cpu', 'float32')
    """

    device: str = setting(
        AUTO,
        "Torch device, such as cpu, cuda or cuda:1; auto is that of the run in the folder, or else the first of cuda, "
        "mps and cpu that this machine has. Under torchrun, cuda is each process's own GPU.",
        metavar="DEVICE",
    )
    precision: Precision = setting(
        "float32", "Precision of matrix products; float16 scales the loss, for GPUs without bfloat16."
    )
    threads: int | None = setting(
        None,
        "Torch threads on the CPU.",
        ge=1,
        le=1024,
        affects_result=False,
        default_text="one for small steps, else all cores",
    )
    memory: int = setting(
        4 * 2**30,
        "Load the features of a modality that fit into half of this, such as 4GB; memory-map larger ones.",
        gt=0,
        affects_result=False,
        parse=parse_size,
        metavar="SIZE",
        default_text="4GB",
    )
    checkpoint_s: float = setting(60.0, "Seconds between checkpoints.", ge=0, affects_result=False, metavar="SECONDS")
    report_to: tuple[str, ...] = setting(
        (),
        "Report losses and validation metrics to these trackers too: tensorboard, wandb.",
        metavar="NAME",
        affects_result=False,
    )

    @field_serializer("device")
    def _device_kind(self, device: str) -> str:
        """Return what is recorded of a device: which of several GPUs it is changes nothing."""
        return device.partition(":")[0]


class PartSettings(Settings):
    """Which parts of a module start from other runs, and which are trained; a pair has image, text, temperature."""

    init_from: tuple[str, ...] = setting(
        (),
        "Run whose weights are the initialization of all parts, or of one: image=RUN. Repeat it for several parts.",
        metavar="PART=RUN",
        commas="keep",
        panel="fine-tuning",
    )
    trainable: str | None = setting(
        None,
        "Train only these parts, such as text or text+temperature; the others stay as they are.",
        metavar="PART[+PART]",
        panel="fine-tuning",
        default_text="all",
    )


class FitSettings(Settings):
    """Settings of the training loop, for any task."""

    optimizer: OptimizerSettings = group(OptimizerSettings)
    parts: PartSettings = group(PartSettings)
    seed: int = setting(0, "Random seed of initialization, batch order and dropout.", ge=0, lt=2**32)
    machine: MachineSettings = group(MachineSettings)


class TrainSettings(Settings):
    """Settings of `train_projectors`, nested by topic. A setting passed by name replaces the value given here.

    Example:
        >>> settings = TrainSettings(optimizer=OptimizerSettings(epochs=2), split=SplitSettings(kind="key"))
        >>> settings.optimizer.epochs, settings.split.kind, settings.seed
        (2, 'key', 0)
        >>> report = embedcache.train_projectors("cache", "short-run", settings=settings, epochs=1)
        >>> report.best_epoch <= 1
        True
    """

    recipe: Literal["auto"] | None = setting(
        None,
        "Compare closed forms, with and without --prototypes, and trainings that suit the number of pairs, and keep "
        "what validates best; options that are given apply to all of them.",
    )
    model: ModelSettings = group(ModelSettings)
    loss: LossSettings = group(LossSettings)
    optimizer: OptimizerSettings = group(OptimizerSettings)
    parts: PartSettings = group(PartSettings)
    split: SplitSettings = group(SplitSettings)
    language: str | None = setting(
        None,
        "Use only captions of this language; any uses all.",
        metavar="CODE",
        default_text=LANGUAGE_DEFAULT,
    )
    captions: Literal["draw", "all"] = setting(
        "draw", "For several captions per sample: draw one per epoch, or use all as positives."
    )
    views: tuple[str, ...] = setting(
        (),
        "Read items from views of their feature, drawn in each epoch with these weights: image=plain:0.5,flip:0.5; "
        "plain is the feature itself. May be repeated for the other modality.",
        metavar="MODALITY=VIEW:WEIGHT,…",
        commas="keep",
    )
    selection: str | None = setting(
        None,
        f"{SELECTION_HELP.removesuffix('.')}; {{seed}} stands for the seed.",
        metavar="FILE",
    )
    where: str | None = setting(
        **{**WHERE, "help": WHERE["help"].replace("Use only", "Split, train and validate with only the")}
    )
    negatives: tuple[str, ...] = setting(
        (),
        "Table of hard negatives, written by curate negatives; {seed} stands for the seed. Repeat it for several "
        "caches.",
        metavar="FILE",
        commas="keep",
    )
    num_negatives: int = setting(
        1,
        "Hard negatives to draw for each sample and epoch; they are part of the batch size.",
        ge=1,
    )
    shuffle_pairs: bool = setting(False, "Train on shuffled pairs, as a control that must stay at chance.")
    prototypes: Path | None = setting(
        None,
        "Cache of prototypes, the classes of a classifier as further pairs of the closed form; see extract "
        "prototypes:ENCODER.",
        metavar="CACHE",
        panel="prototypes",
    )
    prototype_weight: float = setting(
        1.0,
        "Training pairs that a prototype counts as.",
        gt=0,
        panel="prototypes",
    )
    shuffle_prototypes: bool = setting(False, "Shuffle the names of the prototypes, as a control.", panel="prototypes")
    block_rows: int | None = setting(
        None,
        "Shuffle blocks of this many neighboring samples; 1 shuffles single samples.",
        ge=1,
        default_text="1, or 64 if features are memory-mapped",
    )
    seed: int = setting(0, "Random seed of batch order, caption draws, initialization and dropout.", ge=0, lt=2**32)
    machine: MachineSettings = group(MachineSettings)

    def model_post_init(self, _context: object) -> None:
        if too_wide := [width for width in self.loss.widths if width > self.model.shared_width]:
            raise SettingError(
                f"widths: expected at most the width of the shared space, {self.model.shared_width}, got "
                f"{too_wide[0]}; lower it, or raise --shared-width"
            )
        if self.negatives and self.loss.mixup:
            raise SettingError(f"mixup: expected 0 with hard negatives, got {self.loss.mixup}; omit one of them")
        if self.captions == "all" and self.loss.mixup:
            raise SettingError(
                "captions: expected draw, got all: mixup mixes single captions; use captions=draw or mixup=0"
            )

    @property
    def selection_path(self) -> Path | None:
        """Path of the selection, with the seed filled in."""
        return None if self.selection is None else Path(self.selection.replace("{seed}", str(self.seed)))

    @property
    def negatives_paths(self) -> list[Path]:
        """Paths of the tables of hard negatives, with the seed filled in."""
        return [Path(path.replace("{seed}", str(self.seed))) for path in self.negatives]


def train_settings(options: Mapping[str, Any]) -> TrainSettings:
    """Build settings from flat names; `split_seed` defaults to `seed`."""
    return from_flat(TrainSettings, with_split_seed(options))


def command_line(settings: TrainSettings) -> list[str]:
    """Return the command-line options that ask for these settings: those that differ from their defaults."""
    words, defaults = [], train_settings({"seed": settings.seed})
    given = to_flat(settings)
    for item in flat_settings(TrainSettings):
        value, default = get_setting(settings, item), get_setting(defaults, item)
        if isinstance(value, Mapping):
            value = {modality: part for modality, part in value.items() if part != default.get(modality)}
        is_kept = settings.recipe is not None and item.name in given
        if item.name == "seed" or is_kept or value != default:
            option = f"--{item.name.replace('_', '-')}"
            words += [option] if value is True else [word for part in to_words(value) for word in (option, part)]
    return words


class AdapterSettings(Settings):
    """Settings of `fit_adapter`: how items are held out, and the control on shuffled rows.

    Example:
        >>> settings = AdapterSettings(split=SplitSettings(kind="key"), shuffle_pairs=True)
        >>> settings.split.kind, settings.shuffle_pairs
        ('key', True)
    """

    split: SplitSettings = group(SplitSettings)
    shuffle_pairs: bool = setting(False, "Fit on shuffled rows, as a control that must stay at chance.")
    seed: int = setting(0, "Random seed of the split, and of shuffled rows.", ge=0, lt=2**32)


def adapter_settings(options: Mapping[str, Any]) -> AdapterSettings:
    """Build settings from flat names; `split_seed` defaults to `seed`."""
    return from_flat(AdapterSettings, with_split_seed(options))
