"""A table of the reports of launch.preflight --json that lie in a folder, a row for each recipe."""

from collections.abc import Sequence
import json
import pathlib
import subprocess
import sys
from typing import Any

from configs import recipes
from launch.cloud.preflight import DOES_NOT_FIT

_COLUMNS = (
  "recipe",
  "with",
  "images a chip",
  "fits",
  "memory, GiB",
  "ms a step",
  "images/s a chip",
  "MFU",
  "hours",
  "chip-hours",
  "compiled in, CPU-s",
)
# Of loops that end by their values, and make more than 1 % of a step.
_MARKS = {
  "≤": "has a loop that may end before, and counts with all its rounds.",
  "*": "has a loop whose rounds are not known, and counts with one.",
}


def make(folder: pathlib.Path, words: Sequence[str]) -> None:
  """Make the reports of all recipes that are not in the folder yet, one after the other.

  A file is FOLDER/RECIPE.json; of a recipe that does not fit it holds the reason. A command that
  was interrupted resumes with the first that is missing.

  Args:
    folder: is made if it is not there.
    words: flags of each, as in --topology=v5e:4x4.
  """
  folder.mkdir(parents=True, exist_ok=True)
  for name in _missing(folder):
    module, colon, variant = name.partition(":")
    command = [
      *(sys.executable, "-m", "launch.preflight", "--json"),
      f"--config=configs/{module}.py{colon}{variant}",
      f"--known={folder / 'steps'}",
      *words,
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode in (0, DOES_NOT_FIT):
      _file(folder, name).write_text(done.stdout)
    last = (done.stderr.strip().splitlines() or ["?"])[-1]
    print(f"{name}: {last}", file=sys.stderr, flush=True)


def text(folder: pathlib.Path) -> str:
  """Returns the table of what is in a folder, in Markdown, and a line with what is not."""
  reports = {
    name: json.loads(_file(folder, name).read_text())
    for name in recipes.names()
    if _file(folder, name).exists()
  }
  lines = [f"| {' | '.join(_COLUMNS)} |", f"|---|{'---:|' * (len(_COLUMNS) - 1)}"]
  lines += [f"| {' | '.join(_row(name, report))} |" for name, report in reports.items()]
  lines += [f"\n{mark} {words}" for mark, words in _MARKS.items() if mark in "".join(lines)]
  if missing := _missing(folder):
    lines += ["", f"Not compiled: {', '.join(missing)}."]
  return "\n".join(lines)


def _missing(folder: pathlib.Path) -> list[str]:
  return [name for name in recipes.names() if not _file(folder, name).exists()]


def _file(folder: pathlib.Path, name: str) -> pathlib.Path:
  return folder / f"{name.replace(':', '-')}.json"


def _row(name: str, report: dict[str, Any]) -> list[str]:
  fields = " ".join(f"{field}={value}" for field, value in report["fields"].items())
  head = [f"`{name}`", f"`{fields}`" if fields else ""]
  if "refused" in report:
    return [*head, "", f"no: {report['refused']}", *[""] * (len(_COLUMNS) - 4)]
  # Of several image sizes the largest: it is the slowest, and decides what fits.
  step = max(
    (each for each in report["steps"] if each["mode"] == "train"), key=lambda each: each["cycles"]
  )
  return [
    *head,
    f"{step['per_chip']:g}",
    "yes",
    _short(step["memory"]["total"] / 2**30),
    _marked(step),
    _short(step["images_per_second_per_chip"]),
    f"{100 * step['mfu']:.1f} %",
    _short(report["run"]["hours"]["total"]),
    _short(report["run"]["chip_hours"]),
    _short(sum(each["compile_cpu_seconds"] for each in report["steps"])),
  ]


def _marked(step: dict[str, Any]) -> str:
  """Return the time of a step, with the marks of the loops that decide on more than 1 % of it."""
  long = [each["most"] for each in step["open_loops"] if each["cycles"] > 0.01 * step["cycles"]]
  most, once = _MARKS
  return most * any(long) + _short(step["ms"]) + once * (None in long)


def _short(value: float) -> str:
  """Return a number with three digits that count."""
  return f"{float(f'{value:.3g}'):,g}"
