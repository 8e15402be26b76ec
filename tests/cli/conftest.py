import sys

import pytest

from scoresde.cli import main


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Runs the command line in an empty folder, no terminal; the outcome is what it said."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("warnings.formatwarning", None)

    def call(*args, code=0):
        monkeypatch.setattr(sys, "argv", ["scoresde", *map(str, args)])
        found = 0
        try:
            main()
        except SystemExit as end:
            found = end.code
        said = capfd.readouterr()
        assert found == code, said
        return said

    return call
