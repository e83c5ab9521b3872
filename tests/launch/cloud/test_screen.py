"""What is shown of a run: the same facts on a terminal, in plain lines and as JSON."""

import io
import json

from launch.cloud.run import Run
from launch.cloud.screen import Screen, View
from launch.cloud.settings import Place, Settings
from launch.cloud.world import Action, Memory, Node, Queued, Report, World

LINE = (
  "step 1200/112590  epoch 0.96  loss 6.1234  top1 1.0%  lr 0.1  grad 1.5  "
  "23456 img/s (367 per device)  MFU 31.0%"
  "  step 50.0 ms (p99 60.0)  input wait 0.1%  ETA 1 h 33 min"
)


class Terminal(io.StringIO):
  def isatty(self):
    return True


def view(doing="training", step=1200, **changes):
  settings = Settings(
    Place("r50", "p", "us-west4-a", "gs://b"),
    "me",
    "v5litepod-64",
    capacity="spot",
    dollars_per_chip_hour=0.5,
    max_seconds=12 * 3600,
  )
  memory = Memory(attempt=2, hosts=16, slices=[[0.0, 60.0], [100.0, 160.0]], step=1200)
  world = World(
    1e9,
    Queued("ACTIVE"),
    (Node("r50", "READY", hosts=16, maintenance="SCHEDULED at noon"),),
    (Report(0, 0, 2, "running", step=step, total=112590, progress=LINE),),
  )
  run = Run(settings, memory)
  run.event("start: attempt 2", 1e9)
  return View.of(run, World(**(vars(world) | changes)), Action("wait", doing))


def test_all_that_is_known_is_shown():
  seen = view()
  text = "\n".join(seen.block())
  for words in (
    "r50: 1 x v5litepod-64 spot, us-west4-a",
    "ACTIVE; 1 of 16 hosts answer",
    "r50 READY HEALTHY",
    "announced: SCHEDULED at noon",
    "2: training",
    "step 1,200 of 112,590 (1.1%)",
    "loss 6.1234",
    "23,456 img/s",
    "ETA 1 h 33 min",
    "goodput 50%",
    "2 min of 12 h 00 min, 2.1 chip-hours, $1.07",
    "start: attempt 2",
  ):
    assert words in text
  for words in ("attempt 2", "step 1,200 of 112,590", "loss 6.1234", "goodput 50%", "$1.07"):
    assert words in seen.summary()
  assert json.loads(json.dumps(seen.to_json()))["images_per_second"] == 23456


def test_nothing_is_made_up():
  seen = view(reports=(), nodes=(), queued=None)
  assert seen.loss is None and seen.goodput is None and seen.step == 1200
  assert "none" in seen.block()[1]


def test_when_hosts_are_silent_the_bucket_shows_them():
  beat = {
    "slice": 0,
    "worker": 0,
    "attempt": 2,
    "step": 1300,
    "total": 112590,
    "progress": LINE,
    "now": 1e9,
    "code": None,
  }
  assert view(reports=(), heartbeat=beat).step == 1300


def test_a_terminal_is_drawn_again_in_place_and_the_log_is_plain(tmp_path):
  output, log = Terminal(), tmp_path / "folder" / "log"
  screen = Screen(log, output=output)
  screen.show(view())
  height = len(view().block())
  screen.show(view(step=1300))
  assert f"\x1b[{height}F\x1b[J" in output.getvalue()
  screen.lines(["something happened"], 1e9)
  assert output.getvalue().count("something happened") == 1
  assert "\x1b" not in log.read_text() and len(log.read_text().splitlines()) == 3


def test_ages_alone_are_no_news():
  output = io.StringIO()
  screen = Screen(output=output)
  for seconds in ("5 s", "61 s", "2 min", "1 h 05 min"):
    screen.show(view(doing=f"in the queue for {seconds}"))
  screen.show(view(doing="training"))
  assert len(output.getvalue().splitlines()) == 2


def test_json_is_one_object_a_line():
  output = io.StringIO()
  screen = Screen(as_json=True, output=output)
  screen.show(view())
  screen.lines(["a", "b"])
  first, second = map(json.loads, output.getvalue().splitlines())
  assert first["step"] == 1200 and second["message"] == "a\nb"
