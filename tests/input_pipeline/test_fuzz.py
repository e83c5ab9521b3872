"""Thousands of damaged records: no crash, no hang, no growing memory, each bad one counted."""

import json
import subprocess
import sys

import pytest


def fuzz(*args) -> dict[str, int]:
  """Run tests.input_pipeline.fuzz; return its figures."""
  command = [sys.executable, "-m", "tests.input_pipeline.fuzz", *(str(a) for a in args)]
  done = subprocess.run(command, capture_output=True, text=True, timeout=500)
  assert done.returncode == 0, done.stderr[-3000:]
  assert not done.stderr  # no decoder and no library talks past the log
  return json.loads(done.stdout)


def check(found: dict[str, int], count: int) -> None:
  """Asserts that all were read, that all kinds of ends were met, and that memory stayed."""
  ends = [found[end] for end in ("no record", "no image", "image")]
  assert sum(ends) == count
  assert min(ends) > count / 6
  assert found["replaced"] > count / 2
  assert found["growth"] < 32  # MiB
  assert found["peak"] < 1200


@pytest.mark.parametrize("count", [2000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_damaged_records_cost_only_themselves(count, tmp_path):
  check(fuzz(count, 0, tmp_path), count)


@pytest.mark.slow
def test_damaged_originals_cost_only_themselves(originals, tmp_path):
  check(fuzz(10_000, 1, tmp_path, originals), 10_000)
