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


@pytest.mark.slow
def test_depth(capsys):
  bench.main(
    [
      "depth",
      *("--nets", "cifar_resnet-20", "--ways", "unroll,scan+blocks", "--width", "0.25"),
      *("--image-size", "8", "--batch-size", "2", "--steps", "1"),
    ]
  )
  rows = capsys.readouterr().out.splitlines()[2:]
  assert [row.split()[:3] for row in rows] == [
    ["cifar_resnet-20", "unroll", "none"],
    ["cifar_resnet-20", "scan", "blocks"],
  ]
  unrolled, scanned = (float(row.split()[-1]) for row in rows)
  assert scanned == pytest.approx(unrolled, rel=1e-3)
