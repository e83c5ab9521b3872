"""What a person sees on a terminal: lines above, one row below; and nothing of it in a file."""

import logging
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest

from tests.trainer import terminal
from tests.trainer.shared import ENVIRONMENT, trainer
from trainer.pod import preemption
from trainer.reporting import screen as screen_lib

RECORDINGS = pathlib.Path(__file__).parent / "recordings"
FACTS = ["ETA 1 min 40 s", "loss 2.3026", "1500 img/s", "epoch 0.40", "input wait 0.3%"]

# A made-up run, at a time that stands still.
RUN = """
import logging as python_logging, sys, time, types
from absl import logging
from trainer.reporting import screen

python_logging.Formatter.converter = lambda *_: time.gmtime(0)
screen.time = types.SimpleNamespace(monotonic=lambda: 0.0)
screen.log_to_screen()
facts = ["ETA 1 min 40 s", "loss 2.3026", "1500 img/s", "epoch 0.40", "input wait 0.3%"]
with screen.SCREEN.doing("compiling the training step"):
  logging.info("This run:\\n  model     ResNet-50\\n  data      of synthetic images")
for step in range(1, 41):
  screen.SCREEN.steps(step, 100, facts, last=True)
  if step % 10 == 0:
    line = "step %d/100  epoch 0.%d  loss 2.3026  top1 1.0%%  1500 img/s  ETA 1 min"
    logging.info(line, step, step)
    screen.SCREEN.steps(step, 100, facts, last=True)
  if step == 20:
    with screen.SCREEN.doing("evaluating val", "batches") as doing:
      for batch in range(12):
        doing.count(batch, 12)
        doing.draw()
      logging.warning("a warning meanwhile")
    logging.info("step 20  eval: top1 50.00%, in 1.0 s")
logging.error("an error")
"""
LINES = [
  "00:00:00 I This run:",
  "  model     ResNet-50",
  "  data      of synthetic images",
  "00:00:00 I step 10/100  epoch 0.10  loss 2.3026  top1 1.0%  1500 img/s  ETA 1 min",
  "00:00:00 I step 20/100  epoch 0.20  loss 2.3026  top1 1.0%  1500 img/s  ETA 1 min",
  "00:00:00 W a warning meanwhile",
  "00:00:00 I step 20  eval: top1 50.00%, in 1.0 s",
  "00:00:00 I step 30/100  epoch 0.30  loss 2.3026  top1 1.0%  1500 img/s  ETA 1 min",
  "00:00:00 I step 40/100  epoch 0.40  loss 2.3026  top1 1.0%  1500 img/s  ETA 1 min",
  "00:00:00 E an error",
]


def wrapped(lines, columns):
  return [line[i : i + columns] for line in lines for i in range(0, len(line), columns)]


@pytest.mark.parametrize("columns", [40, 80, 200])
def test_lines_stay_whole_above_one_row(columns):
  """Made anew by RECORD=1 in the environment; read them, they are what a person sees."""
  written = terminal.run(RUN, columns, {"NO_COLOR": None})
  shown = terminal.rows(written, columns)
  *above, below = shown
  assert [row.rstrip() for row in wrapped(LINES, columns)] == above
  assert below.startswith(" 40% ") and " 40/100" in below and len(below) < columns
  assert "ETA 1 min 40 s" in below and ("loss 2.3026" in below) == (columns > 40)
  assert "evaluating val 11/12 batches, 0.0 s" in written
  assert "compiling the training step, 0.0 s" in written
  assert "\x1b[33m00:00:00 W" in written and "\x1b[31m00:00:00 E" in written
  file = RECORDINGS / f"screen-{columns}.txt"
  if "RECORD" in os.environ:
    file.write_text("\n".join(shown) + "\n")
  assert file.read_text().splitlines() == shown


def test_no_color_is_obeyed():
  written = terminal.run(RUN, 80, {"NO_COLOR": "1"})
  assert "\x1b[3" not in written and "\x1b[K" in written


def test_a_file_has_the_lines_alone():
  ended = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True, check=True)
  assert ended.stderr.splitlines() == LINES and not ended.stdout


@pytest.mark.skipif(not shutil.which("tmux"), reason="tmux is not installed")
def test_through_tmux(tmp_path):
  tmux = ["tmux", "-L", "screen-test", "-f", "/dev/null"]
  script, done = tmp_path / "run.py", tmp_path / "done"
  script.write_text(f"{RUN}\nopen({str(done)!r}, 'w').close()\ntime.sleep(60)\n")
  command = f"PYTHONPATH={os.pathsep.join(filter(None, sys.path))} {sys.executable} {script}"
  subprocess.run([*tmux, "new-session", "-d", "-x", "80", "-y", "30", command], check=True)
  try:
    limit = time.monotonic() + 120
    while not done.exists() and time.monotonic() < limit:
      time.sleep(0.1)
    shown = subprocess.run(
      [*tmux, "capture-pane", "-p"], capture_output=True, text=True, check=True
    ).stdout.rstrip()
  finally:
    subprocess.run([*tmux, "kill-server"], check=False)
  assert shown == (RECORDINGS / "screen-80.txt").read_text().rstrip()


def test_the_row_leaves_out_what_does_not_fit():
  row = screen_lib.progress(450, 1000, FACTS, 40, "utf-8")
  assert row.startswith(" 45% ████") and len(row) <= 40 and "450/1,000" in row
  wide = screen_lib.progress(450, 1000, FACTS, 199, "utf-8")
  assert all(fact in wide for fact in FACTS) and wide.count("█") + wide.count("░") == 40
  assert screen_lib.progress(450, 1000, FACTS, 79, "ascii").count("#") > 4
  assert "100%" in screen_lib.progress(7, 7, [], 20, "utf-8")
  assert len(screen_lib.progress(10**9, 10**9, FACTS, 20, "utf-8")) <= 20


def test_what_takes_long_says_so_in_a_log(monkeypatch, caplog):
  caplog.set_level(logging.INFO, logger="absl")
  monkeypatch.setattr(screen_lib, "_TICK_SECONDS", 0.01)
  monkeypatch.setattr(screen_lib, "_LINE_SECONDS", 0.05)
  with screen_lib.Screen().doing("compiling", "parts") as doing:
    doing.count(1, 2)
    time.sleep(0.5)
  lines = [record.getMessage() for record in caplog.records]
  assert 2 <= len(lines) <= 4  # at 0.05, 0.1, 0.2 and 0.4 s
  assert all(line.startswith("Still compiling 1/2 parts, after 0.") for line in lines)


TRAINER = """
import runpy, sys
sys.argv = ["trainer", *{flags!r}]
runpy.run_module("trainer", run_name="__main__")
"""


def test_a_run_from_its_first_screen_to_its_end(tmp_path):
  flags = trainer(tmp_path / "run", "total_steps=12", "eval.every_steps=4", "log.every_steps=2")[3:]
  written = terminal.run(
    TRAINER.format(flags=flags), 80, {"XLA_FLAGS": ENVIRONMENT["XLA_FLAGS"], "NO_COLOR": "1"}
  )
  shown = terminal.rows(written, 80)
  text = "\n".join(shown)
  starts = [row[9:] for row in shown if re.match(r"\d\d:\d\d:\d\d [IWE] ", row)]
  words = ["I This run:", "I Compiled in ", "I Decoding in "]
  words += [f"I step {step}/12 " for step in range(2, 13, 2)]
  words += [f"I step {step}  epoch " for step in (4, 8, 12)] + ["I Done: ", "I Curves: "]
  for word in words:
    assert sum(start.startswith(word) for start in starts) == 1, f"{word} in\n{text}"
  assert not any("█" in row for row in shown), text  # the row has gone
  for done in ("compiling the training step, ", "restoring checkpoint newest, ", " 4/12  ETA "):
    assert done in written
  assert "evaluating val" in written and "saving checkpoint 12, " in written


LIBRARY = """
import logging as python_logging
from absl import logging
from trainer.reporting import screen
logging.info("before")
with screen.shown():
  logging.info("inside")
  python_logging.getLogger("absl").warning("of a library")
logging.info("after")
python_logging.getLogger().addHandler(python_logging.NullHandler())
with screen.shown():
  logging.info("not wanted")
"""


def test_a_program_without_logging_sees_the_run_and_others_keep_theirs():
  ended = subprocess.run(
    [sys.executable, "-c", LIBRARY], capture_output=True, text=True, check=True
  )
  lines = ended.stderr.splitlines()
  assert len(lines) == 2 and lines[0].endswith(" I inside") and "of a library" in lines[1]


def test_chatter_of_libraries_stays_away():
  keep = screen_lib._HANDLER.filter

  def record(path, level, text="text"):
    return logging.LogRecord("absl", level, path, 1, text, (), (None, None, None))

  assert keep(record("/x/trainer/run.py", logging.INFO))
  assert not keep(record("/x/site-packages/orbax/checkpoint/manager.py", logging.INFO))
  warning = record("/x/site-packages/orbax/checkpoint/manager.py", logging.WARNING)
  assert keep(warning) and warning.exc_info is None
  assert not keep(record("/x/asyncio.py", logging.ERROR, "exception was never retrieved"))


def test_what_libraries_print_by_themselves_goes_nowhere():
  """As Gloo does, from C++, for every pair of hosts."""
  code = "from trainer import streams; streams.protect(); import os; os.write(1, b'Gloo'); print(1)"
  ended = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
  assert ended.stdout == b"1\n" and not ended.stderr


@pytest.mark.usefixtures("python_interrupts")
def test_the_first_interrupt_asks_and_the_second_raises(capsys):
  with preemption.interrupts(lambda: "the compiler") as request:
    assert not request()
    signal.raise_signal(signal.SIGINT)
    assert request() and "SIGINT: stopping after the compiler" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_program_with_a_handler_keeps_it():
  seen = []
  before = signal.signal(signal.SIGINT, lambda *_: seen.append(1))
  try:
    with preemption.interrupts(lambda: "") as request:
      signal.raise_signal(signal.SIGINT)
      assert seen == [1] and not request()
  finally:
    signal.signal(signal.SIGINT, before)
