r"""The module swap: other layers in the place of a model's linear ones, unknown to the model's code.

PAPERS
  [1] Parameter-Efficient Transfer Learning for NLP, Houlsby et al., 2019, arXiv:1902.00751 (adapters)
  [2] LoRA: Low-Rank Adaptation of Large Language Models, Hu et al., 2021, arXiv:2106.09685
  [3] QLoRA: Efficient Finetuning of Quantized LLMs, Dettmers et al., 2023, arXiv:2305.14314
"""

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

Make = Callable[[str, Any], nn.Module]  # name and linear layer -> what stands in its place
Where = Callable[[str], bool] | str  # by the module's name: a question, or a regular expression for all of it


def swap_linears(
    model: nn.Module,
    make: Make,
    where: Where,
    kind: type[nn.Module] | tuple[type[nn.Module], ...] = nn.Linear,
) -> list[str]:
    """Put make(name, linear) in the place of each linear layer whose name fits; return the names.

    PAPER: none; this is a seam of the course. What goes through it: [2] beside a matrix, [3] instead of it.
    PAPER CONTEXT: [1] writes new layers into the model's own code. Since then nearly everything that is done
        to a trained model (low rank, 4 bits, pruning, sharding) is done to its linear layers, and a
        codebase that forks the model for each of them has as many models as ideas.
    INTUITION: A linear layer is a plug: whoever maps (..., in) to (..., out) fits the socket.
    IMPLEMENTATION: `where` is asked with names such as blocks.3.attention.qkv; a regular expression must
        match all of a name. Layers are found before the first is replaced, so that `make` may keep the old
        one inside the new one. `kind` finds other layers, such as quantized ones.
    WHY: A pattern that fits nothing would train nothing, silently; it is a ValueError that lists the names.
    """
    fits = where if callable(where) else lambda name: re.fullmatch(where, name) is not None
    layers = {name: module for name, module in model.named_modules() if isinstance(module, kind)}
    chosen = [name for name in layers if fits(name)]
    if not chosen:
        there = ", ".join(dict.fromkeys(re.sub(r"\b\d+\b", "N", name) for name in layers)) or "none"
        raise ValueError(f"where ({where}) must fit the name of a layer of the model: {there}")
    for name in chosen:
        put(model, name, make(name, layers[name]))
    return chosen


def put(model: nn.Module, name: str, module: nn.Module) -> None:
    """Make `module` the part of the model that is called `name`, in the mode of the one that it replaces."""
    parent, _, leaf = name.rpartition(".")
    owner = model.get_submodule(parent)
    module.train(getattr(owner, leaf).training)
    setattr(owner, leaf, module)


def matrix_of(linear: nn.Module) -> Tensor:
    """Return the (out, in) numbers that a layer multiplies with; one that packs them has `dequantize()`."""
    unpack: Callable[[], Tensor] | None = getattr(linear, "dequantize", None)
    return unpack() if unpack else linear.weight  # type: ignore[return-value]
