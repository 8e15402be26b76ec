"""Made-up sets of every kind, with items that tell their number."""

import io
import zipfile

import numpy as np
import pytest
from PIL import Image

SIDE = 6


def picture(i, side=SIDE):
    """A colour picture whose first two values are the digits of `i` to the base 200."""
    rng = np.random.default_rng(i)
    array = rng.integers(0, 256, (side, side, 3)).astype(np.uint8)
    array[0, 0, :2] = i % 200, i // 200
    return array


def encoded(i, side=SIDE):
    stream = io.BytesIO()
    Image.fromarray(picture(i, side)).save(stream, "PNG")
    return stream.getvalue()


def write_folder(root, n=60):
    for i in range(n):
        path = root / f"c{i * 3 // n}" / f"{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(i))
    return root


def write_zip(path, n=60):
    with zipfile.ZipFile(path, "w") as archive:
        for i in range(n):
            archive.writestr(f"set/c{i * 3 // n}/{i:03}.png", encoded(i))
    return path


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    """What is unpacked stays in the folder of the tests."""
    folder = tmp_path_factory.mktemp("unpacked")
    monkeypatch.setenv("SCORESDE_CACHE", str(folder))
    return folder
