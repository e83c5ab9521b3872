"""What goes wrong around a run and must neither change its result nor its exit code."""

import json
import signal
import subprocess
import sys
import time

import pytest

from tests.trainer import tiny
from tests.trainer.shared import ENVIRONMENT, Process, StopAt, trainer
from trainer import train as train_lib
from trainer.errors import DONE, FAILED, PREEMPTED, ConfigError, Preempted


@pytest.fixture
def config():
  config = tiny.get_config()
  config.data.kind, config.total_steps = "synthetic", 4
  return config


# Streams that are closed, full, or whose reader is gone.
STREAMS = {
  "closed": ">&- 2>&-",
  "closed input as well": "<&- >&- 2>&-",
  "full": "> /dev/full 2>&1",
  "broken pipe": "2>&1 | true",
}


@pytest.mark.parametrize("redirection", STREAMS.values(), ids=STREAMS.keys())
def test_streams_that_cannot_be_written_change_nothing(tmp_path, redirection):
  workdir = tmp_path / "run"
  words = " ".join(f"'{word}'" for word in trainer(workdir, "total_steps=4"))
  script = f"set -o pipefail; {words} {redirection}"
  code = subprocess.run(["bash", "-c", script], env=ENVIRONMENT, timeout=240).returncode
  assert code == DONE
  assert json.loads((workdir / "final.json").read_text())["step"] == 4


def test_a_stop_that_cannot_be_printed_saves_all_the_same(tmp_path):
  with (
    open("/dev/full", "w") as full,
    subprocess.Popen(
      trainer(tmp_path, "total_steps=100000"), stdout=full, stderr=full, env=ENVIRONMENT
    ) as process,
  ):
    _wait_for(tmp_path / "starts.json", process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(240) == PREEMPTED


def test_a_closed_terminal_saves_and_leaves(tmp_path):
  # Where the tests run under nohup, the signal is ignored in what they start.
  heed = (
    "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_DFL);"
    "os.execv(sys.argv[1], sys.argv[1:])"
  )
  command = [sys.executable, "-c", heed, *trainer(tmp_path, "total_steps=100000")]
  process = Process(command, env=ENVIRONMENT)
  process.wait_for("step 2/")
  process.send(signal.SIGHUP)
  assert process.finish() == PREEMPTED
  assert "SIGHUP: stopping after this step" in process.log
  assert [path.name.isdigit() for path in (tmp_path / "checkpoints").iterdir()] == [True]


def test_nohup_ignores_a_closed_terminal(tmp_path):
  command = ["nohup", *trainer(tmp_path, "total_steps=60")]
  process = Process(command, env=ENVIRONMENT, stdin=subprocess.DEVNULL)
  process.wait_for("step 2/")
  process.send(signal.SIGHUP)
  assert process.finish() == DONE


@pytest.mark.parametrize("content", ["", '{"first_start": 17', "[]", '{"starts": "three"}', "\0\0"])
def test_damaged_starts_end_no_run(tmp_path, config, caplog, content):
  _stopped(config, tmp_path)
  (tmp_path / "starts.json").write_text(content)
  final = train_lib.train(config, str(tmp_path))
  assert final["step"] == 4 and "starts.json is damaged" in caplog.text
  # By the newest checkpoint, which holds them as well.
  assert final["goodput"]["starts"] == 2
  assert (tmp_path / "starts.json.damaged").read_text() == content


@pytest.mark.parametrize("content", ["", '{"top1": 0.', "null", '{"top1": 0.5}'])
def test_a_damaged_result_is_made_anew(tmp_path, config, caplog, content):
  first = train_lib.train(config, str(tmp_path))
  (tmp_path / "final.json").write_text(content)
  again = train_lib.train(config, str(tmp_path))
  assert "final.json is damaged" in caplog.text
  for name in ("step", "top1", "loss", "examples", "best"):
    assert again[name] == first[name] == json.loads((tmp_path / "final.json").read_text())[name]


def test_a_report_of_a_damaged_workdir(tmp_path, config):
  train_lib.train(config, str(tmp_path))
  (tmp_path / "final.json").write_text('{"top1":')
  done = subprocess.run(
    [sys.executable, "-m", "trainer.report", tmp_path], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stderr
  assert "final.json is damaged" in done.stderr
  assert (tmp_path / "final.json").read_text() == '{"top1":'  # a reader moves nothing


def test_a_finished_run_keeps_the_config_of_its_result(tmp_path, config, caplog):
  final = train_lib.train(config, str(tmp_path))
  written = (tmp_path / "config.json").read_text()
  config.data.eval_resize = 20
  assert train_lib.train(config, str(tmp_path)) == final
  assert (tmp_path / "config.json").read_text() == written
  assert "config.data.eval_resize: 16 -> 20" in caplog.text and "--mode=eval" in caplog.text


def test_config_json_lists_the_starts_with_their_differences(tmp_path, config):
  _stopped(config, tmp_path)
  config.log.every_steps = 2
  train_lib.train(config, str(tmp_path))
  starts = json.loads((tmp_path / "starts.json").read_text())["history"]
  assert starts[0]["step"] == 0 < starts[1]["step"] and len(starts) == 2
  assert starts[1]["changes"] == {"log.every_steps": [1, 2]} and "changes" not in starts[0]


WRONG = {
  "config.model.depth=14": "config.model.depth=14",
  "train": "'train'",
  "--config.total_epochs=nan": "config.total_epochs must be a finite number; it is nan",
  "--config.optimizer.lr_per_256=inf": "config.optimizer.lr_per_256 must be a finite number",
  "--config.data.crop_area=(0.1,1e999)": "config.data.crop_area must hold finite numbers",
}


@pytest.mark.parametrize("word", WRONG)
def test_words_that_slip_through_nowhere(tmp_path, word):
  assert WRONG[word] in _refusal([*trainer(tmp_path), word])


RAISING = {
  "x = 1 / 0": "line 2: ZeroDivisionError: division by zero",
  "import nothing_of_this_name": "line 2: ModuleNotFoundError: No module named",
  "def get_config(:": "line 2: SyntaxError: ",
  "def get_config():\n  raise KeyError('depth')": "line 3: KeyError: 'depth'",
  "get_config = None": "defines no function get_config",
  "def get_config(): return 3": "get_config() returned int",
}


@pytest.mark.parametrize("code", RAISING)
def test_a_run_file_that_raises_is_named_with_its_line(tmp_path, code):
  file = tmp_path / "mine.py"
  file.write_text(f"# a run file\n{code}\n")
  command = [word for word in trainer(tmp_path / "run", config=file) if "--config." not in word]
  said = _refusal(command)
  assert "mine.py" in said and RAISING[code] in said


def test_a_profile_that_cannot_happen_is_refused(tmp_path, config):
  config.log.profile_step = 3
  config.log.profile_steps = 5
  with pytest.raises(ConfigError, match=r"config\.log\.profile_step .* only 4 steps"):
    train_lib.train(config, str(tmp_path))


def _refusal(command):
  """Return what a command prints that is refused."""
  process = Process(command, env=ENVIRONMENT)
  assert process.finish() == FAILED and "Traceback" not in process.log, process.log
  return process.log


def _stopped(config, workdir):
  """Train one step and stop."""
  with pytest.raises(Preempted):
    train_lib.train(config, str(workdir), StopAt(2))


def _wait_for(path, process):
  until = time.monotonic() + 120
  while not path.exists():
    assert process.poll() is None and time.monotonic() < until
    time.sleep(0.1)
