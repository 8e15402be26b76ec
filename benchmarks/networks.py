"""Speed of the networks, as a fraction of what the machine's convolutions reach.

    python benchmarks/networks.py [--device cpu] [--batch 8] [--dtype float32] [--width 64]
                                  [--peers] [--compile] [--repeats 5]

At CIFAR-10 size, 3x32x32. The rate is that of a 3x3 convolution of 8x128x32x32 in the better
memory format (on a CPU), or of a matrix product of 8192 (on an accelerator); a network's floor is
its FLOPs at that rate, and its fraction is floor over time. A training step is three forwards of
FLOPs, without the optimizer. ``vjp`` is a forward with a vector-Jacobian product with respect to
the item, in units of forwards; its memory is that of the activations of one item. Timings are
medians, a network's in turns with the rate's; forwards and products in rows of four, as a solver
calls them. ``--peers`` adds the ``UNet2DModel`` of diffusers of like size. Prints Markdown.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

import scoresde as sd
from scoresde.cost import cost

PRESETS = {
    "DDPM++": (sd.nets.NCSNpp, "ddpmpp"),
    "NCSN++": (sd.nets.NCSNpp, "ncsnpp"),
    "EDM's DDPM++": (sd.nets.NCSNpp, "edm-ddpmpp"),
}


class Peer(nn.Module):
    """``UNet2DModel`` with the attention and the widths of DDPM++, channels last."""

    def __init__(self, width: int) -> None:
        super().__init__()
        from diffusers import UNet2DModel

        plain, attentive = ("DownBlock2D", "UpBlock2D"), ("AttnDownBlock2D", "AttnUpBlock2D")
        self.net = UNet2DModel(
            sample_size=32,
            block_out_channels=(width, 2 * width, 2 * width, 2 * width),
            layers_per_block=4,
            down_block_types=(plain[0], attentive[0], plain[0], plain[0]),
            up_block_types=(plain[1], plain[1], attentive[1], plain[1]),
        ).to(memory_format=torch.channels_last)

    def forward(self, x: Tensor, c_noise: Tensor) -> Tensor:
        """As the networks here."""
        return self.net(x.to(memory_format=torch.channels_last), c_noise).sample


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Wall-clock time of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of the machine's own kernel, the best of ten."""
    if device.type == "cuda":
        a = torch.randn(8192, 8192, device=device, dtype=dtype)
        best = min(seconds(lambda: a @ a, device) for _ in range(10))
        return 2 * 8192**3 / best
    found = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        x = torch.randn(8, 128, 32, 32).to(dtype).to(memory_format=memory_format)
        w = torch.randn(128, 128, 3, 3).to(dtype).to(memory_format=memory_format)
        with torch.no_grad():
            found.append(
                min(
                    seconds(lambda x=x, w=w: functional.conv2d(x, w, padding=1), device)
                    for _ in range(10)
                )
            )
    return 2 * 8 * 32 * 32 * 9 * 128 * 128 / min(found)


def measure(net: nn.Module, args: argparse.Namespace) -> dict[str, float]:
    """Medians of a network's fractions."""
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    net = net.to(device, dtype).eval()
    x = torch.randn(args.batch, 3, 32, 32, device=device, dtype=dtype)
    c = torch.linspace(-1, 1, args.batch, device=device)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(x, c)
    flops = counter.get_total_flops()
    fast = torch.compile(net) if args.compile else net

    def forward() -> None:
        with torch.no_grad():
            fast(x, c)

    def product() -> None:
        item = x.clone().requires_grad_()
        torch.autograd.grad(fast(item, c), item, x)

    def train() -> None:
        net.zero_grad(set_to_none=True)
        fast(x, c).float().square().mean().backward()

    taken: dict[str, list[float]] = {"forward": [], "training": [], "vjp": []}
    for call in (train, forward):
        call()
        for _ in range(args.repeats):
            peak = rate(device, dtype)
            factor, name = (3, "training") if call is train else (1, "forward")
            taken[name].append(factor * flops / seconds(call, device) / peak)
    for _ in range(args.repeats):
        once, both = (
            statistics.median(seconds(call, device) for _ in range(4))
            for call in (forward, product)
        )
        taken["vjp"].append(both / once)
    found = {name: statistics.median(values) for name, values in taken.items()}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        found["images/s"] = args.batch / seconds(train, device)
        found["GiB"] = torch.cuda.max_memory_allocated() / 2**30
    return {"GFLOP": flops / args.batch / 1e9, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device, dtype = torch.device(args.device), getattr(torch, args.dtype)
    print(f"rate {rate(device, dtype) / 1e9:.0f} GFLOP/s, {args.dtype}, batch {args.batch}\n")
    nets: dict[str, nn.Module] = {
        name: kind((3, 32, 32), **{**kind.presets[preset], "width": args.width})
        for name, (kind, preset) in PRESETS.items()
    }
    if args.peers:
        nets["UNet2DModel"] = Peer(args.width)
    header = None
    for name, net in nets.items():
        row = measure(net, args)
        if header is None:
            header = list(row)
            print("| network | " + " | ".join(header) + " | MiB forward | MiB vjp |")
            print("|---" * (len(header) + 3) + "|")
        found = cost(sd.ScoreModel(net, sd.VP(), sd.Eps(), shape=(3, 32, 32)))
        memory = [(found.forward_bytes or 0) / 2**20, (found.vjp_bytes or 0) / 2**20]
        cells = [f"{value:.3g}" for value in row.values()] + [f"{m:.1f}" for m in memory]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
