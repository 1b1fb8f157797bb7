"""A model of the Hugging Face hub, or a local folder that looks like one."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from embedcache.encoders.open import EncoderSpec
from embedcache.errors import PathError

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
def hub_errors(what: str, *, instead: str) -> Iterator[None]:
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


def hub_commit(repository: str, *, what: str, instead: str) -> str:
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
    with hub_errors(what, instead=instead):
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=["config.json"])).name


def _download(model: str, revision: str | None, instead: str) -> ModelFolder:
    from huggingface_hub import snapshot_download

    with hub_errors(f"{model!r} is no local folder and", instead=instead):
        for weights in ("*.safetensors", "*.bin"):
            patterns = [*_SMALL_FILES, weights]
            path = Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
            if any(path.rglob(weights)):
                return ModelFolder(path, revision=path.name)
    raise PathError(f"the hub's {model!r} holds no .safetensors or .bin weights; choose another, or {instead}")
