"""Checkpoint files: written whole or not at all, read without ever running code, resumed to the bit."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.files import atomic_write


def save_checkpoint(path: Path | str, **entries: Any) -> None:
    """Write tensors, numbers, strings, and lists and dicts of them.

    The random states of this moment are added.
    """
    with atomic_write(path, "wb") as file:
        torch.save({**entries, "random_states": random_states()}, file)


def load_checkpoint(
    path: Path | str, made_by: str, needs: tuple[str, ...] = ("model_state_dict", "config")
) -> dict[str, Any]:
    """Return the entries, tensors on the CPU; `made_by` is the command that writes such a file.

    Raises FileNotFoundError naming that command, ValueError for a file that is not a whole checkpoint of
    ours.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}; make it with: {made_by}")
    try:
        entries = torch.load(path, map_location="cpu", weights_only=True)
    except PermissionError:
        raise
    except Exception as error:  # a damaged file can make its reader raise nearly anything
        rule = "must be a whole file of this course; it is cut short, damaged or foreign"
        raise ValueError(f"checkpoint ({path}) {rule}") from error
    missing = [name for name in needs if not isinstance(entries, dict) or name not in entries]
    if missing:
        raise ValueError(f"checkpoint ({path}) must hold {', '.join(needs)}; it lacks {', '.join(missing)}")
    return entries


def load_weights(model: torch.nn.Module, state: dict[str, Any], path: Path | str) -> None:
    """Load weights into a model.

    ValueError, naming the first tensor that does not fit, where shapes or names differ.
    """
    own = model.state_dict()
    for name in own.keys() | state.keys():
        mine = tuple(own[name].shape) if name in own else "none"
        theirs = tuple(state[name].shape) if isinstance(state.get(name), torch.Tensor) else "none"
        if mine != theirs:
            raise ValueError(
                f"checkpoint ({path}) must fit the model: {name} is {theirs} there and {mine} here"
            )
    model.load_state_dict(state)


def random_states() -> dict[str, Any]:
    """Return the states of all random generators, as plain values that load without running code."""
    name, keys, *rest = np.random.get_state(legacy=True)
    version, numbers, gauss = random.getstate()
    return {
        "python": [version, list(numbers), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys, dtype=np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Put the random generators back to where `random_states` found them."""
    version, numbers, gauss = states["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = states["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
