"""Where models run and in which precision: what a machine has, and what `auto` means. Torch is imported when used."""

import logging
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from embedcache.errors import SettingError
from embedcache.settings import setting

if TYPE_CHECKING:
    import torch

    from embedcache.arrays import Floats, Products

AUTO = "auto"
DEVICE_HELP = "Torch device, such as cpu, cuda or cuda:1; auto is the first of cuda, mps and cpu that this machine has."
Precision: TypeAlias = Literal["float32", "float16", "bfloat16"]
"""Precision of matrix products."""

_log = logging.getLogger(__name__)


def device_setting() -> Any:
    """Return the field `device` of a settings class, which changes no result."""
    return setting(AUTO, DEVICE_HELP, metavar="DEVICE", affects_result=False)


def engine_setting(**options: Any) -> Any:
    """Return the field `engine` of a settings class, which changes no result; options as of `setting`."""
    return setting(
        "local", "Run on this machine, or on the machines of a Ray cluster.", affects_result=False, **options
    )


def address_setting(**options: Any) -> Any:
    """Return the field `address` of a settings class with an engine; options as of `setting`."""
    return setting(
        None,
        "Address of a Ray cluster.",
        affects_result=False,
        default_text="start one on this machine",
        metavar="URL",
        **options,
    )


def torch_device(name: str = AUTO, *, needs_float64: bool = False) -> "torch.device":
    """Return a torch device that exists on this machine.

    Args:
        name: `auto`, the first of `cuda`, `mps` and `cpu` that exists, or torch's name of a device.
        needs_float64: whether `auto` leaves out `mps`, which computes in float32 at most.

    Raises:
        SettingError: the device does not exist.
    """
    import torch

    if not isinstance(name, str | int | torch.device):
        raise SettingError(f"device: expected the name of a device, such as {AUTO} or cpu, got {name!r}")
    if name == AUTO:
        name = next(found for found in _available() if not (needs_float64 and found == "mps"))
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        numbered = (f"cuda:{number}" for number in range(torch.cuda.device_count()))
        first_line = str(error).partition("\n")[0]
        reason = "torch knows no such device" if first_line.startswith("Expected one of") else first_line
        raise SettingError(
            f"device {name!r} is not available ({reason}); expected one of: "
            f"{', '.join([AUTO, *reversed(_available()), *numbered])}"
        ) from error
    return device


def all_devices() -> tuple[str, ...]:
    """Return the GPUs of this machine, or the CPU if there are none."""
    import torch

    numbered = tuple(f"cuda:{number}" for number in range(torch.cuda.device_count()))
    return numbered or (_available()[0],)


def autocast(device_type: str, precision: str) -> "torch.autocast":
    """Return a context in which matrix products have a precision; float32 and `auto` change nothing."""
    import torch

    is_lower = precision in ("float16", "bfloat16")
    return torch.autocast(device_type, dtype=getattr(torch, precision) if is_lower else None, enabled=is_lower)


def products_on(device: str) -> "Products":
    """Return a function that computes the dot products of rows with rows on a device, in float32."""
    import numpy as np

    from embedcache.arrays import dot_products

    where = "cpu" if device == "cpu" else torch_device(device)  # torch takes seconds to import
    announce_device(where)
    if str(where) == "cpu":
        return dot_products
    import torch

    def on_device(left_QP: "Floats", right_CP: "Floats") -> "Floats":
        left, right = (torch.from_numpy(np.ascontiguousarray(rows)).to(where) for rows in (left_QP, right_CP))
        products_QC: Floats = (left @ right.T).cpu().numpy()
        return products_QC

    return on_device


def _available() -> list[str]:
    """Return the kinds of devices that this machine has, the fastest first."""
    import torch

    has = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return [name for name, is_available in has.items() if is_available]


def announce_device(device: "torch.device | str") -> None:
    """Log once that this process computes on a device."""
    name = ""
    if str(device).startswith("cuda"):
        import torch

        name = f" ({torch.cuda.get_device_name(device)})"
    announce(f"device: {device}{name}")


@cache
def announce(line: str) -> None:
    """Log once in a process what it uses; the command line prints it, once per command."""
    _log.info("%s", line)
