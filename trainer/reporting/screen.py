"""What a person sees of a run: the lines of its log and, on a terminal, one row below them.

The row has the progress of the steps or, while something else is done (compile, restore, evaluate),
what that is and since when. Every line is written above it, so that nothing is torn and all lines
stay. In a file or a pipe there is no row and no colour.
"""

from collections.abc import Iterator, Sequence
import contextlib
import logging
import os
import sys
import threading
import time

from absl import logging as absl_logging

from trainer.reporting.clock import format_seconds

_LIBRARIES = ("orbax", "grain", "clu", "jax", "gcsfs", "fsspec")
_COLOURS = {logging.WARNING: "\x1b[33m", logging.ERROR: "\x1b[31m", logging.CRITICAL: "\x1b[31m"}
_PLAIN = "\x1b[0m"
_CLEAR = "\r\x1b[K"
_BAR = (10, 40)  # least and most columns of the bar
_SECONDS = 0.1  # between two drawings of the row
_TICK_SECONDS = 1.0  # of the clock in the row, while something is done
# After so many something that is done has a line in the log, and after each time twice as many. XLA
# writes "Very slow compile?" between stars by itself after 120 s, without a switch.
_LINE_SECONDS = 100.0


class Screen:
  """Standard error of this process.

  Attributes:
    waits_for: what is under way, in words.
  """

  def __init__(self) -> None:
    self.waits_for = "the start"
    self._lock = threading.RLock()  # a signal handler may write while its thread holds it
    self._row = ""  # what stands below the lines
    self._steps = ""  # of it, what the steps have left there
    self._drawn = 0.0

  @property
  def on(self) -> bool:
    """Whether a row is shown."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"

  @property
  def coloured(self) -> bool:
    """Whether colours are shown; https://no-color.org."""
    return self.on and not os.environ.get("NO_COLOR")

  def line(self, text: str) -> None:
    """Write a line above the row."""
    with self._lock:
      clear = _CLEAR if self._row else ""
      sys.stderr.write(f"{clear}{text}\n{self._row}")
      sys.stderr.flush()

  def show(self, text: str) -> None:
    """Put a text of one row below the lines; "" for none."""
    if not self.on:
      return
    with self._lock:
      if text != self._row:
        self._row = text[: self.columns() - 1]  # in the last column some terminals wrap
        sys.stderr.write(_CLEAR + self._row)
        sys.stderr.flush()

  @staticmethod
  def columns() -> int:
    """Width of the terminal now, which a user may change."""
    try:
      return max(20, os.get_terminal_size(sys.stderr.fileno()).columns or 80)
    except (OSError, ValueError):
      return 80

  def steps(self, done: int, total: int, facts: Sequence[str], last: bool = False) -> None:
    """Show how many steps are taken.

    Args:
      done: steps taken.
      total: of the run.
      facts: the most important first; those that do not fit are left out.
      last: whether to draw at once, and not only every tenth of a second.
    """
    now = time.monotonic()
    if self.on and (last or now - self._drawn >= _SECONDS):
      self._drawn = now
      self._steps = progress(done, total, facts, self.columns() - 1, sys.stderr.encoding)
      self.show(self._steps)

  def close(self) -> None:
    """Leave the terminal with nothing below the lines."""
    with self._lock:
      self._steps = ""
      self.show("")

  @contextlib.contextmanager
  def doing(self, what: str, unit: str = "") -> Iterator["Doing"]:
    """Show in the row that something is done, and for how long, until the end of the body.

    Args:
      what: in words, as in "compiling the training step".
      unit: of what `Doing.count` counts.
    """
    before, self.waits_for = self.waits_for, what
    doing, ended = Doing(self, what, unit), threading.Event()

    def tick() -> None:
      due = _LINE_SECONDS
      while not ended.wait(_TICK_SECONDS):
        doing.draw()
        if doing.seconds >= due:
          due *= 2
          absl_logging.info("Still %s, after %s.", doing.words(), format_seconds(doing.seconds))

    thread = threading.Thread(target=tick, name="screen", daemon=True)
    doing.draw()
    thread.start()
    try:
      yield doing
    finally:
      ended.set()
      thread.join()
      self.waits_for = before
      self.show(self._steps)


class Doing:
  """Something that is done now."""

  def __init__(self, screen: Screen, what: str, unit: str):
    self._screen, self._what, self._unit = screen, what, unit
    self._start, self._counted = time.monotonic(), ""

  @property
  def seconds(self) -> float:
    """How long it has taken so far."""
    return time.monotonic() - self._start

  def count(self, done: int, total: int) -> None:
    """Note how far it is."""
    self._counted = f" {done:,}/{total:,} {self._unit}"

  def words(self) -> str:
    """Return what is done, and how far it is."""
    return f"{self._what}{self._counted}"

  def draw(self) -> None:
    """Show it in the row."""
    self._screen.show(f"{self.words()}, {format_seconds(self.seconds)}")


SCREEN = Screen()


def progress(done: int, total: int, facts: Sequence[str], columns: int, encoding: str) -> str:
  """Return a row with a bar: ' 45% ####------ 450/1,000  ETA 2 min 5 s  loss 0.1234'.

  Args:
    done: steps taken.
    total: of the run.
    facts: the most important first; those that do not fit are left out.
    columns: length of the row.
    encoding: of the terminal.
  """
  share = done / max(1, total)
  left, right = f"{100 * share:3.0f}% ", f" {done:,}/{total:,}"
  for fact in facts:
    if len(left) + _BAR[0] + len(right) + 2 + len(fact) > columns:
      break
    right += f"  {fact}"
  width = max(0, min(_BAR[1], columns - len(left) - len(right)))
  full, empty = ("█", "░") if encoding.lower().startswith("utf") else ("#", "-")
  filled = round(width * share)
  return (left + full * filled + empty * (width - filled) + right)[:columns]


class _OnlyOurs(logging.Filter):
  """Keeps the log to what a user can act on.

  Orbax and Grain log every save and read at INFO; of a failed save Orbax and gcsfs print the trace,
  and asyncio the tasks left behind, beside the trainer's own sentence; clu's work unit repeats the
  progress line.
  """

  def filter(self, record: logging.LogRecord) -> bool:
    library = any(f"{os.sep}{name}{os.sep}" in record.pathname for name in _LIBRARIES)
    if library:
      record.exc_info = None
      return record.levelno >= logging.WARNING
    return "exception was never retrieved" not in record.getMessage()


class _Handler(logging.Handler):
  """Writes the log to the screen."""

  def __init__(self) -> None:
    super().__init__()
    self.addFilter(_OnlyOurs())
    self.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S"))

  def emit(self, record: logging.LogRecord) -> None:
    try:
      text, colour = self.format(record), _COLOURS.get(record.levelno)
      SCREEN.line(f"{colour}{text}{_PLAIN}" if colour and SCREEN.coloured else text)
    except Exception:  # as all handlers do: a line that cannot be written ends no run
      self.handleError(record)


_HANDLER = _Handler()


def log_to_screen(verbosity: int = absl_logging.INFO) -> None:
  """Let this process log to the screen, as a command does; done again it changes nothing."""
  root = logging.getLogger()
  root.removeHandler(absl_logging.get_absl_handler())
  if _HANDLER not in root.handlers:
    root.addHandler(_HANDLER)
  absl_logging.set_verbosity(verbosity)


@contextlib.contextmanager
def shown() -> Iterator[None]:
  """Log to the screen in the body where nobody has set up logging, as in a notebook or a script.

  A program that has a handler of its own, or asked absl for a level, keeps what it has.
  """
  logger, root = absl_logging.get_absl_logger(), logging.getLogger()
  # absl itself adds a plain handler to the root logger with the first line.
  own = [handler for handler in root.handlers if type(handler) is not logging.StreamHandler]
  if own or logger.handlers or logger.getEffectiveLevel() <= logging.INFO:
    yield
    return
  level, propagate = absl_logging.get_verbosity(), logger.propagate
  logger.addHandler(_HANDLER)
  logger.propagate = False
  absl_logging.set_verbosity(absl_logging.INFO)
  try:
    yield
  finally:
    absl_logging.set_verbosity(level)
    logger.propagate = propagate
    logger.removeHandler(_HANDLER)
