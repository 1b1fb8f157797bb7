"""The folder of a run: a trained module, what it was trained on, how, and with what result.

`run.json` is written when training starts and completed when it ends. No other module knows its keys. torch is imported
only when weights are used, so that a run is opened in milliseconds.
"""

import shutil
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pydantic import Field

from embedcache.errors import ArtifactError, DataError, EmbedcacheError, PathError, one_line, quoted
from embedcache.files import AnyPath, Leases, replacing
from embedcache.processes import announce_device, torch_device
from embedcache.provenance import (
    DIGEST,
    FORMAT,
    FileName,
    Manifest,
    check_same,
    construct,
    describe_process,
    digest_file,
    prepare_folder,
    read_manifest,
    write_record,
)
from embedcache.registry import Registry, names_from, trust_code
from embedcache.settings import replace_fields
from embedcache.store.arrays import ListedFile, check_file, describe_files

if TYPE_CHECKING:
    from torch import Tensor, nn

    from embedcache.projectors.pair import AlignedPair

PAIR = "pair"
"""Kind of a run of an aligned pair."""

ADAPTER = "adapter"
"""Kind of a run that maps a new encoder's feature into the space of an old one's: an aligned pair of one tower."""

TOWERS = (PAIR, ADAPTER)
"""Kinds of runs that project items by a tower."""

_PAIR_CLASS = "embedcache.projectors.pair:AlignedPair"

NETWORKS = Registry("network", dict.fromkeys(TOWERS, _PAIR_CLASS), group="embedcache.networks")
"""Modules by name. One of your own needs no entry: `module:attribute`."""

MANIFEST = "run.json"
WEIGHTS = "model.safetensors"
LAST_WEIGHTS = "last.safetensors"
SPLIT = "split.parquet"
CHECKPOINT = "checkpoint.pt"
LOG = "losses.jsonl"
PROTOTYPES = "prototypes.txt"
"""Names of the classes that joined the closed form, one per line."""

RECIPES = "recipes"
"""Folder of the runs that `--recipe auto` compares, until the best one is kept."""

_LISTED = (WEIGHTS, LAST_WEIGHTS, SPLIT, "selection.*", PROTOTYPES, LOG)
"""Files that `run.json` lists if a run has them."""

_FILES = (".claims", MANIFEST, CHECKPOINT, RECIPES, "tensorboard", *_LISTED)
"""Files that the folder of an unfinished run may contain."""

_UNCHECKED = ("caches",)
"""Keys that the digest leaves out, as paths of moved caches may be corrected by hand."""

_RESTORE = "restore the file, or train again into a new folder"

Width: TypeAlias = Annotated[int, Field(gt=0, lt=2**31)]


class RunInput(Manifest):
    """A frozen feature, `encoder/feature`, that a module reads. `spec` opens its encoder."""

    modality: str
    feature: str
    spec: str
    fingerprint: Mapping[str, Any]
    width: Width


class RunInfo(Manifest):
    """The content of `run.json`.

    Args:
        kind: name in `NETWORKS`, or `module:attribute`, of the class or function that builds the module.
        arguments: keyword arguments of `kind`, as JSON values. For a pair, the arguments of `AlignedPair`.
        inputs: name of an input, such as its modality -> the feature. Inputs of a pair are in the order of its towers.
        settings: all settings of the training that affect its result.
        index_digest: digest of the sample and item tables of the cache, joined by `+` for several caches.
        digests: SHA-256 of other data that decides the result. They are the files that settings name, by setting, the
            weights that a part started from, as `init_from PART`, and the rows that lack a feature, as
            `failed MODALITY`.
        caches: paths of the caches, relative to the run.
        is_finished: whether the training is complete. The following fields are empty until then.
        report: result of the training.
        record: time, memory, machine, and versions of packages.
        weights: SHA-256 of the weights, which identifies them elsewhere.
        files: name -> file.
    """

    format: int = FORMAT
    kind: str
    arguments: Mapping[str, Any]
    inputs: Mapping[str, RunInput]
    settings: Mapping[str, Any] = {}
    index_digest: str = ""
    digests: Mapping[str, str] = {}
    caches: Sequence[str] = ()
    is_finished: bool = False
    report: Mapping[str, Any] = {}
    record: Mapping[str, Any] = {}
    weights: str = ""
    files: Mapping[FileName, ListedFile] = {}

    def build(self, **options: Any) -> "nn.Module":
        """Create the module, untrained. UnknownNameError or SettingError if its code is missing or not trusted."""
        module: nn.Module = NETWORKS.load(self.kind)(**self.arguments, **options)
        return module


@dataclass(frozen=True, eq=False)
class Run:
    """A run. `open` returns a finished one. Its module is read onto the device when it is first used."""

    path: Path
    info: RunInfo
    device: str = "cpu"
    leases: Leases | None = None
    started: float = 0.0

    @classmethod
    def open(cls, path: AnyPath, *, kind: str | Sequence[str] | None = None, device: str = "cpu") -> "Run":
        """Open a finished run.

        Args:
            path: its folder.
            kind: the required kind, or several accepted kinds. If None, any kind.
            device: torch device of the module, or `auto`.

        Raises:
            PathError: the folder is not a finished run.
            ArtifactError: it has another format.
            DataError: it is of another kind.
            CorruptError: `run.json` has changed since it was written, or lacks fields.
        """
        path = Path(path)
        info = read_info(path)
        if not info.is_finished:
            raise PathError(
                f"{path} is not a finished run: its training has not ended; run the same embedcache train again"
            )
        if kind is not None and info.kind not in ((kind,) if isinstance(kind, str) else kind):
            expected = f"a run of kind {kind}" if isinstance(kind, str) and kind != PAIR else "an aligned pair"
            raise DataError(f"{path}: expected {expected}, got a run of kind {info.kind}; check the path")
        return cls(path, info, device)

    @classmethod
    def reuse(cls, path: Path, info: RunInfo) -> "Run | None":
        """Return the finished run in a folder if it matches the request. Return None if there is no finished run.

        Raises:
            FingerprintError: it was trained with other settings, or on other features.
            CorruptError: a file of it has other bytes than were written.
        """
        if not (path / MANIFEST).is_file():
            return None
        stored = read_info(path)
        if not stored.is_finished:
            return None

        next_step = "give the path of a new folder, or use the same settings"
        check_same(f"run {path}", _comparable(stored), _comparable(info), next_step=next_step)
        run = cls(path, stored)
        for name in stored.files.keys() & {WEIGHTS, SPLIT}:
            run.file(name)

        # A kill may have left them. On a read-only disk nothing may be removed.
        if (path / CHECKPOINT).exists():
            (path / CHECKPOINT).unlink(missing_ok=True)
        shutil.rmtree(path / RECIPES, ignore_errors=True)
        return run

    @classmethod
    def create(cls, path: Path, info: RunInfo) -> "Run":
        """Start a run in a folder under a lease, or resume an interrupted one that has a checkpoint or recipes.

        Raises:
            PathError: the folder contains other files, or another process trains into it.
            FingerprintError: the interrupted run has other settings.
        """
        prepare_folder(path, kind="a run", marker=MANIFEST, allowed=_FILES)
        leases = Leases(path)
        if not leases.acquire(0):
            raise PathError(f"another process trains into {path}; wait for it, or give the path of a new folder")

        stored = read_info(path) if (path / MANIFEST).is_file() else None
        if stored is not None and stored.is_finished:
            leases.release(0)
            raise PathError(f"another process has just finished the run {path}; run the same command again to reuse it")

        # Work of another request is not continued. Without any work, the folder starts anew.
        if stored is not None and ((path / CHECKPOINT).is_file() or (path / RECIPES).is_dir()):
            next_step = "use the same settings to resume, or give the path of a new folder"
            check_same(f"the unfinished run {path}", _comparable(stored), _comparable(info), next_step=next_step)
        else:
            for pattern in _LISTED:
                for earlier in path.glob(pattern):
                    earlier.unlink()
        write_record(path / MANIFEST, info.to_json(), unchecked=_UNCHECKED)
        return cls(path, info, leases=leases, started=time.time())

    def finish(self, module: "nn.Module", report: Mapping[str, Any]) -> "Run":
        """Write the weights, then complete `run.json`, which makes the run a finished one."""
        # The user gave this code, so the run that was written here is opened without asking.
        trust_code(self.info.kind)
        save_weights(self.path / WEIGHTS, module)
        return self._complete(report)

    def finish_as(self, run: "Run", info: RunInfo, report: Mapping[str, Any]) -> "Run":
        """Copy the files of a finished run that trained on the same split, and finish this run with its settings."""
        for name in run.info.files:
            with replacing(self.path / name) as temporary:
                shutil.copyfile(run.file(name), temporary)
        return replace(self, info=info)._complete(report)

    def _complete(self, report: Mapping[str, Any]) -> "Run":
        names = []
        for pattern in _LISTED:
            names += [path.name for path in self.path.glob(pattern)]
        names.sort()

        # The manifest is completed last, as it says that all other files exist.
        info = replace_fields(
            self.info,
            is_finished=True,
            report=report,
            record={
                "started": datetime.fromtimestamp(self.started, UTC).isoformat(timespec="seconds"),
                "seconds": round(time.time() - self.started, 3),
                **describe_process(),
            },
            weights=digest_file(self.path / WEIGHTS),
            files=describe_files(self.path, names),
        )
        write_record(self.path / MANIFEST, info.to_json(), unchecked=_UNCHECKED)
        (self.path / CHECKPOINT).unlink(missing_ok=True)
        shutil.rmtree(self.path / RECIPES, ignore_errors=True)
        if self.leases is not None:
            self.leases.release(0)
        return Run(self.path, info)

    def load(self) -> "Run":
        """Read the module now, so that a damaged or untrusted run is rejected early, and return the run."""
        _ = self.module
        return self

    def file(self, name: str) -> Path:
        """Return the path of a file of the run, after comparing its bytes.

        Raises:
            PathError: it is missing.
            CorruptError: it has other bytes than were written.
        """
        path = self.path / name
        if name not in self.info.files:
            raise PathError(f"{path} is not a file of this run")
        check_file(path, self.info.files[name].checksum, next_step=_RESTORE)
        return path

    @property
    def selection_path(self) -> Path | None:
        """Path of the run's copy of the selection that it was trained on, None without a selection."""
        for name in self.info.files:
            if name.startswith("selection."):
                return self.file(name)
        return None

    @cached_property
    def module(self) -> "nn.Module":
        """The trained module in evaluation mode.

        Raises:
            UnknownNameError: its kind is not installed here.
            SettingError: its kind is custom code, and the run is not trusted.
            ArtifactError: the code of this kind has changed since: other arguments, or weights of other shapes.
            CorruptError: the weights have other bytes than were written.
        """
        from safetensors.torch import load_file

        path = self.file(WEIGHTS)
        device = str(torch_device(self.device, needs_float64=self.info.kind != PAIR))
        announce_device(device)

        # The shapes are compared before the module is built, as a wrong width could exceed the memory.
        try:
            weights = load_file(path)
            with names_from(self.path):
                self._check_shapes(weights)
                module = self.info.build()
            module.load_state_dict(weights)
        except (TypeError, RuntimeError) as error:
            raise ArtifactError(
                f"{self.path / MANIFEST}: expected the network {self.info.kind} that this run was trained with, got "
                f"another one: {one_line(error)}; load it with the version that wrote it, or train again"
            ) from error
        return module.to(device).eval()

    def _check_shapes(self, weights: Mapping[str, "Tensor"]) -> None:
        """Check that the module would have weights of these shapes, without using memory for them."""
        import torch

        # Custom code may not support tensors without memory, and is then not checked.
        try:
            with torch.device("meta"):
                module = self.info.build()
        except EmbedcacheError:
            raise
        except Exception:  # noqa: BLE001
            return
        module.to("meta").load_state_dict({name: value.to("meta") for name, value in weights.items()})

    @property
    def pair(self) -> "AlignedPair":
        """The trained pair of a run of that kind."""
        pair: AlignedPair = self.module  # type: ignore[assignment]
        return pair

    @property
    def projector(self) -> str:
        """Name of the projector of a pair."""
        return str(self.info.arguments["projector"])

    @property
    def shared_width(self) -> int:
        """Width of the shared space of a pair."""
        return int(self.info.arguments["shared_width"])

    @property
    def modalities(self) -> tuple[str, ...]:
        """Names of the inputs. For a pair, both modalities in the order of the towers."""
        return tuple(self.info.inputs)

    def input(self, name: str) -> RunInput:
        """Return one of the inputs, or raise a `DataError`."""
        if name not in self.info.inputs:
            raise DataError(
                f"expected a run with the modality {name}, got one of {' and '.join(self.modalities)}; choose one of "
                "these, on the command line with --modality"
            )
        return self.info.inputs[name]

    def other_modality(self, modality: str) -> str:
        """Return the modality that a pair aligns with one of its modalities, or raise a `DataError`."""
        self.input(modality)
        names = list(self.modalities)
        names.remove(modality)
        return names[0]

    def check_feature(self, modality: str, name: str, fingerprint: Mapping[str, Any]) -> None:
        """Check that a feature comes from the encoder that an input was computed by, or raise a `FingerprintError`."""
        expected = self.input(modality)
        check_same(
            f"the run's {modality} feature {expected.feature}",
            expected.fingerprint,
            fingerprint,
            next_step=f"the cache's {name} comes from another encoder: use the cache that the run was trained on",
        )

    @property
    def seed(self) -> int:
        """Random seed of the training."""
        return construct(self.path / MANIFEST, lambda: int(self.info.settings["seed"]))

    @property
    def is_control(self) -> bool:
        """Whether the run was trained on shuffled pairs."""
        return bool(self.info.settings.get("shuffle_pairs"))

    @property
    def recipe(self) -> Mapping[str, Any]:
        """All inputs and settings that decide the run, except its seeds and the machine.

        A split from a file counts as one of several, as a seed does. With `--recipe auto` the compared recipes count,
        and not the one that validation chose.
        """
        # Options that differ between the compared recipes are left out, as each seed may have chosen another recipe.
        recipes = self.info.report.get("recipes", [])
        varied_options: set[str] = set()
        for recipe in recipes:
            varied_options.update(recipe["options"])
        varied_options.discard("shuffle_prototypes")
        arguments = _without(self.info.arguments, varied_options)
        settings = _without(self.info.settings, varied_options)

        # `auto` may have chosen another device for each seed.
        kind = "a file" if "split" in self.info.digests else settings.get("split", {}).get("kind")
        split = {**settings.get("split", {}), "seed": None, "kind": kind}
        machine = {**settings.get("machine", {}), "device": None}
        return {
            "recipes": [recipe["name"] for recipe in recipes],
            "arguments": arguments,
            "inputs": {name: item.feature for name, item in self.info.inputs.items()},
            "index_digest": self.info.index_digest,
            "settings": {**settings, "seed": None, "split": split, "machine": machine},
        }


def read_info(path: Path) -> RunInfo:
    """Read the `run.json` of a run, finished or not. It raises the errors of `Run.open`."""
    values = read_manifest(
        path / MANIFEST,
        kind="run",
        make=lambda: f"embedcache train CACHE {quoted(path)}",
        next_step=_RESTORE,
        unchecked=_UNCHECKED,
    )
    values.pop(DIGEST)
    return construct(path / MANIFEST, lambda: RunInfo.model_validate(values))


def is_finished(path: Path) -> bool:
    """Return whether a folder contains a finished run."""
    return (path / MANIFEST).is_file() and read_info(path).is_finished


def _without(values: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Return values without some names, also in groups of values."""
    remaining = {}
    for name, value in values.items():
        if name not in names:
            remaining[name] = _without(value, names) if isinstance(value, Mapping) else value
    return remaining


def _comparable(info: RunInfo) -> dict[str, Any]:
    """Return the fields that are equal in equal runs."""
    # Files whose digests are compared may have moved, so their paths do not count.
    settings = dict(info.settings)
    if "split" in info.digests:
        settings["split"] = {**settings["split"], "kind": "a file"}
    if "selection" in info.digests:
        settings["selection"] = "a file"
    if "prototypes" in info.digests:
        settings["prototypes"] = "a cache"
    fields = info.model_dump(mode="json", include={"kind", "arguments", "inputs", "index_digest", "digests"})
    return {**fields, "settings": settings}


def save_weights(path: Path, module: "nn.Module") -> None:
    """Write the parameters and buffers of a module as safetensors, atomically."""
    from safetensors.torch import save_file

    state = {name: value.contiguous() for name, value in module.state_dict().items()}
    with replacing(path) as temporary:
        save_file(state, temporary)
