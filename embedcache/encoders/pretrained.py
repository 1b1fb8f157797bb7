"""A transformers model from a folder on this machine, quietly, with every weight accounted for."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError

from embedcache.encoders.weights import hash_weights
from embedcache.errors import ArtifactError, CorruptError, PathError

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
