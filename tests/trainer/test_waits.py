"""A request to stop that comes while the run waits for something that may never come."""

import collections
import json
import os
import signal
import socket
import threading
import time

import psutil
import pytest

from input_pipeline import batches, loader
from tests.input_pipeline import web
from tests.trainer.shared import ENVIRONMENT, Process, fingerprints, run, running, trainer
from trainer import train as train_lib
from trainer.errors import PREEMPTED, Preempted
from trainer.pod import preemption

PATIENT = (  # far beyond what a test may take
  "data.stream_give_up_seconds=100000",
  "data.stream_timeout_seconds=100000",
  "data.worker_timeout_seconds=100000",
  "pod.lease_seconds=100000",
)
SILENT = 1e6  # seconds before an answer


@pytest.fixture
def silent(shards):
  """A server of the shards, which answers until `delay` is set."""
  with web.Server(shards) as server:
    yield server


@pytest.fixture
def interrupts():
  """Python's own handler of SIGINT, which a process in the background may lack."""
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  yield
  signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("by", ["Ctrl-C", "stop"])
def test_a_batch_that_never_comes(tmp_path, config, monkeypatch, by):
  """A stop saves the state, be it a step or an evaluation that waits for its third batch."""
  original, main = loader.BatchIterator.__next__, threading.main_thread().ident
  made, training, asked = collections.Counter(), True, threading.Event()

  def following(self):
    made[self] += 1
    if made[self] == 3 and (self.count > 1000) == training:
      asked.set() if by == "stop" else signal.pthread_kill(main, signal.SIGINT)
      threading.Event().wait()
    return original(self)

  monkeypatch.setattr(loader.BatchIterator, "__next__", following)
  monkeypatch.setattr(batches, "STOP_SECONDS", 0.2)
  for step in (2, 10):
    with pytest.raises(Preempted, match=rf"Stopped and saved at step {step} of 10"):
      train_lib.train(config, str(tmp_path), asked.is_set)
    training = False
    asked.clear()
  with pytest.raises(Preempted, match="Stopped during the evaluation"):
    train_lib.evaluate_only(config, str(tmp_path), asked.is_set)


@pytest.mark.usefixtures("interrupts")
@pytest.mark.parametrize("mode", [train_lib.train, train_lib.evaluate_only])
def test_a_program_that_stops_a_start_which_waits(tmp_path, config, silent, mode):
  """Its function is asked while a silent server is waited for, and ends the wait."""
  silent.delay = SILENT
  config.data.kind, config.data.path = "auto", silent.url
  config.data.stream_give_up_seconds = config.data.stream_timeout_seconds = 1e5
  start = time.monotonic()
  with pytest.raises(Preempted, match="Stopped before the"):
    mode(config, str(tmp_path), lambda: silent.counts["requests"] > 0)
  assert time.monotonic() - start < 60
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("interrupts")
def test_what_has_nothing_to_save_ends_at_once():
  ended = []
  with preemption.interrupts(lambda: "the start") as request:
    with pytest.raises(Preempted, match="as it was") as stopped, preemption.at_once("as it was"):
      try:
        signal.raise_signal(signal.SIGINT)
        ended.append("no")
      except Exception:  # as a library may have it around anything
        ended.append("swallowed")
      finally:
        ended.append("cleaned up")
    assert ended == ["cleaned up"] and not stopped.value.agreed and request()
    with pytest.raises(Preempted), preemption.at_once("asked before"):
      ended.append("begun")
  with preemption.interrupts(lambda: "a step"):
    with preemption.at_once("over"):
      pass
    signal.raise_signal(signal.SIGINT)
  assert ended == ["cleaned up"]


@pytest.mark.usefixtures("interrupts")
def test_a_function_stops_as_a_signal_does_and_ctrl_c_still_counts():
  asked, ended = threading.Event(), []
  with preemption.interrupts(lambda: "a step", asked.is_set) as request:
    with pytest.raises(Preempted, match="as it was"), preemption.at_once("as it was"):
      try:
        asked.set()
        threading.Event().wait()  # in C: only a signal ends it
      finally:
        time.sleep(0.5)  # nothing is raised here again
        ended.append("cleaned up")
    assert ended and request.reason == "stop" and preemption.requested()
    signal.raise_signal(signal.SIGINT)  # the first one, which is not impatient yet
    with pytest.raises(KeyboardInterrupt):
      signal.raise_signal(signal.SIGINT)
  assert not preemption.requested()


def test_a_function_that_is_asked_outside_of_the_main_thread():
  """There is no signal to end a wait by; batches are not waited for all the same."""
  found = []

  def run():
    with preemption.interrupts(lambda: "", lambda: True), preemption.at_once("not here"):
      while not preemption.requested():
        time.sleep(0.01)
      found.append("asked")

  thread = threading.Thread(target=run)
  thread.start()
  thread.join(60)
  assert found == ["asked"] and not preemption.requested()


def _trainer(workdir, path, *overrides):
  return trainer(workdir, *PATIENT, "data.kind=auto", f"data.path={path}", *overrides)


def _request(server, process, count=1):
  """Return once a process has sent so many more requests."""
  count += server.counts["requests"]
  while server.counts["requests"] < count:
    assert not process.ended, process.log
    time.sleep(0.05)


def _stopped(process, number=signal.SIGTERM):
  process.send(number)
  assert process.finish() == PREEMPTED and "Traceback" not in process.log, process.log


def _saved(process, workdir):
  """Return the step that a stopped run says it has saved, which is its newest checkpoint."""
  step = int(process.log.split("Stopped and saved at step ")[1].split()[0])
  assert max(int(p.name) for p in (workdir / "checkpoints").iterdir()) == step
  return step


@pytest.mark.slow
def test_a_server_that_falls_silent(tmp_path, silent, shards):
  workdir, quiet = tmp_path / "run", tmp_path / "quiet"
  few = (
    "data.stream_lanes=2",
    "data.stream_block=2",
    "data.stream_window=2",
    "optimizer.schedule=constant",
  )
  process = Process(_trainer(workdir, silent.url, *few, "total_steps=100000"), env=ENVIRONMENT)
  process.wait_for("step 2/")
  silent.delay = SILENT
  _stopped(process)
  step = _saved(process, workdir)
  run(1, 1, _trainer(quiet, shards, *few, "data.kind=stream", f"total_steps={step}"))
  assert fingerprints(workdir, step) == fingerprints(quiet, step)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_server_that_is_silent_at_the_start(tmp_path, silent, mode):
  silent.delay = SILENT
  process = Process([*_trainer(tmp_path, silent.url), f"--mode={mode}"], env=ENVIRONMENT)
  _request(silent, process)
  _stopped(process)
  assert "Stopped before the " in process.log


@pytest.mark.slow
def test_a_bucket_of_a_workdir_that_is_silent_at_the_start():
  with socket.create_server(("127.0.0.1", 0)) as server:
    address = {"STORAGE_EMULATOR_HOST": f"http://127.0.0.1:{server.getsockname()[1]}"}
    process = Process(trainer("gs://bucket/run"), env=ENVIRONMENT | address)
    connection, _ = server.accept()
    with connection:
      _stopped(process)
  assert "Stopped before the first step" in process.log


@pytest.mark.slow
def test_a_server_that_falls_silent_on_several_hosts(tmp_path, silent):
  command = _trainer(tmp_path, silent.url, "data.stream_lanes=2", "total_steps=100000")
  with running(2, 1, command) as pod:
    pod.wait_for("step 2/")
    silent.delay = SILENT
    _stopped(pod)
  assert pod.codes() == {0: PREEMPTED, 1: PREEMPTED}
  _saved(pod, tmp_path)


@pytest.mark.slow
def test_a_server_that_is_silent_at_the_start_and_a_stop_of_one_of_two_hosts(tmp_path, silent):
  silent.delay = SILENT
  with running(2, 1, _trainer(tmp_path, silent.url)) as pod:
    _request(silent, pod, count=2)
    os.kill(pod.pids()[1], signal.SIGTERM)
    assert pod.finish() == PREEMPTED and "Traceback" not in pod.log, pod.log
  assert pod.codes() == {0: PREEMPTED, 1: PREEMPTED}


HUNG_ON_HOST_1 = """
import os, pathlib, threading
from input_pipeline import loader
from tests.trainer import tiny

original, made = loader.BatchIterator.__next__, {{}}

def following(self):
  at = made[id(self)] = made.get(id(self), -1) + 1
  if (self.count > 1000) == {training} and at == {number}:
    pathlib.Path({mark!r}).touch()
    threading.Event().wait()
  return original(self)

if os.environ["JAX_PROCESS_ID"] == "1":
  loader.BatchIterator.__next__ = following

get_config = tiny.get_config
"""


@pytest.mark.slow
@pytest.mark.parametrize("training, number", [(True, 25), (False, 1)])
def test_a_stop_of_one_host_while_the_input_of_the_other_hangs(tmp_path, training, number):
  """Host 1 gets no signal: it learns of the stop of host 0, which waits for it in a step."""
  mark, file, workdir, quiet = (tmp_path / n for n in ("mark", "mine.py", "run", "quiet"))
  file.write_text(HUNG_ON_HOST_1.format(training=training, number=number, mark=str(mark)))
  overrides = *PATIENT, "total_steps=40", "pod.timeout_seconds=100", "pod.stuck_seconds=1000"
  with running(2, 1, trainer(workdir, *overrides, config=file)) as pod:
    while not mark.exists():
      assert not pod.ended, pod.log
      time.sleep(0.05)
    time.sleep(1)  # host 0 is in the collectives of the step
    start = time.monotonic()
    os.kill(pod.pids()[0], signal.SIGTERM)
    assert pod.finish() == PREEMPTED and "Traceback" not in pod.log, pod.log
    assert time.monotonic() - start < 30  # what a machine has that is taken away
  assert pod.codes() == {0: PREEMPTED, 1: PREEMPTED}
  assert _saved(pod, workdir) == (25 if training else 40)
  run(2, 1, trainer(quiet, *overrides))
  run(2, 1, trainer(workdir, *overrides))  # to the end
  assert fingerprints(workdir, 40) == fingerprints(quiet, 40)


@pytest.mark.slow
def test_an_evaluation_whose_server_falls_silent(tmp_path, silent):
  command = _trainer(tmp_path, silent.url, "data.stream_lanes=2")
  assert "Done" in run(1, 1, command)
  process = Process([*command, "--mode=eval"], env=ENVIRONMENT)
  process.wait_for("Resuming from checkpoint")
  silent.delay = SILENT
  _request(silent, process)
  _stopped(process)
  assert "Stopped during the evaluation" in process.log and not (tmp_path / "eval.json").exists()


@pytest.mark.slow
def test_a_decoding_process_that_hangs(tmp_path, shards):
  process = Process(
    _trainer(tmp_path, shards, "data.workers=1", "total_steps=100000"), env=ENVIRONMENT
  )
  process.wait_for("step 2/")
  for child in psutil.Process(process.pid).children():
    if "spawn_main" in " ".join(child.cmdline()):
      child.suspend()
  _stopped(process)
  _saved(process, tmp_path)


@pytest.mark.slow
def test_the_owner_of_the_workdir_may_be_gone(tmp_path):
  owner = {"token": "x", "host": "another", "machine": "another", "pid": 1, "started": "1"}
  (tmp_path / "owner.json").write_text(json.dumps(owner))
  process = Process(trainer(tmp_path, *PATIENT), env=ENVIRONMENT)
  process.wait_for("was in use by process 1 of another")
  _stopped(process, signal.SIGINT)
  assert json.loads((tmp_path / "owner.json").read_text()) == owner
