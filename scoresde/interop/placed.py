"""Foreign tensors under the names of our network, strictly: none missing, none ill-shaped."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..files import CheckpointError


def placed(
    net: nn.Module,
    names: Mapping[str, str],
    state: Mapping[str, Tensor],
    misfit: str,
    turned: str,
    rows: Callable[[str, Tensor], Tensor],
) -> dict[str, Tensor]:
    """The tensors under the names of ``net``, half precision widened to float32.

    Args:
        net: the network, which may be on the meta device.
        names: their name of each of its tensors.
        state: their names and tensors.
        misfit: begins the message of an error, as ``"it does not fit its flags"``.
        turned: our name of the one tensor that they hold transposed, where there is such.
        rows: ``rows(name, tensor)`` puts the rows of a tensor in our order.

    Raises:
        CheckpointError: naming a tensor that is missing or has another shape.
    """
    found = {}
    for key, like in net.state_dict().items():
        theirs = names[key]
        if theirs not in state:
            raise CheckpointError(f"{misfit}: {theirs} is missing")
        value = state[theirs].detach()
        value = value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
        if key == turned:
            value = value.T
        elif value.ndim > like.ndim and value.numel() == like.numel():
            value = value.reshape(like.shape)  # a convolution of one pixel
        if value.shape != like.shape:
            raise CheckpointError(
                f"{misfit}: {theirs} is {tuple(state[theirs].shape)}, "
                f"the network's {key} is {tuple(like.shape)}"
            )
        found[key] = rows(key, value)
    return found
