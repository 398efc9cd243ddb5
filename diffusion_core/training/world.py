"""The processes that train one network together, and how they agree. One process alone is a world of size 1."""

from __future__ import annotations

import datetime
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from diffusion_core.config import UserError

TIMEOUT = datetime.timedelta(minutes=30)


@dataclass
class World:
    """This process's place among `size` processes.

    `control` is a gloo group for small messages between the hosts' memories: agreeing on something never waits for a
    GPU. It is None in a world of one.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    control: Any = None

    @classmethod
    def join(cls, device: torch.device | str) -> World:
        """The world of the process group that is already initialised (by Ray Train, say)."""
        rank, size = dist.get_rank(), dist.get_world_size()
        control = dist.new_group(backend="gloo", timeout=TIMEOUT) if size > 1 else None
        return cls(rank, size, torch.device(device), control)

    @classmethod
    def from_environment(cls) -> World:
        """The world that torchrun describes in the environment; without torchrun, this process alone.

        Raises:
            UserError: more processes on this machine than GPUs.
        """
        local, size = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if gpus and local >= gpus:
            raise UserError(f"--nproc-per-node: at most {gpus} processes can train here, as there are {gpus} GPUs.")
        device = torch.device("cuda", local) if gpus else torch.device("cpu")
        if gpus:
            torch.cuda.set_device(device)
        if size == 1:
            return cls(device=device)
        dist.init_process_group("nccl" if gpus else "gloo", timeout=TIMEOUT)
        return cls.join(device)

    @property
    def leads(self) -> bool:
        """True in the one process that writes."""
        return self.rank == 0

    def from_leader(self, numbers: Sequence[float]) -> list[float]:
        """The leader's numbers (float64) in every process; the others' are ignored but must be as many."""
        values = torch.tensor(numbers, dtype=torch.float64)
        if self.size > 1:
            dist.broadcast(values, 0, group=self.control)
        return [float(value) for value in values]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The element-wise sum of a CPU tensor over all processes."""
        if self.size > 1:
            dist.all_reduce(values, group=self.control)
        return values

    def share(self, tensors: Sequence[torch.Tensor]) -> None:
        """Overwrite tensors on the training device with the leader's, in place."""
        if self.size > 1:
            for tensor in tensors:
                dist.broadcast(tensor, 0)

    def leave(self) -> None:
        """Close the connections; those who still wait for this process then fail at once instead of waiting."""
        if dist.is_initialized():
            dist.destroy_process_group()


class Decision:
    """A number that the leader chooses at each step and all processes learn one step later, without waiting for it."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._value = torch.zeros(1, dtype=torch.int64)
        self._pending: Any = None

    def exchange(self, mine: int) -> int:
        """Send this step's number (the leader's counts) and return that of the step before; 0 at first.

        Alone, a process hears itself at once.
        """
        if self._world.size == 1:
            return mine
        learned = self.settle()
        self._value = torch.tensor([mine], dtype=torch.int64)
        self._pending = dist.broadcast(self._value, 0, group=self._world.control, async_op=True)
        return learned

    def settle(self) -> int:
        """Wait for what is under way and return it."""
        if self._pending is not None:
            self._pending.wait()
            self._pending = None
        return int(self._value)
