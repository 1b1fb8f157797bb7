"""Load model weights: from a local file, from a model folder, or from the Hugging Face hub; and hash them."""

import hashlib
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from embedcache.encoders.open import EncoderSpec
from embedcache.errors import ArtifactError, CorruptError, PathError, SettingError, one_line
from embedcache.files import expand_home, hub_errors
from embedcache.registry import has_trust

USE_LOCAL_FOLDER = "give the path of a local folder instead"

_OPTIONAL_WEIGHTS = ("pooler.", "lm_head.", "masked_spec_embed")
"""Weights that a checkpoint may lack: no feature depends on them."""
_DAMAGED = (SafetensorError, pickle.UnpicklingError, EOFError)
"""Errors of files that are no weights, or cut."""


def hash_weights(state: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256, as 64 hex digits, over names, dtypes, shapes and bytes of all weights, sorted by name."""
    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(f"{name}\0{tensor.dtype}\0{tuple(tensor.shape)}\0".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return sha.hexdigest()


def check_weights_file(path: Path) -> None:
    """Check that a path is a file that can be read, else raise `PathError`."""
    if not path.is_file():
        reason = "is a folder" if path.is_dir() else "does not exist"
        raise PathError(f"expected a weights file, got {path}, which {reason}; give a .safetensors or .pth file")

    if not os.access(path, os.R_OK):  # safetensors would report that the file does not exist
        raise PathError(f"cannot read {path}: permission denied; change its permissions")


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a `.safetensors` or torch file, without executing anything in it."""
    check_weights_file(path)

    try:
        is_torch = path.suffix != ".safetensors"
        state = torch.load(path, map_location="cpu", weights_only=True) if is_torch else load_file(path)
        state = state.get("state_dict", state)
        if all(isinstance(tensor, torch.Tensor) for tensor in state.values()):
            return {str(name): tensor for name, tensor in state.items()}
    except (*_DAMAGED, RuntimeError, ValueError, KeyError, AttributeError):
        pass  # the reason that torch gives advises to execute the file

    raise CorruptError(f"cannot read {path} as the tensors of a model; save its state_dict()")


def load_weights(module: torch.nn.Module, path: Path, *, in_order: bool = False) -> str:
    """Load a file's weights into a model, and return their hash.

    Every name and shape must fit. With `in_order`, names differ, and the weights are in the order of the module's.
    """
    state = read_weights(path)
    names = list(module.state_dict()) if in_order else list(state)

    try:
        module.load_state_dict(dict(zip(names, state.values(), strict=True)))
    except (RuntimeError, ValueError) as error:
        raise ArtifactError(f"the weights in {path} belong to another model: {one_line(error)}") from error
    return hash_weights(state)


class ModelFolder(NamedTuple):
    """A model's files on this machine, and their commit on the hub; None for a local folder."""

    path: Path
    revision: str | None = None


def find_model_folder(spec: EncoderSpec, *, next_step: str = USE_LOCAL_FOLDER) -> ModelFolder:
    """Return a model's folder; download it from the hub at the commit, tag or branch in the option `revision`."""
    path = expand_home(spec.model)
    if path.is_dir():
        return ModelFolder(path)

    if spec.is_path or path.exists():
        reason = "is a file" if path.exists() else "does not exist"
        raise PathError(f"expected a model folder, got {path}, which {reason}; give one with config.json and weights")
    from huggingface_hub import snapshot_download

    with translate_hub_errors(f"{spec.model!r} (not a local folder)", next_step=next_step):
        # Weights in both formats are common; the second is downloaded only if the first is missing.
        for weights in ("*.safetensors", "*.bin"):
            patterns = ["*.json", "*.txt", "*.model", "*.jinja", weights]
            if has_trust():
                patterns.append("*.py")

            path = Path(snapshot_download(spec.model, revision=spec.options.get("revision"), allow_patterns=patterns))
            if any(path.rglob(weights)):
                return ModelFolder(path, revision=path.name)

    raise PathError(f"{spec.model!r} on the hub has no .safetensors or .bin weights; choose another, or {next_step}")


def find_hub_commit(repository: str, *, model: str, next_step: str) -> str:
    """Return the commit of a hub repository, `owner/name` or `owner/name@revision`, before a library downloads it.

    This fails at once if the hub is unreachable; the libraries' own downloads retry for most of a minute.
    """
    from huggingface_hub import snapshot_download

    name, _, revision = repository.partition("@")
    with translate_hub_errors(model, next_step=next_step):
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=["config.json"])).name


def translate_hub_errors(model: str, *, next_step: str) -> AbstractContextManager[None]:
    """Return a context that raises the errors of a download from the hub as `PathError`."""
    return hub_errors(f"download {model} from the Hugging Face hub", f"check the name and the network, or {next_step}")


def load_config(folder: Path) -> Any:
    """Read a transformers model's `config.json`."""
    from transformers import AutoConfig

    return load_part(AutoConfig, folder, "model that transformers can read", "give a folder of save_pretrained()")


def load_part(loader: Any, folder: Path, part: str, next_step: str) -> Any:
    """Call `loader.from_pretrained`. Code in the folder runs only within `trust_files`; nobody is asked.

    Raises:
        SettingError: the folder has its own code.
        PathError: the folder has no such part that can be read.
    """
    try:
        return loader.from_pretrained(folder, trust_remote_code=has_trust())
    except (OSError, ValueError, KeyError) as error:
        if "trust_remote_code" in str(error) and not has_trust():
            raise needs_trust(folder) from None
        raise PathError(f"no {part} in {folder}: {one_line(error)}; {next_step}") from error


def needs_trust(folder: Path) -> SettingError:
    """Create the error for a model with code of its own, which nobody said to trust."""
    return SettingError(f"{folder} has code of its own; if you trust its author, use --trust, or trust_files()")


def find_model_class(config: Any) -> Any:
    """Return the transformers class that loads a model, or only the encoder of an encoder-decoder such as T5."""
    import transformers

    is_whole = not getattr(config, "is_encoder_decoder", False)
    return transformers.AutoModel if is_whole else transformers.AutoModelForTextEncoding


def load_pretrained(loader: Any, folder: Path, config: Any) -> tuple[torch.nn.Module, str]:
    """Load a transformers model in float32 and eval mode, and hash the weights that the checkpoint contains."""
    try:
        with quiet_transformers():
            model, info = loader.from_pretrained(
                folder,
                config=config,
                dtype=torch.float32,
                output_loading_info=True,
                trust_remote_code=has_trust(),
            )
    except OSError as error:
        raise PathError(f"no weights in {folder}: {one_line(error)}; give a folder with model.safetensors") from error
    except _DAMAGED as error:
        raise CorruptError(f"cannot read the weights in {folder}; download the folder again") from error
    except (RuntimeError, ValueError) as error:
        raise _misfit(folder, one_line(error)) from error

    # Random weights differ from run to run, so a missing weight is an error unless no feature depends on it.
    missing_names = set(info["missing_keys"])
    if any(not name.startswith(_OPTIONAL_WEIGHTS) for name in missing_names):
        raise _misfit(folder, f"{len(missing_names)} are missing, such as {min(missing_names)}")

    state = {name: tensor for name, tensor in model.state_dict().items() if name not in missing_names}
    return model.eval(), hash_weights(state)


def _misfit(folder: Path, reason: str) -> ArtifactError:
    return ArtifactError(f"the weights in {folder} do not fit its config.json: {reason}; download the folder again")


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Disable the progress bar, and the table of weights that a single tower leaves unused."""
    from transformers.utils import logging

    had_progress_bar = logging.is_progress_bar_enabled()
    verbosity = logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()

    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_progress_bar:
            logging.enable_progress_bar()
