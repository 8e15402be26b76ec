"""Tar files of small items for the tests of streams."""

import io
import tarfile

import numpy as np
import torch
from PIL import Image


def png(array):
    out = io.BytesIO()
    Image.fromarray(np.asarray(array, np.uint8)).save(out, "png")
    return out.getvalue()


def npy(array):
    out = io.BytesIO()
    np.save(out, array)
    return out.getvalue()


def write(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def pictures(numbers, label=lambda i: i % 3):
    """Members of grey pictures of one value each, with their classes."""
    for i in numbers:
        yield f"{i:06d}.png", png(np.full((4, 4), i))
        yield f"{i:06d}.cls", str(label(i)).encode()


def ids(x):
    return x.flatten(1)[:, 0].tolist()


def same(a, b):
    return torch.equal(a.x, b.x) and torch.equal(a.y, b.y) and a.where == b.where
