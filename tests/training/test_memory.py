"""Memory that a run keeps from step to step: what the C library is told, and what comes of it."""

import os
import subprocess
import sys

import pytest
import torch

from scoresde.training import memory
from scoresde.training.memory import MIB, MMAP_MAX, MMAP_THRESHOLD, TRIM_THRESHOLD, kept_memory

CPU = torch.device("cpu")
KEEP = {MMAP_MAX: 0, TRIM_THRESHOLD: -1}
BACK = {MMAP_MAX: 65536, MMAP_THRESHOLD: 32 * MIB, TRIM_THRESHOLD: 64 * MIB}


class Library:
    """A C library that writes down what it is told."""

    def __init__(self):
        self.told, self.trimmed = {}, 0

    def mallopt(self, parameter, value):
        self.told[parameter] = value

    def malloc_trim(self, pad):
        self.trimmed += 1


@pytest.fixture(autouse=True)
def library(monkeypatch):
    for name in [n for n in os.environ if n.startswith("MALLOC_") or n == "GLIBC_TUNABLES"]:
        monkeypatch.delenv(name)
    found = Library()
    monkeypatch.setattr(memory, "_glibc", lambda: found)
    return found


def test_it_is_told_to_keep_and_to_give_back(library):
    with kept_memory(CPU):
        assert library.told == KEEP
        assert library.trimmed == 0
    assert library.told == BACK
    assert library.trimmed == 1


def test_it_gives_back_after_an_error(library):
    def run():
        with kept_memory(CPU):
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        run()
    assert library.told == BACK
    assert library.trimmed == 1


@pytest.mark.parametrize(
    ("device", "name", "value"),
    [
        ("cuda", "OTHER", "1"),
        ("cpu", "MALLOC_TRIM_THRESHOLD_", "1000000"),
        ("cpu", "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"),
    ],
)
def test_nothing_is_told_elsewhere(library, monkeypatch, device, name, value):
    monkeypatch.setenv(name, value)
    with kept_memory(torch.device(device)):
        pass
    assert library.told == {}
    assert library.trimmed == 0


def test_other_libraries_are_left_alone(monkeypatch):
    monkeypatch.setattr(memory, "_glibc", lambda: None)
    with kept_memory(CPU):
        pass


SCRIPT = """
import os, torch
from scoresde.training.memory import MIB, _glibc, kept_memory

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / MIB

def use():
    block = torch.ones(256 * MIB // 4)
    del block
    return resident()

start = resident()
print(_glibc() is not None, use() - start)
with kept_memory(torch.device("cpu")):
    print(use() - start, min(use() for _ in range(3)) - start)
print(resident() - start)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_a_process_keeps_what_it_frees_until_the_end():
    out = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True
    ).stdout.split()
    if out[0] == "False":
        pytest.skip("glibc alone")
    plain, first, again, after = map(float, out[1:])
    assert plain < 64
    assert 192 < first < 320
    assert again < 576  # the same place, or the two that alternate
    assert after < 64
