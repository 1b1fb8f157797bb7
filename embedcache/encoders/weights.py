"""What a model's weights are: one hash over all of them, and reading them from a local file.

A model of the Hugging Face hub, or a local folder that looks like one.

A transformers model from a folder on this machine, quietly, with every weight accounted for.
"""

import hashlib
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from embedcache.encoders.open import EncoderSpec
from embedcache.errors import ArtifactError, CorruptError, PathError


def hash_weights(state: Mapping[str, torch.Tensor]) -> str:
    """Get the SHA-256, as 64 hex digits, over names, dtypes, shapes and bytes of all weights, sorted by name."""
    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def check_file(path: Path) -> None:
    """Refuse a weights file that is not there.

    Raises:
        PathError: names it.
    """
    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise PathError(f"the weights file {path} {what}; give the path of a .safetensors or .pth file")


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a `.safetensors` or a torch file; nothing in it is executed.

    Raises:
        PathError: there is no such file.
        CorruptError: it holds no weights.
    """
    check_file(path)
    if not os.access(path, os.R_OK):  # safetensors says that the file does not exist
        raise PathError(f"{path} cannot be read: permission denied")
    try:
        if path.suffix == ".safetensors":
            tensors: dict[str, torch.Tensor] = load_file(path)
            return tensors
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # torch's own text advises to run what is in the file
        raise CorruptError(f"{path} holds no plain table of weights; save the model's state_dict()") from error
    except (SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        first_line = str(error).partition("\n")[0]
        raise CorruptError(f"{path} can't be read as weights: {first_line}; get the file again") from error
    return _tensors(path, state)


def load_weights(module: torch.nn.Module, path: Path) -> None:
    """Read a file's weights into a model; every name and shape must fit.

    Raises:
        PathError: there is no such file.
        CorruptError: it holds no weights.
        ArtifactError: they are another model's.
    """
    state = read_weights(path)
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        lines = " ".join(str(error).split())
        raise ArtifactError(
            f"the weights in {path} are another model's: {lines[:300]}; name the model that made them"
        ) from error


def _tensors(path: Path, state: object) -> dict[str, torch.Tensor]:
    if isinstance(state, Mapping) and isinstance(state.get("state_dict"), Mapping):
        state = state["state_dict"]
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise CorruptError(f"{path} holds no table of weights; save the model's state_dict()")
    return {str(name): value for name, value in state.items()}


_SMALL_FILES = ["*.json", "*.txt", "*.model", "*.jinja"]
LOCAL_NEXT = "give the path of a local folder instead"


@dataclass(frozen=True)
class ModelFolder:
    """A model's files on this machine.

    Args:
        path: the folder.
        revision: the hub's commit; None for a folder of the user's own.
    """

    path: Path
    revision: str | None = None


def model_folder(spec: EncoderSpec, *, instead: str = LOCAL_NEXT) -> ModelFolder:
    """Find a model's folder, or get it from the hub at the commit, tag or branch in the option `revision`.

    Args:
        spec: names the folder or the model.
        instead: what the user can do where the hub does not give it.

    Raises:
        PathError: a local path that is no folder, or a name the hub does not know, or no hub to be reached.
    """
    path = Path(spec.model).expanduser()
    if path.is_dir():
        return ModelFolder(path)
    if spec.is_path or path.exists():
        what = "is a file" if path.exists() else "does not exist"
        raise PathError(f"the model folder {path} {what}; give a folder with config.json and weights in it")
    return _download(spec.model, spec.options.get("revision"), instead)


@contextmanager
def translate_hub_errors(what: str, *, instead: str) -> Iterator[None]:
    """Turn the hub libraries' words for a missing model or network into ours.

    Args:
        what: what is wanted from the hub.
        instead: what the user can give in its place.

    Raises:
        PathError: says what was wanted and what to give in its place.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split()).partition(". ")[0]
        raise PathError(
            f"{what} can't be had from the Hugging Face hub: {reason}; check the name and the network, or {instead}"
        ) from error


def find_hub_commit(repository: str, *, what: str, instead: str) -> str:
    """Get the commit of a model on the hub, before a library fetches the weights in a way of its own.

    Where the hub can't be reached this fails at once; the libraries' own downloads retry for most of a minute.

    Args:
        repository: `owner/name`, or `owner/name@revision`.
        what: what is wanted from the hub, for the message.
        instead: what the user can give in its place.

    Raises:
        PathError: the hub does not know it, or can't be reached and this machine's copy of the hub lacks it.
    """
    from huggingface_hub import snapshot_download

    name, _, revision = repository.partition("@")
    with translate_hub_errors(what, instead=instead):
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=["config.json"])).name


def _download(model: str, revision: str | None, instead: str) -> ModelFolder:
    from huggingface_hub import snapshot_download

    with translate_hub_errors(f"{model!r} is no local folder and", instead=instead):
        for weights in ("*.safetensors", "*.bin"):
            patterns = [*_SMALL_FILES, weights]
            path = Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
            if any(path.rglob(weights)):
                return ModelFolder(path, revision=path.name)
    raise PathError(f"the hub's {model!r} holds no .safetensors or .bin weights; choose another, or {instead}")


_UNUSED = ("pooler.", "lm_head.")
"""Weights a checkpoint may lack: what they would make is no feature of ours."""


def load_config(folder: Path) -> Any:
    """Read a model's `config.json`.

    Raises:
        PathError: it is missing, or names no architecture that transformers knows.
    """
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PathError(
            f"{folder} holds no model that transformers can read: {reason}; give a folder written by save_pretrained()"
        ) from error


def load_pretrained(loader: Any, folder: Path, config: Any) -> tuple[torch.nn.Module, str]:
    """Load a model in float32 and hash its weights.

    Args:
        loader: `AutoModel`, or a class with the same `from_pretrained`.
        folder: holds `config.json` and weights.
        config: from `load_config`.

    Returns:
        The model in eval mode, and the SHA-256 of those of its weights that the checkpoint holds.

    Raises:
        PathError: there are no weights.
        CorruptError: a file of weights is cut short or is no such file.
        ArtifactError: the weights are another model's.
    """
    with _quietly():
        try:
            model, info = loader.from_pretrained(folder, config=config, dtype=torch.float32, output_loading_info=True)
        except OSError as error:
            reason = " ".join(str(error).split())[:200]
            raise PathError(f"no weights in {folder}: {reason}; give a folder with model.safetensors") from error
        except (SafetensorError, UnpicklingError, EOFError) as error:
            raise CorruptError(f"the weights in {folder} can't be read; get the folder again") from error
        except (RuntimeError, ValueError) as error:
            raise _misfit(folder, " ".join(str(error).split())[:200]) from error
    missing = set(info["missing_keys"])
    if any(not name.startswith(_UNUSED) for name in missing):
        raise _misfit(folder, f"{len(missing)} are missing, such as {min(missing)}")
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in missing}
    return model.eval(), hash_weights(state)


def _misfit(folder: Path, reason: str) -> ArtifactError:
    return ArtifactError(f"the weights in {folder} do not fit its config.json: {reason}; get the folder again")


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the progress bar, and without the table of weights that one tower leaves unused."""
    from transformers.utils import logging

    was_shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if was_shown:
            logging.enable_progress_bar()
