r"""Several processes that train one model: torchrun starts them, each takes its share of every batch.

PAPERS
  [1] PyTorch Distributed: Experiences on Accelerating Data Parallel Training, Li et al., 2020,
      arXiv:2006.15704 (DDP)
  [2] ZeRO: Memory Optimizations Toward Training Trillion Parameter Models, Rajbhandari et al., 2019,
      arXiv:1910.02054
  [3] PyTorch FSDP: Experiences on Scaling Fully Sharded Data Parallel, Zhao et al., 2023, arXiv:2304.11277

SYMBOLS
  rank  number of a process, from 0     size  how many there are
"""

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import GradBucket  # type: ignore[attr-defined]
from torch.optim import Optimizer

from common.checkpoints import load_weights
from common.device import pick_device
from phase1_foundation.project1_minimal_gpt.optimizer import gather, scatter


@dataclass(frozen=True)
class World:
    """The processes of this run, and which of them this is.

    PAPER: [1] Sec. 2.2 and 2.3: every process runs the same program on its own data; they meet in all-reduce.
    PAPER CONTEXT: Parameter servers, the way before, made one machine the centre and the bottleneck of all.
    INTUITION: A choir without a conductor: all have the same score and listen to each other.
    IMPLEMENTATION: torchrun says rank and size in the environment. NCCL carries tensors of GPUs and gloo
        those of CPUs; without torchrun all of this does nothing.
    WHY: The trainer asks this one object and never torch.distributed, so one process is no special case.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # the number on this machine: that of its GPU

    def print(self, *words: object, end: str = "\n") -> None:
        """Print on the first process only."""
        if self.rank == 0:
            print(*words, end=end, flush=True)

    def device(self, name: str) -> torch.device:
        """Return this process's device; of several GPUs the one with its number."""
        device = pick_device(name)
        if device.type == "cuda" and self.size > 1:
            device = torch.device("cuda", self.local_rank)
            torch.cuda.set_device(device)
        return device

    def sum(self, tensor: Tensor) -> Tensor:
        """Add a tensor up over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        """Say whether the flag is up in any process; over the CPUs, so no GPU is waited for."""
        return bool(self.sum(torch.tensor(int(flag)))) if self.size > 1 else flag

    def wait(self) -> None:
        """Wait until all processes have come here, half an hour at most."""
        self.any(False)


@contextmanager
def join_world(device: str = "auto") -> Iterator[World]:
    """Join the processes that torchrun started; without torchrun there is just this one."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        yield World()
        return
    world = World(*(int(os.environ.get(name, 0)) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    on_gpu = world.device(device).type == "cuda"
    dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo")
    yield world
    dist.destroy_process_group()  # not after an error: the others may be waiting in the middle of something


class _Within(nn.Module):
    """Run work(model, ...) as one forward pass, so that what wraps it sees its start and its end."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, work: Callable[..., Any], *inputs: Any) -> Any:
        """Return work(model, *inputs)."""
        return work(self.model, *inputs)


class ParallelModel:
    """A model that several processes train together: the gradient of each is the sum over all of them.

    PAPER: kind "ddp", [1] Sec. 3.2: gradients are added up, bucket by bucket, while the backward pass still
        runs. Kind "fsdp", [2] Sec. 5.3 (stage 3), in the form of [3]: weights are cut up, too.
    PAPER CONTEXT: With DDP each process holds weights, gradients and two averages: 16 bytes per weight. [2]
        cuts all four into as many parts as there are processes, and gathers a block just before its use.
    INTUITION: Either everybody has the whole book, or everybody has some pages and lends them out.
    IMPLEMENTATION: Both wrappers would give the mean over processes. Token weighting needs the sum, so DDP
        gets a hook, and FSDP a divisor of 1. The loss is computed inside of the wrapper (`_Within`), since it
        may use more of a model than its forward. In 16 bits the blocks' weights are gathered rounded, what
        lies outside of the blocks is not, and gradients are added up in fp32.
    WHY: Two processes, with 3 and 1 tokens: the mean of their means weighs the one token three times. Tests
        compare gradients with one process's.
    """

    def __init__(
        self,
        model: nn.Module,
        world: World,
        kind: Literal["ddp", "fsdp"],
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        compile: bool = False,
    ) -> None:
        self.model, self.world, self.kind = model, world, kind if world.size > 1 else "alone"
        self.whole: Any = _Within(model)
        if self.kind == "fsdp":
            self._shard(device, dtype, compile)
            self.run: Callable[..., Any] = self.whole
            return
        self.wrapper: Any = self.whole.to(device)
        if self.kind == "ddp":
            gpu = [device] if device.type == "cuda" else None
            self.wrapper = nn.parallel.DistributedDataParallel(
                self.whole, device_ids=gpu, gradient_as_bucket_view=True
            )
            self.wrapper.broadcast_buffers = False  # constants, equal everywhere: not with every forward pass
            self.wrapper.register_comm_hook(None, add_up)
        self.run = torch.compile(self.wrapper, dynamic=False) if compile else self.wrapper

    def _shard(self, device: torch.device, dtype: torch.dtype, compile: bool) -> None:
        """Cut each block's weights over the processes, and then what is left."""
        from torch.distributed.device_mesh import init_device_mesh  # here: they take seconds
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(device.type, (self.world.size,))
        half = MixedPrecisionPolicy(cast_forward_inputs=False)  # the residual stream stays as it is
        if dtype != torch.float32:
            half = MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
        for block in getattr(self.model, "blocks", ()):
            fully_shard(block, mesh=mesh, mp_policy=half)
            if compile:
                block.compile(dynamic=False)
        self.wrapper = fully_shard(self.whole, mesh=mesh)
        for module in self.whole.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)

    def __call__(self, work: Callable[..., Any], *inputs: Any) -> Any:
        """Return work(model, *inputs), compiled where that was asked for."""
        return self.run(work, *inputs)

    def plainly(self, work: Callable[..., Any], *inputs: Any) -> Any:
        """Return work(model, *inputs), not compiled; every process must call it."""
        return self.whole(work, *inputs)

    def syncing(self, last: bool) -> AbstractContextManager[Any]:
        """Return the context of a micro-batch: the last one's backward pass adds up over processes."""
        if self.kind == "ddp" and not last:
            return self.wrapper.no_sync()
        if self.kind == "fsdp":
            self.wrapper.set_requires_gradient_sync(last)
        return nullcontext()

    def weights(self, names: Collection[str] | None = None) -> dict[str, Tensor]:
        """Return the whole state_dict, or these of it, on the first process's CPU; all must call it."""
        state = self.model.state_dict(keep_vars=True)
        return self._collect({name: state[name] for name in (state if names is None else names)})

    def load_weights(self, state: dict[str, Tensor], path: Any, names: Collection[str] | None = None) -> None:
        """Give this process its part of what weights() returned; ValueError, naming `path`, if wrong."""
        own = self.model.state_dict()
        parts = {name: scatter(value, own[name]) if name in own else value for name, value in state.items()}
        others = {} if names is None else {name: own[name] for name in own.keys() - set(names)}
        load_weights(self.model, others | parts, path)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return an optimizer's whole state on the CPU of the first process, as if that were the only one."""
        return self._collect(optimizer.state_dict())

    def load_optimizer_state(self, optimizer: Optimizer, state: dict[str, Any]) -> None:
        """Give this process its part of a whole state."""
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        parts = {
            number: {name: _part(value, weights[number]) for name, value in values.items()}
            for number, values in state["state"].items()
        }
        optimizer.load_state_dict({**state, "state": parts})

    def _collect(self, tree: Any, seen: dict[int, Tensor] | None = None) -> Any:
        """Replace the tensors of nested dicts and lists by whole ones; tied weights stay tied."""
        seen = {} if seen is None else seen
        if isinstance(tree, dict):
            return {name: self._collect(value, seen) for name, value in tree.items()}
        if isinstance(tree, list | tuple):
            return type(tree)(self._collect(value, seen) for value in tree)
        if not isinstance(tree, Tensor):
            return tree
        if id(tree) not in seen:
            whole = gather(tree.detach())
            seen[id(tree)] = whole.cpu() if self.world.rank == 0 else whole.new_empty(0)
        return seen[id(tree)]


def _part(value: Any, weight: Tensor) -> Any:
    """Return this process's part of a saved value that belongs to a weight."""
    return scatter(value, weight) if isinstance(value, Tensor) and value.shape == weight.shape else value


def add_up(_: None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Add the gradients of a bucket up over all processes; DDP itself would divide them by their number."""
    work = dist.all_reduce(bucket.buffer(), async_op=True)
    return work.get_future().then(lambda future: future.value()[0])
