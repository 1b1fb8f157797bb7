"""Parts of a module: weights taken from other runs, and what is trained.

A part has a name, and the names of its submodules and parameters in the module: `{"temperature": ["log_scale"]}`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from embedcache.errors import DataError, SettingError
from embedcache.registry import unknown_name
from embedcache.runs import WEIGHTS, Run

Parts: TypeAlias = Mapping[str, Sequence[str]]
ALL_PARTS = "*"
"""Stands for all parts that are not named."""


def parts_of(network: nn.Module) -> Parts:
    """Return the parts of a network: those that its method `parts` names, else each submodule and each parameter."""
    named: Callable[[], Parts] | None = getattr(network, "parts", None)
    if named is not None:
        return named()
    names = [name for name, _ in (*network.named_children(), *network.named_parameters(recurse=False))]
    return {name: [name] for name in names}


def find_sources(words: Sequence[str], parts: Parts) -> dict[str, Path]:
    """Return the run that each part starts from: a word is `PART=RUN`, or `RUN` for all parts that have none.

    Raises:
        UnknownNameError: there is no part of that name.
        SettingError: a part is named twice, or two words name all parts.
    """
    named = _parse_sources(words)
    for name in named:
        if name not in (*parts, ALL_PARTS):
            raise unknown_name("part", name, parts, hint="named in init_from")
    return {name: named.get(name) or named[ALL_PARTS] for name in parts if name in named or ALL_PARTS in named}


def source_digests(words: Sequence[str]) -> dict[str, str]:
    """Return the SHA-256 of the weights of each run that is named, by part; `*` stands for all parts.

    Raises:
        PathError: a folder is not a finished run.
        SettingError: a part is named twice.
    """
    return {name: Run.open(path).info.weights for name, path in _parse_sources(words).items()}


def _parse_sources(words: Sequence[str]) -> dict[str, Path]:
    sources: dict[str, Path] = {}
    for word in words:
        name, separator, run = word.partition("=")
        if not separator or Path(word).exists():  # a path may contain a `=`
            name, run = ALL_PARTS, word
        if name in sources:
            raise SettingError(
                f"init_from: expected one run for {name}, got {sources[name]} and {run}; name parts, as in image={run}"
            )
        sources[name] = Path(run)
    return sources


def load_parts(module: nn.Module, parts: Parts, sources: Mapping[str, Path]) -> None:
    """Set whole parts of a module, their buffers included, to the weights of finished runs.

    Raises:
        PathError: a folder is not a finished run.
        CorruptError: the weights have other bytes than were written.
        DataError: a run lacks weights of a part, has others, or has them in other shapes; nothing is set then.
    """
    state = module.state_dict()
    loaded: dict[str, Tensor] = {}
    for name, run_path in sources.items():
        weights = load_file(Run.open(run_path).file(WEIGHTS))
        expected = {key: value.shape for key, value in state.items() if _is_in(key, parts[name])}
        found = {key: value.shape for key, value in weights.items() if _is_in(key, parts[name])}
        wrong = sorted(key for key in {**expected, **found} if expected.get(key) != found.get(key))
        if wrong:
            key = wrong[0]
            raise DataError(
                f"init_from: {len(wrong)} weights of the part {name} of {run_path} do not fit: {key}: expected shape "
                f"{expected.get(key)}, got {found.get(key)}; use a run with the same architecture and widths, or name "
                "the parts to take as PART=RUN"
            )
        loaded |= {key: weights[key] for key in found}
    with torch.no_grad():
        for key, value in loaded.items():
            state[key].copy_(value)


def parse_trainable(names: str | None, parts: Parts) -> tuple[str, ...]:
    """Return the parts that are trained: those of a text such as `text+temperature`; None: all."""
    if names is None:
        return tuple(parts)
    for name in names.split("+"):
        if name not in parts:
            raise unknown_name("part", name, parts, hint=f"named in trainable {names}")
    return tuple(names.split("+"))


def freeze(module: nn.Module, parts: Parts, trainable: Iterable[str]) -> list[nn.Module]:
    """Freeze all parts but some: their parameters get no gradients.

    What belongs to several parts is trained if one of them is, and what belongs to none is.

    Returns:
        The frozen submodules, which must stay in evaluation mode, so that norm statistics do not change.
    """
    trained = [path for name in trainable for path in parts[name]]
    frozen = [path for name in parts if name not in set(trainable) for path in parts[name]]

    def is_frozen(name: str) -> bool:
        return _is_in(name, frozen) and not _is_in(name, trained)

    for name, parameter in module.named_parameters():
        if is_frozen(name):
            parameter.requires_grad = False
    return [submodule for name, submodule in module.named_modules() if is_frozen(name)]


def _is_in(name: str, paths: Iterable[str]) -> bool:
    return any(name == path or name.startswith(f"{path}.") for path in paths)
