"""What a model's weights are: one hash over all of them, and reading them from a local file."""

import hashlib
import os
import pickle
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

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
