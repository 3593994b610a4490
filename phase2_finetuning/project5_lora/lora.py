r"""LoRA: train a product of two thin matrices beside each large one, and leave the large one alone.

PAPERS
  [1] LoRA: Low-Rank Adaptation of Large Language Models, Hu et al., 2021, arXiv:2106.09685
  [2] A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA, Kalajdzievski, 2023, arXiv:2312.03732
  [3] DoRA: Weight-Decomposed Low-Rank Adaptation, Liu et al., 2024, arXiv:2402.09353
  [4] PiSSA: Principal Singular Values and Singular Vectors Adaptation of Large Language Models, Meng, Wang &
      Zhang, 2024, arXiv:2404.02948

SYMBOLS (code = paper)
  weight = W0  the frozen matrix [1]     rank = r, alpha  size of the update and its scale [1]
  A, B         the thin matrices [1]     magnitude = m    length of each row [3] (columns there)
  A0, B0       A and B as PiSSA began them, B0 spread and scaled [4]

SHAPES
  weight (out, in)    R  ranks of all slots of a layer together    A (R, in)    B of a slot (rows, rank)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from phase1_foundation.project3_pretrain.cpu_kernels import Linear
from phase2_finetuning.project5_lora.modules import matrix_of
from phase2_finetuning.project5_lora.targets import ALL, Slot


@dataclass(frozen=True)
class Recipe:
    """What an adapter is like: everything but its weights.

    PAPER: rank and alpha, [1] Sec. 4.1; the switches are those of the papers above, one each.
    PAPER CONTEXT: Each variant came with a code base of its own; they differ in a line or two.
    INTUITION: The recipe on the box; what is in the box is another matter.
    IMPLEMENTATION: What PEFT keeps in adapter_config.json. Which switches go together is checked here.
    WHY: An adapter that is loaded with another alpha is silently too loud or too quiet.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0  # share of the input's features that the adapter does not see while training
    targets: tuple[str, ...] = (ALL,)
    rslora: bool = False  # scale by alpha / sqrt(rank)
    dora: bool = False  # learn the length of each row apart from its direction
    pissa: bool = False  # start at the matrix's own largest directions

    def __post_init__(self) -> None:
        """Raise ValueError for what no adapter can be."""
        if self.rank < 1:
            raise ValueError(f"rank ({self.rank}) must be at least 1")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha ({self.alpha}) must be above 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout ({self.dropout}) must be at least 0 and below 1")
        if not self.targets:
            raise ValueError(f"targets () must name at least one matrix, or {ALL}")
        if self.dora and self.pissa:
            raise ValueError("pissa (True) must be off with dora: each sets the start in its own way")

    def scale(self, slot: Slot) -> float:
        """Return what the product of A and B counts: alpha / rank, or alpha / sqrt(rank) [2]."""
        return slot.alpha / (math.sqrt(slot.rank) if self.rslora else slot.rank)


class LowRank(nn.Module):
    r"""One adapter of one linear layer: what is added to W0 x.

    PAPER: [1] Eq. 3 (Sec. 4.1); its scale, [2] Theorem 3.2; magnitude and direction, [3] Eq. 5; the start
        at the principal directions, [4] Sec. 3.
    PAPER CONTEXT: A copy of the model per task costs as much as the model. Adapters in between the layers,
        the way before, are small but make every token pass through more layers. [1] adds beside, not between.
    INTUITION: A large machine is retuned with a few knobs: A reads r things off the input, B says what to
        do about each.
    IMPLEMENTATION: B starts at 0, so the first step sees the model as it was. A starts uniform, as in peft
        ([1]: Gaussian). A layer that is several matrices in one has one A below the other, and its Bs along a
        diagonal: two products for all. DoRA's length is a constant to the gradient ([3] Sec. 4.3). [4] takes
        PiSSA's start out of W0; here it is subtracted beside it, so that W0 stays everybody's.
    WHY: Outputs, gradients and merged weights equal peft's in float64 (tests).
    """

    A0: Tensor | None
    B0: Tensor | None

    def __init__(self, base: nn.Module, slots: Sequence[Slot], recipe: Recipe) -> None:
        super().__init__()
        self.recipe, self.slots = recipe, tuple(slots)
        self.touched = [slot for slot in slots if slot.rank]
        weight = matrix_of(base).detach()
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        reach = 1 / math.sqrt(weight.shape[1])
        self.A = nn.Parameter(weight.new_empty(sum(self.ranks), weight.shape[1]).uniform_(-reach, reach))
        self.B = nn.ParameterList(weight.new_zeros(slot.rows, slot.rank) for slot in self.touched)
        self.magnitude = nn.ParameterList()
        self.dropout = nn.Dropout(recipe.dropout) if recipe.dropout else nn.Identity()
        self.register_buffer("A0", None)
        self.register_buffer("B0", None)
        if recipe.pissa:
            self._start_at_principal(weight)
        if recipe.dora:
            self.magnitude.extend(nn.Parameter(part.norm(dim=1)) for part in self._rows(weight))

    @torch.no_grad()
    def _start_at_principal(self, weight: Tensor) -> None:
        """Let B A be, times its scale, the largest `rank` singular directions of each slot's rows."""
        for slot, rows, A, B in zip(
            self.touched, self._rows(weight), self.A.split(self.ranks), self.B, strict=True
        ):
            if slot.rank > min(rows.shape):
                raise ValueError(f"rank ({slot.rank}) must be at most {min(rows.shape)} for {slot.name}")
            U, S, Vt = torch.linalg.svd(rows, full_matrices=False)
            root = (S[: slot.rank] / self.recipe.scale(slot)).sqrt()
            A.copy_(root[:, None] * Vt[: slot.rank])
            B.copy_(U[:, : slot.rank] * root)
        self.A0, self.B0 = self.A.detach().clone(), self.spread().clone()

    def _rows(self, whole: Tensor) -> list[Tensor]:
        """Return the rows (of W0, or of something of that height) of the slots that have a rank."""
        parts = whole.split([slot.rows for slot in self.slots])
        return [part for part, slot in zip(parts, self.slots, strict=True) if slot.rank]

    @property
    def ranks(self) -> list[int]:
        """Ranks of the slots that have one: how the rows of A are shared out."""
        return [slot.rank for slot in self.touched]

    def spread(self) -> Tensor:
        """Return the Bs, each times its scale, along the diagonal of one matrix (out, R)."""
        parts = iter(self.B)
        blocks = [
            next(parts) * self.recipe.scale(slot) if slot.rank else self.A.new_zeros(slot.rows, 0)
            for slot in self.slots
        ]
        return torch.block_diag(*blocks)

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return the two matrices whose product is the update: (R, in), (out, R); PiSSA's have twice R."""
        A, B = self.A, self.spread()
        if self.A0 is None or self.B0 is None:
            return A, B
        return torch.cat([A, self.A0]), torch.cat([B, -self.B0], dim=1)

    def pairs(self) -> list[tuple[Slot, Tensor, Tensor]]:
        """Return (slot, A, B) of plain adapters that do the same; PiSSA's have twice the rank [4]."""
        ranks = self.ranks
        plain = list(zip(self.touched, self.A.split(ranks), self.B, strict=True))
        if self.A0 is None or self.B0 is None:
            return plain
        doubled = []
        starts = zip(plain, self.A0.split(ranks), self._rows(self.B0), strict=True)
        for i, ((slot, A, B), A0, rows) in enumerate(starts):
            B0 = rows.split(ranks, dim=1)[i] / self.recipe.scale(slot)
            growth = (
                math.sqrt(2) if self.recipe.rslora else 2
            )  # of alpha, to keep the scale at twice the rank
            twice = replace(slot, rank=2 * slot.rank, alpha=growth * slot.alpha)
            doubled.append((twice, torch.cat([A, A0]), torch.cat([B, -B0], dim=1)))
        return doubled

    def gain(self, weight: Tensor) -> Tensor:
        """Return, for each row of W0 + B A, the length that DoRA has learned over the one that it has."""
        with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
            A, B = self.factors()
            lengths = self._rows(torch.linalg.vector_norm(weight.to(A.dtype) + B @ A, dim=1))
        parts = iter(zip(self.magnitude, lengths, strict=True))
        ones = self.A.new_ones
        gains = [torch.div(*next(parts)) if slot.rank else ones(slot.rows) for slot in self.slots]
        return torch.cat(gains)

    def forward(self, x: Tensor, y: Tensor, base: Any) -> Tensor:
        """Map the layer's input (..., in) and its output y (..., out) to what is to be added to y."""
        A, B = self.factors()
        x = self.dropout(x)
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(A.dtype)
        update = F.linear(F.linear(x, A), B)
        if self.recipe.dora:
            gain = self.gain(matrix_of(base))
            plain = y if base.bias is None else y - base.bias
            update = (gain - 1) * plain + gain * update
        return update.to(y.dtype)

    @torch.no_grad()
    def delta(self, weight: Tensor) -> Tensor:
        """Return what the adapter changes in W0, (out, in)."""
        A, B = self.factors()
        if not self.recipe.dora:
            return B @ A
        weight = weight.to(A.dtype)
        return self.gain(weight)[:, None] * (weight + B @ A) - weight


class LoRALinear(nn.Module):
    """A linear layer and its adapters, any of which can be in use, merged into the weight, or taken out.

    PAPER: [1] Sec. 4.1, "No Additional Inference Latency": W0 + B A is a matrix of the same shape.
    PAPER CONTEXT: [1] switches tasks by subtracting one product and adding another. In floating point
        W + D - D is not W, so a server that switches a thousand times ends with another model.
    INTUITION: Coloured glasses over one pair of eyes: change them, wear two, wear none.
    IMPLEMENTATION: Each adapter in use adds its change of W0 x, so their order does not matter. Merging
        keeps the old weight aside, unmerging puts it back. For a batch of several users each row can have
        an adapter of its own, or none.
    WHY: Merged equals unmerged to rounding, and unmerging restores every bit; tests.
    """

    base: Any
    adapters: nn.ModuleDict
    kept: Tensor | None  # the weight, while another one is merged

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.adapters = nn.ModuleDict()
        self.active: tuple[str, ...] = ()
        self.of_rows: tuple[str, ...] | None = None  # the adapter of each row of a batch; "": none
        self.register_buffer("kept", None, persistent=False)

    @property
    def in_features(self) -> int:
        """Width of the input."""
        return self.base.in_features

    @property
    def out_features(self) -> int:
        """Width of the output."""
        return self.base.out_features

    @property
    def in_use(self) -> list[LowRank]:
        """The adapters in use; those of the model that this layer has."""
        return [self.adapters[name] for name in self.active if name in self.adapters]  # type: ignore[misc]

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        y: Tensor = self.base(x)
        if self.kept is not None:
            if self.training and torch.is_grad_enabled():
                raise ValueError("adapters (merged) must be unmerged to be trained: no gradient reaches them")
            return y
        if self.of_rows is not None:
            return self._by_rows(x, y)
        return sum((part(x, y, self.base) for part in self.in_use), y)

    def _by_rows(self, x: Tensor, y: Tensor) -> Tensor:
        """Add to each row of a batch what its adapter says."""
        rows = self.of_rows or ()
        if len(rows) != len(x):
            raise ValueError(
                f"batch ({len(x)} rows) must have as many as have been given adapters: {len(rows)}"
            )
        for name in set(rows) & set(self.adapters):
            mine = torch.tensor([i for i, each in enumerate(rows) if each == name], device=x.device)
            y = y.index_add(0, mine, self.adapters[name](x[mine], y[mine], self.base))
        return y

    @torch.no_grad()
    def merged(self) -> Tensor:
        """Return W0 with the changes of the adapters in use, in the type of W0."""
        weight = self.kept if self.kept is not None else matrix_of(self.base)
        return sum((part.delta(weight) for part in self.in_use), weight).to(weight.dtype)

    def merge(self) -> None:
        """Put the changes into the weight. Raises ValueError for a base that is packed, such as in 4 bits."""
        if not isinstance(self.base, nn.Linear):
            rule = "must be a plain linear layer to merge into; unload(merge=True) makes it one"
            raise ValueError(f"base ({type(self.base).__name__}) {rule}")
        if self.kept is None:
            merged = self.merged()
            self.kept, self.base.weight.data = self.base.weight.data, merged

    def unmerge(self) -> None:
        """Put back the weight as it was."""
        if self.kept is not None:
            self.base.weight.data, self.kept = self.kept, None

    def plain(self, merge: bool) -> nn.Module:
        """Return the layer without adapters: with their changes in its weight, or as it was."""
        self.unmerge()
        if not merge or not self.in_use:
            return self.base
        linear, merged = self.base, self.merged()
        if not isinstance(linear, nn.Linear):
            with torch.device("meta"):
                linear = Linear(self.in_features, self.out_features, bias=self.base.bias is not None)
            linear.bias = self.base.bias
        linear.weight = nn.Parameter(merged)
        return linear
