"""Recordings of screens beside those of test_screen.py; RECORD=1 makes them anew."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests.trainer import terminal
from tests.trainer.shared import ENVIRONMENT, trainer
from tests.trainer.test_screen import RECORDINGS, TRAINER

ROOT = pathlib.Path(__file__).parents[2]
COMMANDS = (
  "python -m trainer --list | head -3",
  "python -m trainer --config=smoke --help=profile",
  "python -m trainer --config=smok --workdir=run",
  "python -m trainer --config=smoke --workdir=run --config.optimizer.lr_per_265=0.2",
  "python -m trainer --config=smoke --workdir=run --config.total_epochs=many",
  "python -m trainer --mode=eval --workdir=run",
)
PREFLIGHT = (
  "python -m launch.preflight --topology=v5e:1x1 --config=imagenet_resnet50 "
  "--config.model.depth=18 --config.data.image_size=64 --config.data.eval_image_size=64 "
  "--config.data.eval_resize=64 --config.global_batch_size=128 --config.eval.batch_size=128"
)


def compare(name, lines):
  """Compare lines with a recording, which differs in numbers and times alone."""
  file = RECORDINGS / name
  if "RECORD" in os.environ:
    file.write_text("\n".join(lines) + "\n")
  masked = [
    [re.sub(r"\d+(\.\d+)?(e-\d+)?", "0", line) for line in some]
    for some in (file.read_text().splitlines(), lines)
  ]
  assert masked[0] == masked[1], f"if this is meant, RECORD=1 writes {name} anew"


def test_helps_and_refusals(tmp_path):
  lines = []
  for command in COMMANDS:
    ended = subprocess.run(
      command.replace("python", sys.executable, 1),
      shell=True,
      cwd=tmp_path,
      env=os.environ | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1"},
      capture_output=True,
      text=True,
      check=False,
    )
    shown = (ended.stdout + ended.stderr).replace(str(tmp_path), ".").splitlines()
    code = f"[exit code {ended.returncode}]"
    assert ended.returncode == (0 if "list" in command or "help" in command else 2), ended.stderr
    lines += [f"$ {command}", *(re.sub(r"^\d\d:\d\d:\d\d", "12:00:00", s) for s in shown), code, ""]
  compare("helps_and_refusals.txt", lines)


@pytest.mark.slow
def test_an_evaluation_by_its_workdir(tmp_path):
  run = tmp_path / "run"
  subprocess.run(
    trainer(run, "total_steps=2"), env=ENVIRONMENT, capture_output=True, check=True, timeout=600
  )
  flags = ["--mode=eval", f"--workdir={run}", "--checkpoint=best"]
  written = terminal.run(
    TRAINER.format(flags=flags), 200, {"XLA_FLAGS": ENVIRONMENT["XLA_FLAGS"], "NO_COLOR": "1"}
  )
  assert "restoring checkpoint best, " in written and "evaluating val" in written
  shown = [row.replace(str(tmp_path), ".") for row in terminal.rows(written, 200)]
  assert any("Result: ./run/eval.json" in row for row in shown)
  compare(
    "evaluation.txt", ["$ python -m trainer --mode=eval --workdir=run --checkpoint=best", *shown]
  )


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu, of pip install -e '.[tpu]', is not installed",
)
def test_a_preflight():
  """As shown, but for the lines that come while it compiles: their number is the machine's."""
  ended = subprocess.run(
    PREFLIGHT.replace("python", sys.executable, 1).split(),
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    check=False,
  )
  assert ended.returncode == 0, ended.stdout
  shown = ended.stdout.splitlines()
  lines = [line for line in shown if not re.search(r"compiling for \d+ s$", line)]
  compare("preflight.txt", [f"$ {PREFLIGHT}", *lines])
