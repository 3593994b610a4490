"""Which device, which number format, which seed."""

import random
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str = "auto") -> torch.device:
    """Return the device by name.

    `auto` takes cuda, else mps, else cpu. Raises ValueError for one that is not there.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return torch.device(next(device for device, usable in there.items() if usable))
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")  # not among those that are there
    beyond = device.type == "cuda" and (device.index or 0) >= max(1, torch.cuda.device_count())
    if not there.get(device.type) or beyond:
        usable = ", ".join(["auto", *(device for device, usable in there.items() if usable)])
        raise ValueError(f"device ({name}) must be one of those on this machine: {usable}")
    return device


def pick_dtype(precision: str, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products.

    `auto` takes bf16 where the hardware multiplies it, fp16 on other GPUs.
    """
    if precision != "auto":
        return DTYPES[precision]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    return torch.bfloat16 if device.type == "cpu" and cpu_multiplies_bf16() else torch.float32


def cpu_multiplies_bf16() -> bool:
    """Say whether this processor has bf16 instructions.

    Without them bf16 is emulated and slower than fp32.
    """
    capabilities: Mapping[str, Any] = getattr(
        torch.cpu, "get_capabilities", dict
    )()  # newer torch: all architectures
    if capabilities:
        return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
    checks = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return any(check() for check in checks if check)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch on all devices."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; without it a timer measures only the asking."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def measure_matmul_rate(
    device: torch.device, dtype: torch.dtype, size: int = 1024, seconds: float = 0.2
) -> float:
    """Return the best rate, in operations per second, at which (size, size) matrices are multiplied."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best, end = 0.0, time.perf_counter() + seconds
    while time.perf_counter() < end or not best:
        start = time.perf_counter()
        a @ b
        synchronize(device)
        best = max(best, 2 * size**3 / (time.perf_counter() - start))
    return best
