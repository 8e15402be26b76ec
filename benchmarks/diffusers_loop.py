"""A plain training loop around the `UNet2DModel` of diffusers, in a process of its own.

It does what diffusers' example of unconditional training does: AdamW, clipping at 1, a cosine
schedule, the example's average, noise at uniform steps, the mean squared error.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset


@dataclass(frozen=True)
class Network:
    """The configuration of a `UNet2DModel`.

    Args:
        shape: of one item.
        widths: channels of the levels.
        layers: blocks a level.
        attention: levels with attention.
    """

    shape: tuple[int, ...]
    widths: tuple[int, ...]
    layers: int
    attention: tuple[int, ...]

    def build(self) -> Any:
        """The network."""
        from diffusers import UNet2DModel

        attentive = ["Attn" if i in self.attention else "" for i in range(len(self.widths))]
        return UNet2DModel(
            sample_size=self.shape[1:],
            in_channels=self.shape[0],
            out_channels=self.shape[0],
            block_out_channels=self.widths,
            layers_per_block=self.layers,
            down_block_types=[f"{a}DownBlock2D" for a in attentive],
            up_block_types=[f"{a}UpBlock2D" for a in reversed(attentive)],
        )


class Unwrapped(nn.Module):
    """A `UNet2DModel` that takes and gives what the networks here do."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """``(B, *shape)``, ``(B,)`` to the shape of ``x``."""
        out: Tensor = self.net(x, c_noise).sample
        return out


@dataclass(frozen=True)
class Settings:
    """How it trains.

    Args:
        batch: items a step.
        steps: length of the run, for the schedule of the learning rate.
        device: where.
        half: whether the network computes in bfloat16 (autocast).
        compiled: whether it is compiled.
        threads: threads of the process.
    """

    batch: int
    steps: int
    device: str
    half: bool
    compiled: bool
    threads: int


class Floats(Dataset[dict[str, Tensor]]):
    """Items in [-1, 1], as the transforms of the example give them."""

    def __init__(self, items: Tensor, levels: int) -> None:
        self.items, self.levels = items, levels

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input": self.items[index].float() / (self.levels - 1) * 2 - 1}


class Loop:
    """Network, schedule, optimizer and average; a call is a step."""

    def __init__(self, network: Network, settings: Settings, items: Tensor, levels: int) -> None:
        from diffusers import DDPMScheduler
        from diffusers.optimization import get_scheduler
        from diffusers.training_utils import EMAModel

        self.settings, self.device = settings, torch.device(settings.device)
        self.net = network.build().to(self.device)
        self.noise: Any = DDPMScheduler(num_train_timesteps=1000)
        self.ema = EMAModel(
            self.net.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75
        )
        self.ema.to(self.device)
        self.optimizer = torch.optim.AdamW(
            self.net.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8
        )
        self.rate = get_scheduler(
            "cosine", self.optimizer,
            num_warmup_steps=500, num_training_steps=500 + settings.steps,
        )  # fmt: skip
        self.fast = torch.compile(self.net) if settings.compiled else self.net
        self.loader = DataLoader(Floats(items, levels), settings.batch, shuffle=True)
        self.batches: Any = iter(())

    def __call__(self) -> None:
        """One step."""
        batch = next(self.batches, None)
        if batch is None:
            self.batches = iter(self.loader)
            batch = next(self.batches)
        clean = batch["input"].to(self.device)
        noise = torch.randn_like(clean)
        t = torch.randint(0, 1000, (len(clean),), device=self.device)
        noisy = self.noise.add_noise(clean, noise, t)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.half):
            predicted = self.fast(noisy, t).sample
        loss = functional.mse_loss(predicted.float(), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(self.net.parameters(), 1.0)
        self.optimizer.step()
        self.rate.step()
        self.optimizer.zero_grad()
        self.ema.step(self.net.parameters())
        loss.detach().item()  # for its progress bar


class Apart:
    """The loop in another process, with an allocator and threads of its own.

    Args:
        now: the clock that is read there, before and after.
    """

    def __init__(
        self,
        network: Network,
        settings: Settings,
        items: Tensor,
        levels: int,
        now: Callable[[], float],
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, end = context.Pipe()
        self.process = context.Process(
            target=_serve, args=(end, network, settings, items.numpy(), levels, now), daemon=True
        )
        self.process.start()

    def seconds(self, steps: int) -> float:
        """Mean time of so many steps."""
        self.pipe.send(steps)
        return float(self.pipe.recv())

    def close(self) -> None:
        """Ends the process."""
        self.pipe.send(0)
        self.process.join()


def _serve(
    pipe: Connection,
    network: Network,
    settings: Settings,
    items: Any,
    levels: int,
    now: Callable[[], float],
) -> None:
    """Takes as many steps as it is asked for, until that is none."""
    torch.set_num_threads(settings.threads)
    loop = Loop(network, settings, torch.from_numpy(items), levels)
    with suppress(EOFError):  # the other process has ended
        while steps := pipe.recv():
            began = now()
            for _ in range(steps):
                loop()  # reading the loss waits for the device
            pipe.send((now() - began) / steps)
