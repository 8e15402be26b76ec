"""An exact labelled mixture, and scores and networks that count, for the tests of guidance."""

import torch
from torch import nn

import scoresde as sd
from scoresde.conditions import randomize

f64 = torch.float64


def labelled(dims=2, classes=3, dtype=f64):
    """A mixture of two components a class, of unequal weights and axes."""
    g = torch.Generator().manual_seed(5)
    means = 0.8 * torch.randn(2 * classes, dims, generator=g, dtype=f64)
    stds = 0.3 + 0.4 * torch.rand(2 * classes, dims, generator=g, dtype=f64)
    weights = 0.5 + torch.rand(2 * classes, generator=g, dtype=f64)
    mixture = sd.GaussianMixture(weights, means, stds).to(dtype=dtype)
    return sd.LabelledMixture(mixture, torch.arange(2 * classes) // 2)


def states(mixture, sde, t, n=6, seed=0):
    """Noisy items at a time, and their classes."""
    g = torch.Generator().manual_seed(seed)
    x0, y = mixture.sample(n, g)
    return sde.perturb(x0, t, torch.randn(x0.shape, generator=g, dtype=x0.dtype)), y


def times(sde):
    """Times from the least to the largest."""
    ends = float(sde.log_snr(sde.t_min)), float(sde.log_snr(sde.t_max))
    between = [float(sde.time(ends[0] + u * (ends[1] - ends[0]))) for u in (0.25, 0.5, 0.75)]
    return [sde.t_min, *between, sde.t_max]


class Counted(sd.Score):
    """A score that notes its calls: how many rows, and which conditions."""

    def __init__(self, score):
        self.score, self.sde, self.calls = score, score.sde, []
        self.num_classes = getattr(score, "num_classes", None)

    def __call__(self, x, t, **cond):
        self.calls.append((len(x), cond))
        return self.score(x, t, **cond)

    def rows(self):
        rows = [n for n, _ in self.calls]
        self.calls.clear()
        return rows


class Net(nn.Module):
    """A smooth network of vectors, with dropout, that is conditional and notes its calls."""

    num_classes = 4

    def __init__(self, dims=3, out=None):
        super().__init__()
        self.table = nn.Embedding(5, dims)
        self.inner, self.outer = nn.Linear(dims, 16), nn.Linear(16, out or dims)
        self.drop, self.rows, self.modes = nn.Dropout(0.5), [], set()
        randomize(self)

    def forward(self, x, c_noise, y=None):
        self.rows.append(len(x))
        self.modes.add(self.training)
        e = self.table.weight[-1] if y is None else self.table(y)
        h = torch.tanh(self.inner(x + e) + c_noise[:, None])
        return self.outer(self.drop(h))


def network(sde=None, **settings):
    model = sd.ScoreModel(Net(**settings), sde or sd.VP(), sd.V(), shape=(3,), weights="ema")
    return model.eval()
