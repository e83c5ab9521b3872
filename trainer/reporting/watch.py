"""The screen of a run elsewhere, read-only, from what it writes to its workdir.

    python -m trainer.watch WORKDIR|gs://BUCKET/FOLDER [--every=SECONDS] [--once]

shows the config that a start runs, a line for each window of training and for each evaluation, and
on a terminal a bar below. It waits for a run that has not begun, says when no process works on it
any more, and ends with the run: with exit code 0 if it is complete, else 1. --once shows what there
is, and ends. Ctrl-C leaves at once; the run does not notice.

A line is as new as the file that it is read from: at most half a minute old in a bucket.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
import sys
import time
from typing import Any

import ml_collections

from configs import arguments
from trainer import config as config_lib
from trainer.errors import DONE, FAILED, TrainerError
from trainer.reporting import json_lines, recorded
from trainer.reporting.clock import format_seconds
from trainer.reporting.recorded import Recorded
from trainer.reporting.screen import SCREEN
from trainer.workdir.paths import Workdir

NOT_COMPLETE = 1  # exit code
_LEAST_SECONDS = 0.1  # between two looks


class Watch:
  """What has been shown of a run so far."""

  def __init__(self, run: Workdir, once: bool = False):
    """Show nothing yet.

    Args:
      run: its folder, which may not exist yet.
      once: whether there will be one look alone.
    """
    self._run = run
    self._waits = "" if once else "; waiting for one"
    self._tail = json_lines.Tail(run.metrics)
    self._shown = 0  # lines of metrics.jsonl
    self._last: dict[str, Any] = {}  # the newest of them
    self._starts = 0
    self._state = ""
    self.complete = False

  def look(self) -> bool:
    """Show what is new; return whether the run has ended for good.

    Raises:
      StorageError: if a file cannot be read.
    """
    run = recorded.read_files(self._run)
    if run.config is None:
      self._say_state("waiting", f"{self._run.path} holds no run yet{self._waits}.")
      return False
    number = (run.starts or {}).get("starts", 1)
    if number != self._starts:
      self._starts = number
      for line in _start(run, number):
        SCREEN.line(line)
    self._show_lines(run)
    state = {
      "finished": "",
      "failed": f"The run failed: {run.failure}",
      "running": "The run is under way.",
      "stopped": f"No process works on this run now{self._waits}.",
    }[run.state]
    if run.final is not None:
      self.complete = True
      SCREEN.close()
      SCREEN.line(_result(run.final))
      return True
    self._say_state(run.state, state)
    return run.state == "failed"

  def _say_state(self, state: str, words: str) -> None:
    if state != self._state:
      self._state = state
      SCREEN.line(words)

  def _show_lines(self, run: Recorded) -> None:
    """Show the lines of metrics.jsonl that are new; a resumed run may have fewer than before."""
    lines = self._tail.read()
    if len(lines) < self._shown or (self._shown and lines[self._shown - 1] != self._last):
      kept = next((i for i, line in enumerate(lines) if line["time"] > self._last["time"]), None)
      self._shown = len(lines) if kept is None else kept
    total = total_steps(run)
    for line in lines[self._shown :]:
      for text in _in_words(line, run.epochs_per_step, total):
        SCREEN.line(f"{time.strftime('%H:%M:%S', time.localtime(line['time']))} {text}")
    self._shown, self._last = len(lines), lines[-1] if lines else {}
    trained = [line for line in lines if "train/loss" in line]
    if trained and total:
      facts = _facts(trained, run.epochs_per_step, total)
      SCREEN.steps(trained[-1]["step"], total, facts, last=True)


def total_steps(run: Recorded) -> int:
  """Return the length of a run in steps; 0 if it is not known."""
  config = ml_collections.ConfigDict(run.config)
  if config.total_steps:
    return int(config.total_steps)
  per_step = run.epochs_per_step
  return round(config.total_epochs / per_step) if per_step else 0


def _start(run: Recorded, number: int) -> Iterator[str]:
  """Yield what a start is."""
  yield f"{run.title}, start {number}, in {run.run.path}"
  facts = run.environment or {}
  if "devices" in facts:
    yield f"  on {facts['devices']}, hosts: {facts['hosts']}, {facts.get('host', '')} is the first"
  if run.history and "changes" in run.history[-1]:
    yield f"  changed fields: {config_lib.in_words(run.history[-1]['changes'])}"


def _in_words(line: Mapping[str, Any], epochs: float | None, total: int) -> Iterator[str]:
  """Yield the words of a line of metrics.jsonl."""
  step = line["step"]
  where = f"step {step}{f'/{total}' if total else ''}"
  if epochs:
    where += f"  epoch {step * epochs:.2f}"

  def some(prefix: str, forms: Mapping[str, Callable[[float], str]]) -> str:
    found = [
      f"{name} {'not finite' if line[prefix + name] is None else form(line[prefix + name])}"
      for name, form in forms.items()
      if prefix + name in line
    ]
    return "  ".join(found)

  if "train/loss" in line:
    text = some("train/", {"loss": "{:.4f}".format, "top1": "{:.1%}".format})
    speed = line.get("train/images_per_second")
    waits = line.get("train/input_wait")
    text += f"  {speed:.0f} img/s" if speed is not None else ""
    text += f"  input wait {waits:.1%}" if waits is not None else ""
    yield f"{where}  {text}"
  for prefix in sorted({n[:-4] for n in line if n.startswith("eval/") and n.endswith("/top1")}):
    split = prefix.removeprefix("eval/").rstrip("/")
    forms = {"top1": "{:.2%}".format, "top5": "{:.2%}".format, "loss": "{:.4f}".format}
    yield f"{where}  eval{f' of {split}' if split else ''}: {some(prefix, forms)}"


def _facts(trained: Sequence[Mapping[str, Any]], epochs: float | None, total: int) -> list[str]:
  """Return what stands beside the bar; the ETA is by the pace of the last lines."""
  last = trained[-1]
  before = trained[max(0, len(trained) - 20)]
  facts = []
  if steps := last["step"] - before["step"]:
    eta = (last["time"] - before["time"]) / steps * (total - last["step"])
    facts.append(f"ETA {format_seconds(max(0.0, eta))}")
  if (loss := last["train/loss"]) is not None:
    facts.append(f"loss {loss:.4f}")
  if (speed := last.get("train/images_per_second")) is not None:
    facts.append(f"{speed:.0f} img/s")
  if epochs:
    facts.append(f"epoch {last['step'] * epochs:.2f}")
  facts.append(f"{format_seconds(max(0.0, time.time() - last['time']))} ago")
  return facts


def _result(final: Mapping[str, Any]) -> str:
  return (
    f"Done: top1 {final['top1']:.2%}, top5 {final['top5']:.2%} on {final['examples']} examples "
    f"after {final['epochs']:.1f} epochs; goodput {final['goodput']['share']:.1%}."
  )


def watch(
  workdir: str, every: float, once: bool = False, pause: Callable[[float], None] = time.sleep
) -> int:
  """Show a run until it has ended; return the exit code.

  Args:
    workdir: its folder, local or gs://, which may not exist yet.
    every: seconds between two looks.
    once: whether one look is all.
    pause: waits so many seconds.

  Raises:
    TrainerError: if a bucket cannot be used, or a file not be read at the first look.
  """
  screen = Watch(recorded.open_run(workdir), once)
  trouble, first = "", True
  while True:
    try:
      if screen.look():
        break
      trouble = ""
    except TrainerError as error:  # a bucket may be silent for a while
      if first or once:
        raise
      if str(error) != trouble:
        SCREEN.line(str(error))
      trouble = str(error)
    if once:
      break
    first = False
    pause(every)
  SCREEN.close()
  return DONE if screen.complete else NOT_COMPLETE


def main(words: Sequence[str] | None = None) -> int:
  """Watch the workdir named in a command line; return the exit code."""
  parser = arguments.Parser(prog="python -m trainer.watch", description=__doc__.split("\n")[0])
  parser.add_argument("workdir", help="folder of the run")
  parser.add_argument("--every", type=float, default=5.0, metavar="S", help="seconds (5)")
  parser.add_argument("--once", action="store_true", help="show what there is, and end")
  options = parser.parse_args(words)
  try:
    return watch(options.workdir, max(_LEAST_SECONDS, options.every), options.once)
  except (TrainerError, OSError) as error:
    print(error, file=sys.stderr)
    return FAILED
