"""The processes of one run under torchrun: each takes its share of every batch, and the first one writes."""

import datetime
import os
from typing import NamedTuple

import torch
import torch.distributed as dist


class Processes(NamedTuple):
    """One of `world` processes. Each method does nothing where there is only one."""

    rank: int = 0
    world: int = 1

    @property
    def first(self):
        return self.rank == 0

    def sum(self, tensor):
        """Adds up a tensor over all processes, in place. Returns it."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, tensor):
        """The tensors of all processes, concatenated along the first axis, on the CPU; they may differ in length."""
        parts = [tensor.cpu()]
        if self.world > 1:
            parts = [None] * self.world
            dist.all_gather_object(parts, tensor.cpu())
        return torch.cat(parts)

    def broadcast(self, value):
        """The first process's value, of any type that can be pickled."""
        values = [value]
        if self.world > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def wait(self):
        """Waits until all processes are here."""
        if self.world > 1:
            dist.barrier()


ALONE = Processes()


def from_environment():
    """As torchrun says, before anything is started."""
    return Processes(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


def connect(processes, device):
    """Connects the processes, once. Returns the device of this one: with CUDA, the GPU that torchrun gives it, where there are enough."""
    if processes.world == 1:
        return device
    backend = "gloo"
    if device.type == "cuda":
        here, local = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"])
        backend = "nccl" if int(os.environ["LOCAL_WORLD_SIZE"]) <= here else "gloo"  # NCCL refuses processes that share a GPU
        device = torch.device("cuda", local % here)
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        # days: the first process may wait for a run that other jobs are working on, and the rest wait for it
        dist.init_process_group(backend, timeout=datetime.timedelta(days=7))
    return device
