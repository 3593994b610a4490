r"""AdamW and Muon, the two optimizers of this course, and the schedule of their learning rates.

PAPERS
  [1] Adam: A Method for Stochastic Optimization, Kingma & Ba, 2014, arXiv:1412.6980
  [2] Decoupled Weight Decay Regularization, Loshchilov & Hutter, 2017, arXiv:1711.05101 (AdamW)
  [3] Muon: An optimizer for hidden layers in neural networks, Jordan et al., 2024,
      kellerjordan.github.io/posts/muon
  [4] Old Optimizer, New Norm: An Anthology, Bernstein & Newhouse, 2024, arXiv:2409.20325
  [5] On the difficulty of training Recurrent Neural Networks, Pascanu, Mikolov & Bengio, 2013,
      arXiv:1211.5063
  [6] SGDR: Stochastic Gradient Descent with Warm Restarts, Loshchilov & Hutter, 2016, arXiv:1608.03983
  [7] Attention Is All You Need, Vaswani et al., 2017, arXiv:1706.03762

SYMBOLS (code = paper)
  lr = alpha          step size [1]; beta1, beta2 [1]; eps = epsilon [1]; weight_decay = lambda [2]
  mean = m, square = v  running averages of the gradient and of its square [1]
  momentum = mu       memory of Muon's running gradient [3]; a, b, c  coefficients of Newton-Schulz [3]

SHAPES
  Muon takes weights (R, C): R rows out, C columns in. Weights of one shape are stacked to (N, R, C).
"""

import math
from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from phase1_foundation.project1_minimal_gpt.config import OptimizerConfig


class AdamW(Optimizer):
    """Step along the running gradient, each weight with a step size of its own.

    PAPER: [1] Algorithm 1; the decay of the weights outside of it, [2] Algorithm 2.
    PAPER CONTEXT: One learning rate suits no network: rare tokens' embeddings see small gradients, biases
        large ones. [1] divides by each weight's own recent size of gradient. [2] shows that decay added to
        the gradient is divided away with it, and puts it on the weight directly.
    INTUITION: Every weight moves by about lr a step, whatever the scale of its gradient; a steady sign
        moves it fully, a wavering one cancels.
    IMPLEMENTATION: The corrections 1 - beta^t undo the start of both averages at zero. `_foreach` runs all
        weights in one call; `fused` is torch's kernel of the same formula, which reads each number once
        instead of once a line. Decay as in torch: weight *= 1 - lr * weight_decay.
    WHY: Without the correction the first steps are off by (1 - beta1) / sqrt(1 - beta2): 0.45 with ours; a
        test checks each step against torch.optim.AdamW.
    """

    def __init__(
        self,
        params: Iterable[dict],
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        fused: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0})
        self.fused = fused

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closures here
        """Update all weights that have a gradient."""
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            for weight in weights:
                if not self.state[weight]:
                    zeros = torch.zeros_like
                    self.state[weight] = {"step": 0, "mean": zeros(weight), "square": zeros(weight)}
                self.state[weight]["step"] += 1
            grads: list[Tensor] = [weight.grad for weight in weights]
            means = [self.state[weight]["mean"] for weight in weights]
            squares = [self.state[weight]["square"] for weight in weights]
            t = self.state[weights[0]]["step"]
            (beta1, beta2), lr = group["betas"], group["lr"]
            if self.fused:
                steps = [torch.tensor(float(t), device=weights[0].device)] * len(weights)  # only read
                torch._fused_adamw_(
                    weights, grads, means, squares, [], steps,
                    lr=lr, beta1=beta1, beta2=beta2, eps=group["eps"], weight_decay=group["weight_decay"],
                    amsgrad=False, maximize=False,
                )  # fmt: skip
                continue
            torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
            torch._foreach_lerp_(means, grads, 1 - beta1)  # m = beta1 m + (1 - beta1) g
            torch._foreach_mul_(squares, beta2)
            torch._foreach_addcmul_(squares, grads, grads, 1 - beta2)  # v = beta2 v + (1 - beta2) g^2
            roots = torch._foreach_sqrt(squares)
            torch._foreach_div_(roots, math.sqrt(1 - beta2**t))
            torch._foreach_add_(roots, group["eps"])
            torch._foreach_addcdiv_(weights, means, roots, -lr / (1 - beta1**t))


class Muon(Optimizer):
    """Step along the running gradient of a matrix, with all its directions brought to equal length.

    PAPER: [3]; [4] Sec. 2 derives the step as steepest descent under the spectral norm.
    PAPER CONTEXT: A matrix's gradient is nearly low-rank: a few directions are large and Adam, which sees
        single numbers, follows them. [3] replaces the gradient U S V^T by U V^T, so that rare directions
        learn too, and set speed records for training GPT-2 with it.
    INTUITION: Adam equalizes the weights, Muon equalizes the directions in which a layer can turn.
    IMPLEMENTATION: Nesterov momentum, then Newton-Schulz instead of an SVD. q, k and v are three matrices in
        one tensor (`split`: the rows of each), so each is orthogonalized alone. A matrix with more rows than
        columns steps sqrt(R / C) further ([3]). Embeddings, head, biases and norms stay with AdamW. Where
        processes hold a part of a matrix each (project 3), each gathers the whole and keeps its part.
    WHY: The README's table: the same loss as AdamW's in fewer seconds, although a step costs more.
    """

    def __init__(self, params: Iterable[dict], lr: float, momentum: float = 0.95, ns_steps: int = 5) -> None:
        super().__init__(
            params, {"lr": lr, "momentum": momentum, "ns_steps": ns_steps, "weight_decay": 0.0, "split": None}
        )

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]  # no closures here
        """Update all matrices that have a gradient."""
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            steps = []
            stacks: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for weight in weights:
                if not self.state[weight]:
                    self.state[weight] = {"velocity": torch.zeros_like(weight)}
                velocity = self.state[weight]["velocity"].lerp_(weight.grad, 1 - group["momentum"])
                ahead = weight.grad.lerp(velocity, group["momentum"])  # Nesterov: one more such gradient
                steps.append(gather(ahead))
                for part in steps[-1].split(group["split"] or len(weight)):
                    stacks[part.shape].append(part)
            for (rows, columns), parts in stacks.items():  # one batched product for all matrices of a shape
                torch._foreach_copy_(parts, orthogonalize(torch.stack(parts), group["ns_steps"]).unbind())
                if rows > columns:
                    torch._foreach_mul_(parts, math.sqrt(rows / columns))
            if weights:
                shares = [scatter(step, weight) for step, weight in zip(steps, weights, strict=True)]
                torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
                torch._foreach_add_(weights, shares, alpha=-group["lr"])


def gather(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor of which each process holds a part (a DTensor); others as they are."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def scatter(whole: Tensor, like: Tensor) -> Tensor:
    """Return this process's part of `whole`, cut as `like` is; all of it where `like` is whole."""
    if not hasattr(like, "full_tensor"):
        return whole
    from torch.distributed.tensor import distribute_tensor  # here: it takes seconds to import

    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)  # type: ignore[attr-defined]


def orthogonalize(matrices: Tensor, steps: int = 5, dtype: torch.dtype | None = torch.bfloat16) -> Tensor:
    """Replace U S V^T by about U V^T for each matrix of (N, R, C): all singular values go near 1.

    PAPER: [3], with its coefficients; Newton-Schulz iteration for the polar factor.
    PAPER CONTEXT: An SVD per matrix and step is far too slow, and this needs products only. [3] tuned a, b,
        c to lift small singular values fast rather than to converge.
    INTUITION: An odd polynomial of a matrix acts on its singular values alone; this one, iterated, sends
        everything between 0 and 1 to near 1.
    IMPLEMENTATION: Divided by the Frobenius norm first, so that no singular value exceeds 1. The smaller
        side leads, so the Gram matrix is as small as can be. bf16 is enough, says [3]; dtype=None keeps the
        input's.
    WHY: Five steps bring every singular value from 0.002 to 1 into 0.68 to 1.21 (a test); exactness would
        not lower the loss ([3]).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrices.to(dtype) if dtype else matrices
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        bend = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)  # b g + c g^2
        x = torch.baddbmm(x, bend, x, beta=a)  # a x + (b g + c g^2) x, rounded once
    return x.mT if tall else x


def make_optimizers(model: nn.Module, config: OptimizerConfig, fused: bool = False) -> list[Optimizer]:
    """Return the optimizers of a model: Muon (if asked) for the blocks' matrices, AdamW for all the rest.

    PAPER: [2] for the decay; that gains, biases and norms are left out of it is GPT practice ([2] does not
        discuss it).
    PAPER CONTEXT: [3] keeps embeddings and head with AdamW: their rows are tokens, not directions.
    INTUITION: Matrices are pulled towards zero, offsets are not: a bias does no harm by being large.
    IMPLEMENTATION: Two groups of AdamW, with and without decay, by the number of dimensions; each group
        remembers its peak rate, which the schedule scales. A module says in `fused` which of its weights
        are several matrices one below the other, and how many rows each has.
    WHY: A test checks that every parameter is in exactly one group.
    """
    hidden = {
        name: weight
        for name, weight in model.named_parameters()
        if name.startswith("blocks.") and weight.dim() == 2
    }
    if config.optimizer == "adamw":
        hidden = {}
    rest = [weight for name, weight in model.named_parameters() if name not in hidden]
    decayed = {
        "params": [weight for weight in rest if weight.dim() >= 2],
        "weight_decay": config.weight_decay,
    }
    plain = {"params": [weight for weight in rest if weight.dim() < 2], "weight_decay": 0.0}
    betas = (0.9, config.beta2)
    optimizers: list[Optimizer] = [AdamW([decayed, plain], lr=config.lr, betas=betas, fused=fused)]
    if hidden:
        splits = {
            f"{name}.{weight}": rows
            for name, module in model.named_modules()
            for weight, rows in getattr(module, "fused", {}).items()
        }
        groups: dict[tuple[int, ...] | None, list[Tensor]] = defaultdict(list)
        for name, weight in hidden.items():
            groups[splits.get(name)].append(weight)
        decay = config.weight_decay
        muon = [{"params": group, "split": split, "weight_decay": decay} for split, group in groups.items()]
        optimizers.append(Muon(muon, lr=config.muon_lr))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def lr_factor(step: int, config: OptimizerConfig) -> float:
    """Return the share of the peak learning rate at a step: a straight rise, then half a cosine down.

    PAPER: [6] Eq. 5, without restarts; the linear warm-up, [7] Sec. 5.3.
    PAPER CONTEXT: [6] lets the rate fall smoothly so that late steps settle instead of jumping about.
    INTUITION: Look around first, stride, then tiptoe.
    IMPLEMENTATION: Step 0 already moves: (step + 1) / warmup_steps. The last step is max_steps - 1.
    WHY: AdamW's first averages are of few gradients; full steps along them can wreck the initialization.
    """
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return config.min_lr_fraction + (1 - config.min_lr_fraction) * 0.5 * (
        1 + math.cos(math.pi * min(1.0, done))
    )


def clip_gradients(weights: Iterable[nn.Parameter], longest: float, scale: float | Tensor = 1.0) -> Tensor:
    """Multiply all gradients by `scale`, shorten them together to `longest`; return the length before that.

    PAPER: [5] Algorithm 1 (Sec. 3.2).
    PAPER CONTEXT: Loss surfaces have walls; one step off a wall's gradient throws the weights far away.
    INTUITION: Keep the direction, limit the stride.
    IMPLEMENTATION: One norm over all tensors; no branch on its value, so a GPU is never waited for. `scale`
        turns the gradient of a sum of losses into that of their mean, in the same pass.
    WHY: Clipping each tensor alone would turn the direction; a test checks direction and length.
    """
    grads = [weight.grad for weight in weights if weight.grad is not None]
    length = scale * gather(torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads))))
    torch._foreach_mul_(grads, scale * (longest / (length + 1e-6)).clamp(max=1.0))
    return length
