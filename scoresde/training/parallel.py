"""One network on many processes: replicated (DDP), or shared out (FSDP2)."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..config import ConfigError

if TYPE_CHECKING:
    from .settings import TrainingConfig


def check(training: TrainingConfig, processes: int) -> None:
    """Refuses a run that so many processes cannot train.

    Raises:
        ConfigError: if the batch cannot be shared out, or the weights cannot.
    """
    parts = processes * training.accumulate
    if training.batch_size % parts:
        raise ConfigError(
            f"training.batch_size {training.batch_size} cannot be shared out: it must be a "
            f"multiple of {parts}, which is {processes} process{'es' * (processes > 1)} times "
            f"training.accumulate {training.accumulate}"
        )
    if training.shard and training.precision == "float16":
        raise ConfigError(
            "training.shard cannot be had with training.precision float16: accepted are float32 "
            "and bfloat16"
        )


def normalise(net: nn.Module) -> None:
    """Brings shared-out weights of a forced norm to it, which whole ones do in their forward.

    There the rows of other processes are copies, and what is done to them is lost. Called before
    the forward, since the backward gathers the weights anew and has to find the same.
    """
    for module in net.modules():
        force = getattr(module, "force_norm", None)
        if force is not None:
            force()


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


def units(net: nn.Module) -> list[nn.Module]:
    """The blocks of a network that are gathered and let go as one.

    A module without a forward of its own, as ``nn.ModuleList`` and ``nn.ModuleDict`` are, only
    holds others, which the network calls: these are the blocks, the outermost of those within each
    other. What the network has besides stays with it, so that it may use single weights by hand.
    """
    found: list[nn.Module] = []
    for child in net.children():
        held, holds = (type(m).forward is nn.Module.forward for m in (net, child))
        if held and not holds and any(True for _ in child.parameters()):
            found.append(child)
        else:
            found += units(child)
    return list(dict.fromkeys(found))


def sharded(net: nn.Module, device: torch.device) -> None:
    """Shares the weights of a network out over the processes, in place (FSDP2).

    Each process keeps some rows of every weight, in the dtype it has, and the rest is there while
    a block computes.

    Args:
        net: the network, best on the CPU: a block at a time is then whole on the device.
        device: where it computes.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if device.type == "cpu" and torch.__version__.startswith("2.6."):
        raise ConfigError("training.shard on the CPU needs a newer torch than 2.6")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for parameter in net.parameters():
        parameter.data = parameter.data.contiguous()  # as it takes them
    alone = {parameter for parameter in net.parameters() if not parameter.ndim}
    options: dict[str, Any] = {"mesh": mesh}
    if alone:  # single numbers have no rows: each process holds them, see `whole`
        if "ignored_params" not in inspect.signature(fully_shard).parameters:
            raise ConfigError(
                "training.shard: the network has weights of single numbers, which this version "
                "of torch cannot share out; 2.7 can"
            )
        options["ignored_params"] = alone
        for parameter in alone:
            parameter.data = parameter.data.to(device)
    for unit in units(net):
        fully_shard(unit, **options)
    fully_shard(net, **options)


def whole(gradients: Iterable[Tensor]) -> list[Tensor]:
    """Of the gradients of a shared-out network those that each process holds whole."""
    return [gradient for gradient in gradients if not hasattr(gradient, "to_local")]


def summed(tensor: Tensor) -> Tensor:
    """The sum of a tensor over the processes, in place, on the device."""
    torch.distributed.all_reduce(tensor)
    return tensor


def averaged(gradient: Tensor, processes: int) -> None:
    """Makes a gradient that DDP does not know of the mean over the processes, in place."""
    if processes > 1:
        summed(gradient).div_(processes)
