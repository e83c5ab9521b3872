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
def test_a_batch_that_never_comes(tmp_path, config, monkeypatch):
  """An interrupt saves the state, be it a step or an evaluation that waits for its third batch."""
  original, main = loader.BatchIterator.__next__, threading.main_thread().ident
  made, training = collections.Counter(), True

  def following(self):
    made[self] += 1
    if made[self] == 3 and (self.count > 1000) == training:
      signal.pthread_kill(main, signal.SIGINT)
      threading.Event().wait()
    return original(self)

  monkeypatch.setattr(loader.BatchIterator, "__next__", following)
  monkeypatch.setattr(batches, "STOP_SECONDS", 0.2)
  for step in (2, 10):
    with pytest.raises(Preempted, match=rf"Stopped and saved at step {step} of 10"):
      train_lib.train(config, str(tmp_path))
    training = False
  with pytest.raises(Preempted, match="Stopped during the evaluation"):
    train_lib.evaluate_only(config, str(tmp_path))


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
