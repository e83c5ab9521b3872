"""What `watch` shows: lines that stay in place on a terminal, else plain lines or JSON."""

from __future__ import annotations

from collections.abc import Iterable
import dataclasses
import json
import pathlib
import re
import shutil
import sys
import time
from typing import Any, TextIO

from launch.cloud import settings as settings_lib
from launch.cloud.look import report_of
from launch.cloud.run import Run
from launch.cloud.settings import Settings, describe_seconds
from launch.cloud.world import Action, World


@dataclasses.dataclass(frozen=True)
class View:
  """What is shown of a run at one time.

  Attributes:
    goodput: steps that count times the median step time of the progress line, over the time that
      slices existed; None before the first step.
    cost: dollars so far, None without a price.
  """

  run: str
  what: str
  state: str
  nodes: tuple[str, ...]
  hosts: str
  attempt: int
  doing: str
  step: int | None
  total: int | None
  loss: float | None
  images_per_second: float | None
  eta: str | None
  goodput: float | None
  slice_seconds: float
  max_seconds: float | None
  chip_hours: float | None
  cost: float | None
  result: dict[str, Any] | None
  events: tuple[dict[str, Any], ...]
  now: float

  @classmethod
  def of(cls, run: Run, world: World, action: Action | None) -> View:
    """Collect what is known."""
    settings, memory = run.settings, run.memory
    reports = world.reports or ((report_of(world.heartbeat),) if world.heartbeat else ())
    stepped = [entry for entry in reports if entry.step is not None]
    report = max(stepped, key=lambda entry: entry.step or 0, default=None)
    step = report.step if report else None
    line = report.progress if report else ""
    step_ms, eta = _number(r"step ([\d.]+) ms", line), re.search(r"ETA (.+)$", line)
    seconds, chips, price = (
      memory.seconds(),
      settings_lib.chips(settings),
      settings.dollars_per_chip_hour,
    )
    chip_hours = seconds / 3600 * chips if chips else None
    nodes = [
      f"{node.name} {node.state} {node.health}"
      + (f", announced: {node.maintenance}" if node.maintenance else "")
      for node in world.nodes
    ]
    return cls(
      run=settings.run,
      what=f"{settings.slices} x {settings.type} {settings.capacity}, {settings.place.zone}",
      state=world.queued.state if world.queued else "none",
      nodes=tuple(nodes),
      hosts=f"{len(world.reports)} of {memory.hosts}",
      attempt=memory.attempt,
      doing=action.reason if action else "",
      step=memory.step if step is None else step,
      total=report.total if report else None,
      loss=_number(r"loss ([\d.]+)", line),
      images_per_second=_number(r"(\d+) img/s", line),
      eta=eta[1] if eta else None,
      goodput=min(1.0, step * step_ms / 1000 / seconds) if step and step_ms and seconds else None,
      slice_seconds=seconds,
      max_seconds=settings.max_seconds,
      chip_hours=chip_hours,
      cost=chip_hours * price if chip_hours is not None and price else None,
      result=run.result,
      events=tuple(run.events[-5:]),
      now=world.now,
    )

  @staticmethod
  def chips_text(settings: Settings) -> str:
    """Returns what an hour of the slices costs."""
    chips = settings_lib.chips(settings)
    if not chips:
      return f"{settings.slices} x {settings.type}"
    price = (
      f", ${chips * settings.dollars_per_chip_hour:.2f} an hour"
      if settings.dollars_per_chip_hour
      else ""
    )
    return f"{chips} chip-hours an hour{price}"

  def summary(self) -> str:
    """Returns the view as one line."""
    parts = [f"attempt {self.attempt}", self.doing]
    if self.step is not None:
      parts.append(f"step {self.step:,}" + (f" of {self.total:,}" if self.total else ""))
    parts += [f"loss {self.loss:.4f}"] if self.loss is not None else []
    parts += [f"{self.images_per_second:,.0f} img/s"] if self.images_per_second else []
    parts += [f"ETA {self.eta}"] if self.eta else []
    parts += [f"goodput {100 * self.goodput:.0f}%"] if self.goodput is not None else []
    return ", ".join([part for part in parts if part] + [self._cost()])

  def _cost(self) -> str:
    limit = f" of {describe_seconds(self.max_seconds)}" if self.max_seconds else ""
    text = f"{describe_seconds(self.slice_seconds)}{limit}"
    text += f", {self.chip_hours:,.1f} chip-hours" if self.chip_hours is not None else ""
    return text + (f", ${self.cost:,.2f}" if self.cost is not None else "")

  def block(self) -> list[str]:
    """Returns the view as the lines of a screen."""
    if self.step is None:
      training = "no step yet"
    else:
      done = f"step {self.step:,}" + (
        f" of {self.total:,} ({100 * self.step / self.total:.1f}%)" if self.total else ""
      )
      rest = [
        f"loss {self.loss:.4f}" if self.loss is not None else "",
        f"{self.images_per_second:,.0f} img/s" if self.images_per_second else "",
        f"ETA {self.eta}" if self.eta else "",
        f"goodput {100 * self.goodput:.0f}%" if self.goodput is not None else "",
      ]
      training = "  ".join([done, *filter(None, rest)])
    lines = [
      f"{self.run}: {self.what}   {_clock(self.now)}",
      f"  slice    {self.state}" + (f"; {self.hosts} hosts answer" if self.nodes else ""),
      *(f"           {node}" for node in self.nodes),
      f"  attempt  {self.attempt}: {self.doing}",
      f"  training {training}",
      f"  cost     {self._cost()}",
    ]
    return lines + [f"  {_clock(event['time'])} {event['what']}" for event in self.events]

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)


def _number(pattern: str, text: str) -> float | None:
  found = re.search(pattern, text)
  return float(found[1]) if found else None


def _clock(seconds: float) -> str:
  return time.strftime("%H:%M:%S", time.localtime(seconds))


class Screen:
  """Where a run is shown."""

  def __init__(
    self, log: pathlib.Path | None = None, as_json: bool = False, output: TextIO | None = None
  ):
    """Shows on `output` (stdout by default), and keeps plain lines in `log`."""
    self._output = output or sys.stdout
    self._live = self._output.isatty() and not as_json
    self._json, self._log = as_json, log
    self._drawn = 0
    self._view: View | None = None
    self._last = ""

  def show(self, view: View) -> None:
    """Show a run as it is now."""
    self._view = view
    if self._json:
      self._print(json.dumps(view.to_json()))
      return
    # Ages in the reason change every turn, and are not news.
    news = re.sub(r"([\d.]+ (s|min|h)\b ?)+", "", view.doing) + str(
      (view.step, view.attempt, view.state)
    )
    if news != self._last:
      self._last = news
      self._plain(f"{_clock(view.now)} {view.summary()}", shown=self._live)
    if self._live:
      self._draw(view.block())

  def lines(self, lines: Iterable[str], at: float | None = None) -> None:
    """Show lines that stay."""
    lines = list(lines)
    if not lines:
      return
    if self._json:
      self._print(json.dumps({"message": "\n".join(lines), "time": at or time.time()}))
      return
    self._erase()
    for number, line in enumerate(lines):
      self._plain(f"{_clock(at or time.time())} {line}" if number == 0 else line)
    if self._live and self._view:
      self._draw(self._view.block())

  def _plain(self, line: str, shown: bool = False) -> None:
    if not shown:
      self._print(line)
    if self._log:
      self._log.parent.mkdir(parents=True, exist_ok=True)
      with open(self._log, "a") as file:
        file.write(line + "\n")

  def _print(self, text: str) -> None:
    print(text, file=self._output, flush=True)

  def _erase(self) -> None:
    if self._live and self._drawn:
      self._output.write(f"\x1b[{self._drawn}F\x1b[J")
      self._drawn = 0

  def _draw(self, lines: list[str]) -> None:
    self._erase()
    width = shutil.get_terminal_size().columns
    self._print("\n".join(line[: width - 1] for line in lines))
    self._drawn = len(lines)
