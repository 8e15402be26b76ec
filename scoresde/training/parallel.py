"""One network on many processes: replicated (DDP), or shared out (FSDP2)."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def replicated(net: nn.Module, device: torch.device) -> nn.Module:
    """The network, whose gradients are averaged over the processes as they become known."""
    return nn.parallel.DistributedDataParallel(
        net,
        device_ids=[device] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
    )


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor that is shared out; any other as it is."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def sharded(net: nn.Module) -> None:
    """Shares the weights of the network out over the processes, in place."""
    from torch.distributed.fsdp import fully_shard

    fully_shard(net)


def summed(tensor: Tensor) -> Tensor:
    """The sum of a tensor over the processes, in place, on the device."""
    torch.distributed.all_reduce(tensor)
    return tensor


def averaged(gradient: Tensor, processes: int) -> None:
    """Makes a gradient that DDP does not know of the mean over the processes, in place."""
    if processes > 1:
        summed(gradient).div_(processes)
