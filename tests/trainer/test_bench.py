"""The benchmarks run and print what they promise, whatever the figures."""

import os
import subprocess
import sys

import pytest

from tests.trainer import tiny
from trainer.tools import bench


@pytest.mark.slow
def test_loop(capsys):
  bench.main(["loop", "--steps", "5", "--rounds", "1", "--batch-size", "8"])
  assert "median ratio" in capsys.readouterr().out


def test_save(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(bench, "base", tiny)  # a net that is saved in a moment
  bench.main(
    ["save", "--rounds", "1", "--steps", "2", "--idle-seconds", "0.0", "--folder", str(tmp_path)]
  )
  out = capsys.readouterr().out
  assert "first:" in out and "save  1:" in out and "medians: the loop stands still for" in out
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_startup():
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  out = subprocess.run(
    [sys.executable, "-m", "trainer.bench", "startup"],
    env=environment,
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  ).stdout
  assert "start 2: first step after" in out and "ratio" in out
