"""Runs inside CLIP_benchmark: a loader of the kind it calls, and its own command with that loader added."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from embedcache.arrays import Array, Floats
from embedcache.encoders.backends import torch_device
from embedcache.errors import SettingError
from embedcache.inference import ProjectedEncoder, open_projected_encoder
from embedcache.projectors.saved import load_pair, read_config
from embedcache.registry import require
from embedcache.reports.results import MODEL
from embedcache.sources.images import rgb_image

EXTRA = "clip-benchmark"


class Tokens:
    """Token ids of several texts, each of its own length, in the place of CLIP_benchmark's tensor of them.

    Args:
        ids: one (T,) int64 array a text.
    """

    def __init__(self, ids: Sequence[Array]) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def to(self, device: Any) -> "Tokens":
        """Give the same: an encoder takes its input from the CPU."""
        del device
        return self


class RunModel:
    """A run with both of its frozen encoders, as CLIP_benchmark calls a model.

    Its vectors are float32 under autocast too: precision is that of the features which the run was trained on.

    Args:
        image: the image side.
        text: the text side.
        device: where vectors are given.
    """

    def __init__(self, image: ProjectedEncoder, text: ProjectedEncoder, device: str) -> None:
        self._image, self._text, self._device = image, text, device

    def encode_image(self, images: Tensor) -> Tensor:
        """Embed prepared pictures: (B, 3, H, W) as `transform` gives them -> (B, P) float32, rows of length 1."""
        return self._given(self._image.embed(list(images.cpu().numpy())))

    def encode_text(self, tokens: Tokens) -> Tensor:
        """Embed texts that `tokenizer` took apart: (B, P) float32, rows of length 1."""
        return self._given(self._text.embed(tokens.ids))

    def eval(self) -> "RunModel":
        """Give itself: it is never in training."""
        return self

    def to(self, device: str | torch.device) -> "RunModel":
        """Give itself.

        Raises:
            SettingError: another device than it was opened on.
        """
        if _place(device) != _place(self._device):
            raise SettingError(f"the run was opened on {self._device}, not on {device}: give the device to load()")
        return self

    def _given(self, vectors_BP: Floats) -> Tensor:
        return torch.from_numpy(vectors_BP).to(self._device)


def load(
    model_name: str, pretrained: str | Path, cache_dir: str | None = None, device: str | torch.device = "cpu"
) -> tuple[RunModel, Callable[[Image], Tensor], Callable[[Sequence[str]], Tokens]]:
    """Open a run as CLIP_benchmark opens a model: (model, transform, tokenizer).

    `transform` turns one PIL picture of any mode into what the image encoder was fed when the run's features were
    extracted, (3, H, W) uint8 or float32; a picture with transparency or an EXIF orientation is treated as there.

    Args:
        model_name: not used; CLIP_benchmark writes it into its results.
        pretrained: the run's folder.
        cache_dir: not used: the run names its encoders.
        device: where the encoders and projectors run; an encoder that ran on onnxruntime stays on the CPU.

    Raises:
        PathError: the folder is no finished run.
        MissingExtraError: an encoder's package is not installed.
        FingerprintError: an encoder that opens now is not the one whose features the run was trained on.
        SettingError: there is no such device.
    """
    del model_name, cache_dir
    device = str(torch_device(str(device)))
    pair, config = load_pair(Path(pretrained), device=device)
    image = open_projected_encoder("image", config.image, pair.image, device)
    text = open_projected_encoder("text", config.text, pair.text, device)
    return (
        RunModel(image, text, device),
        lambda picture: torch.from_numpy(image.prepare([rgb_image(picture)])[0]),
        lambda texts: Tokens(text.prepare(texts)),
    )


def evaluate(run_path: Path, arguments: Sequence[str]) -> None:
    """Run CLIP_benchmark's `eval` on a run: it prints, and writes a JSON file.

    Mixed precision is off, as it would round nothing but the similarities. Unless `arguments` say otherwise, the
    result goes to `{dataset}_RUN_{language}_{task}.json`, RUN being the last part of the run's path.

    Args:
        run_path: the run.
        arguments: options of its `eval`, such as `--dataset` and `--dataset_root`.

    Raises:
        MissingExtraError: CLIP_benchmark is not installed.
        EmbedcacheError: what `load` raises.
    """
    read_config(run_path)  # before the many imports of the next line
    command = require("clip_benchmark.cli", extra=EXTRA)
    register()
    _mend_accuracy()
    output = f"{{dataset}}_{run_path.resolve().name}_{{language}}_{{task}}.json"
    ours = ["--model_type", MODEL, "--model", MODEL, "--pretrained", str(run_path), "--no_amp"]
    with _arguments(["eval", "--output", output, *arguments, *ours]):
        command.main()


def register() -> None:
    """Add `embedcache` to the model types that CLIP_benchmark knows in this process.

    Raises:
        MissingExtraError: CLIP_benchmark is not installed.
    """
    models = require("clip_benchmark.models", extra=EXTRA)
    models.TYPE2FUNC[MODEL] = load
    if MODEL not in models.MODEL_TYPES:
        models.MODEL_TYPES.append(MODEL)


def top_k_accuracy(output: Tensor, target: Tensor, topk: Sequence[int] = (1,)) -> list[float]:
    """Share of items whose class is among the first k, for each k; the form is CLIP_benchmark's `accuracy`.

    Args:
        output: (N, C), the score of each class.
        target: (N,), the number of each item's class.
        topk: each k.
    """
    is_hit_NK = output.topk(max(topk), dim=1).indices == target[:, None]
    return [is_hit_NK[:, :k].any(dim=1).double().mean().item() for k in topk]


def _place(device: str | torch.device) -> torch.device:
    """Tell `cuda` and `cuda:0` apart from other devices, not from each other."""
    return torch.empty(0, device=torch_device(str(device))).device


def _mend_accuracy() -> None:
    """Let CLIP_benchmark count hits beside NumPy 2.4.

    Its release 1.6.2 makes a float of an array that holds one number, which NumPy refuses from 2.4 on (its issue 147).
    """
    modules = [
        require("clip_benchmark.metrics.zeroshot_classification", extra=EXTRA),
        require("clip_benchmark.metrics.linear_probe", extra=EXTRA),
    ]
    try:
        modules[0].accuracy(torch.eye(1), torch.zeros(1, dtype=torch.int64))
    except TypeError:
        for module in modules:
            vars(module)["accuracy"] = top_k_accuracy


@contextmanager
def _arguments(words: Sequence[str]) -> Iterator[None]:
    """Let a command that reads `sys.argv` find these words there."""
    before = sys.argv
    sys.argv = ["clip_benchmark", *words]
    try:
        yield
    finally:
        sys.argv = before
