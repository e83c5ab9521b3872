"""A workdir in a bucket, on a loopback server: what a run writes, and what a refusal does."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import time
import types

from etils import epath
import jax
import numpy as np
from orbax import checkpoint as ocp
from orbax.checkpoint._src.serialization import tensorstore_utils
import pytest

from tests.trainer import bucket_server, tiny
from tests.trainer.shared import ENVIRONMENT, Process, StopAt, fingerprints, run, running, trainer
from tests.trainer.test_curves import READERS, check, draw, live
from trainer import program as program_lib
from trainer import train as train_lib
from trainer.errors import (
  FAILED,
  HOST_LOST,
  PREEMPTED,
  CheckpointError,
  ConfigError,
  Preempted,
  StorageError,
)
from trainer.pod.pod import Pod
from trainer.reporting import events, json_lines, report
from trainer.workdir import files, lease, saved, storage
from trainer.workdir.checkpoint import Checkpointer

ALONE = Pod(tiny.get_config().pod)
ANY_WRITE = "^(POST|PUT)"
OF_ARRAYS = "^POST .*(ocdbt|manifest)"  # written by TensorStore


@pytest.fixture
def workdir(server, request):
  server.answer()
  yield storage.path_of(f"gs://bucket/{request.node.name.replace('[', '-').replace(']', '')}")
  server.answer()


@pytest.fixture(scope="module")
def program():
  config = tiny.get_config()
  config.data.kind, config.checkpoint.keep_last, config.checkpoint.retry_seconds = (
    "synthetic",
    2,
    0.1,
  )
  return config, program_lib.build(config, num_examples=64)


def objects(folder):
  return {
    f"{root}/{name}".removeprefix(f"{folder}".removeprefix("gs://")).removeprefix("/")
    for root, _, names in folder.walk()
    for name in names
  }


def folders(workdir):
  return {name.split("/")[0] for name in objects(workdir / "checkpoints")}


def open_checkpointer(workdir, program):
  return Checkpointer(ALONE, workdir, program[0], every_steps=0)


def make_state(program, step):
  state = jax.jit(program[1].init)()
  return jax.tree.map(lambda x: x if x.dtype == np.int32 else x + np.float32(step), state)


META = {"best": None, "wall_seconds": {}}


def save(checkpointer, program, *steps):
  for step in steps:
    checkpointer.save_and_wait(step, make_state(program, step), META)


def whole(workdir):
  return sorted(ocp.utils.checkpoint_steps(workdir / "checkpoints"))


def test_a_run_leaves_everything_in_the_bucket_in_the_bits_of_a_disk(
  workdir, tmp_path, config, capsys
):
  config.total_steps, config.checkpoint.every_steps, config.checkpoint.keep_last = 12, 6, 1
  with pytest.raises(Preempted):
    train_lib.train(config, str(workdir), StopAt(9))
  final = train_lib.train(config, str(workdir))
  train_lib.train(config, str(tmp_path))
  assert fingerprints(workdir, 12) == fingerprints(epath.Path(tmp_path), 12)
  assert {p.name for p in workdir.iterdir()} == {
    "checkpoints",
    "classes.json",
    "config.json",
    "data.json",
    "events",
    "final.json",
    "metrics.jsonl",
    "environment.json",
    "overview.txt",
    "report.html",
    "samples.json",
    "starts.json",
  }
  assert whole(workdir) == [12]
  assert json.loads((workdir / "final.json").read_text()) == final
  assert json.loads((workdir / "config.json").read_text())["total_steps"] == 12
  assert list(events.read_scalars(str(workdir / "events"))["train/loss"][0]) == list(range(1, 13))
  assert train_lib.train(config, str(workdir)) == final
  assert train_lib.evaluate_only(config, str(workdir))["top1"] == pytest.approx(final["top1"])
  assert report.main([str(workdir)]) == 0
  assert capsys.readouterr().out.strip() == f"{workdir}/report.html"
  page = (workdir / "report.html").read_text()
  assert 'id="curves"' in page and page.count("data:image/jpeg;base64") == config.global_batch_size


def test_newest_and_best_stay(workdir, program):
  checkpointer = open_checkpointer(workdir, program)
  checkpointer.set_best(1)
  save(checkpointer, program, 1, 2, 3, 4)
  checkpointer.close()
  assert whole(workdir) == [1, 3, 4]
  assert folders(workdir) == {"1", "3", "4"}


def test_a_save_that_was_killed_is_no_checkpoint(workdir, program):
  checkpointer = open_checkpointer(workdir, program)
  save(checkpointer, program, 1, 2)
  checkpointer.close()
  (workdir / "checkpoints" / "2" / "commit_success.txt").unlink()  # the last object of a save
  assert whole(workdir) == [1]
  checkpointer = open_checkpointer(workdir, program)
  assert checkpointer.restore_newest(program[1].abstract_state)[1]["step"] == 1
  save(checkpointer, program, 3)  # which waits until what is torn is removed
  assert folders(workdir) == {"1", "3"}
  assert checkpointer.restore_newest(program[1].abstract_state)[1]["step"] == 3
  assert not (workdir / "damaged").exists()
  checkpointer.close()


def test_damaged_checkpoints_are_set_aside(workdir, program):
  checkpointer = open_checkpointer(workdir, program)
  checkpointer.set_best(1)
  save(checkpointer, program, 1, 2, 3)
  checkpointer.close()
  flipped, lost = (
    max(
      (
        workdir / "checkpoints" / step / name
        for name in objects(workdir / "checkpoints" / step)
        if "/d/" in name
      ),
      key=lambda path: path.stat().length,
    )
    for step in ("2", "3")
  )
  data = bytearray(flipped.read_bytes())
  data[len(data) // 2] ^= 1
  flipped.write_bytes(bytes(data))
  lost.unlink()
  before = {step: objects(workdir / "checkpoints" / step) for step in ("2", "3")}
  checkpointer = open_checkpointer(workdir, program)
  state, meta = checkpointer.restore_newest(program[1].abstract_state)
  assert meta["step"] == 1
  jax.tree.map(np.testing.assert_array_equal, state.params, make_state(program, 1).params)
  assert {
    aside.name.split("-")[0]: objects(aside) for aside in (workdir / "damaged").iterdir()
  } == before
  assert whole(workdir) == [1] and folders(workdir) == {"1"}
  save(checkpointer, program, 2)
  assert whole(workdir) == [1, 2]
  checkpointer.close()


def test_a_server_that_is_busy_for_a_while_delays_a_save(server, workdir, program, caplog):
  checkpointer = open_checkpointer(workdir, program)
  save(checkpointer, program, 1)
  server.refuse(OF_ARRAYS, 503)
  checkpointer.save(2, make_state(program, 2), META)
  while len(server.refused()) < 5:
    time.sleep(0.1)
  checkpointer.poll()
  assert whole(workdir) == [1]
  server.answer()
  checkpointer.poll(wait=True)
  assert whole(workdir) == [1, 2] and "could not be saved" not in caplog.text
  assert checkpointer.restore_newest(program[1].abstract_state)[1]["step"] == 2
  checkpointer.close()


def test_a_server_that_is_busy_for_longer_fails_the_save_which_is_tried_again(
  server, workdir, program, monkeypatch, caplog
):
  for context in (tensorstore_utils._BASE_TS_CONTEXT, tensorstore_utils._DEFAULT_OCDBT_TS_CONTEXT):
    assert context["gcs_request_retries"] == storage._RETRIES
    monkeypatch.setitem(context, "gcs_request_retries", {"max_retries": 1})
  checkpointer = open_checkpointer(workdir, program)
  save(checkpointer, program, 1)
  server.refuse(OF_ARRAYS, 503)
  checkpointer.save(2, make_state(program, 2), META)
  checkpointer.poll(wait=True)
  assert (
    "step 2 could not be saved" in caplog.text
    and "newest whole checkpoint is that of step 1" in caplog.text
  )
  time.sleep(0.2)
  assert (
    checkpointer.wanted() and (workdir / "checkpoints" / "2").exists() and whole(workdir) == [1]
  )
  # Writers of step 2 that have not given up yet must not succeed behind the back of the test.
  late = "^POST .*checkpoints%2F2%2F"
  server.refuse(f"/b/bucket[?]|{late}", 503)
  monkeypatch.setattr(storage, "_PROBE_SECONDS", 0.5)
  checkpointer.save(3, make_state(program, 3), META)
  assert "step 3 could not be saved (bucket bucket cannot be reached" in caplog.text
  with pytest.raises(
    CheckpointError, match=r"checkpoint of step 4 could not be written .* is that of step 1"
  ):
    save(checkpointer, program, 4)
  server.refuse(late, 503)
  save(checkpointer, program, 4)
  assert whole(workdir) == [1, 4] and folders(workdir) == {"1", "4"}
  # One that succeeds after Orbax has removed the rest leaves nothing either.
  server.answer()
  (workdir / "checkpoints" / "2" / "params" / "manifest.ocdbt").write_bytes(b"late")
  save(checkpointer, program, 5)
  assert whole(workdir) == [4, 5] and folders(workdir) == {"4", "5"}
  checkpointer.close()


CODES = {403: FAILED, 503: HOST_LOST}  # by the answers of a bucket


@pytest.fixture
def impatient(monkeypatch):
  """Requests of gcsfs and of the lease that are retried at once, or for half a second."""
  import gcsfs.retry

  monkeypatch.setattr(gcsfs.retry, "random", types.SimpleNamespace(random=lambda: -100.0))
  monkeypatch.setattr(lease, "_REQUEST_SECONDS", 0.5)
  monkeypatch.setattr(storage, "_PROBE_SECONDS", 0.5)


@pytest.mark.usefixtures("impatient")
def test_a_bucket_that_cannot_be_read_sets_nothing_aside(server, workdir, program):
  checkpointer = open_checkpointer(workdir, program)
  save(checkpointer, program, 1, 2)
  checkpointer.close()
  checkpointer = open_checkpointer(workdir, program)
  server.refuse("^GET .*checkpoints.*(ocdbt|manifest)", 403)
  for which in ("newest", "2"):
    with pytest.raises(StorageError, match=r"checkpoints/2 cannot be read .*mend that") as raised:
      checkpointer.restore(program[1].abstract_state, which)
    assert raised.value.exit_code == FAILED
  for status, code in CODES.items():
    server.refuse("^GET .*checkpoints", status)
    with pytest.raises(StorageError, match=r"cannot be read .*the same command again") as raised:
      open_checkpointer(workdir, program)
    assert raised.value.exit_code == code
    with pytest.raises(StorageError, match="cannot be read") as raised:
      checkpointer.restore(program[1].abstract_state, "best")
    assert raised.value.exit_code == code
  server.answer()
  assert whole(workdir) == [1, 2] and not (workdir / "damaged").exists()
  checkpointer.close()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
  "name, match, status, words, code",
  [
    ("gs://no-such-bucket/run", "^$", 200, "there is no bucket no-such-bucket", FAILED),
    (
      "gs://bucket/run",
      "/b/bucket[?]",
      403,
      "closed to these credentials, which need storage.buckets.get",
      FAILED,
    ),
    ("gs://bucket/run", ANY_WRITE, 403, "cannot be written by host 0 (OSError: Forbidden", FAILED),
    ("gs://bucket/run", ANY_WRITE, 503, "cannot be written by host 0 (HttpError", HOST_LOST),
    ("gs://bucket/run", "/b/bucket[?]", 503, "bucket bucket cannot be reached", HOST_LOST),
    ("gs://B/run", "^$", 200, "neither a folder nor gs://BUCKET/FOLDER", FAILED),
    ("gs://bucket/a::b", "^$", 200, "holds '::', which fsspec joins two URLs by", FAILED),
    ("s3://bucket/run", "^$", 200, "neither a folder nor gs://BUCKET/FOLDER", FAILED),
  ],
)
def test_a_bucket_that_cannot_be_used_is_one_sentence(
  server, config, name, match, status, words, code
):
  server.refuse(match, status)
  with pytest.raises((ConfigError, StorageError)) as refusal:
    train_lib.train(config, name)
  server.answer()
  assert refusal.value.exit_code == code
  assert (
    words in str(refusal.value) and name in str(refusal.value) and "\n" not in str(refusal.value)
  )


def test_a_silent_server_is_not_waited_for(server, config, monkeypatch):
  monkeypatch.setattr(storage, "_PROBE_SECONDS", 0.5)
  with socket.create_server(("127.0.0.1", 0)) as silent:
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{silent.getsockname()[1]}")
    with pytest.raises(StorageError, match="bucket bucket cannot be reached") as refusal:
      train_lib.train(config, "gs://bucket/run")
    assert refusal.value.exit_code == HOST_LOST


def test_a_missing_extra_is_named(config, monkeypatch):
  find_spec = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda name: None if name == "gcsfs" else find_spec(name)
  )
  with pytest.raises(ConfigError, match=r"gcsfs is missing; run: pip install -e '\.\[gcs\]'"):
    train_lib.train(config, "gs://bucket/run")


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("status", CODES)
def test_small_files_that_cannot_be_written_or_read(server, workdir, status, caplog):
  path = workdir / "final.json"
  files.write_json(path, {})
  path.with_name("broken.json").write_text("{")
  curves = workdir / "metrics.jsonl"
  curves.write_text("")

  def owned():
    with lease.hold(workdir / "owner.json", workdir, seconds=60):
      pass

  writing = {
    r"final\.json could not be written": lambda: files.write_json(path, {}),
    r"owner\.json could not be written": owned,
    r"broken\.json could not be set aside": lambda: files.read_json(
      path.with_name("broken.json"), set_aside=True
    ),
  }
  reading = {
    r"final\.json could not be read": lambda: files.read_json(path),
    r"metrics\.jsonl could not be read": json_lines.Tail(curves).read,
    r"config\.json cannot be read": lambda: saved.get_config(str(workdir)),
  }
  for kind, calls in {ANY_WRITE: writing, "^GET": reading}.items():
    server.refuse(kind, status)
    for words, call in calls.items():
      with pytest.raises(StorageError, match=rf"{words} .*run the same command again\.") as raised:
        call()
      assert raised.value.exit_code == CODES[status], words
      assert ("mend that" in str(raised.value)) == (status == 403) and "\n" not in str(raised.value)
  server.refuse(ANY_WRITE, status)
  files.write_json(path, {}, needed=False)
  assert "final.json could not be written" in caplog.text


def test_curves_that_cannot_be_written_do_not_end_a_run(server, workdir, monkeypatch, caplog):
  monkeypatch.setattr(events, "_RETRY_SECONDS", 0.0)
  writer = events.EventWriter(str(workdir))
  server.refuse(ANY_WRITE, 403)
  writer.write_scalars(1, {"x": 1.0})
  writer.flush()
  assert "could not be written" in caplog.text and server.refused()
  server.answer()
  writer.write_scalars(2, {"x": 2.0})
  writer.close()
  assert list(events.read_scalars(str(workdir))["x"][0]) == [1, 2]


def test_curves_of_a_run_that_was_killed_twice(workdir, tmp_path):
  lives = [(0, 110), (100, 120), (50, 150)]
  for value, life in enumerate(lives):
    live(workdir, *life, float(value))
  found = list((workdir / "events").iterdir())
  assert len(found) == len(lives)
  for path in found:
    (tmp_path / path.name).write_bytes(path.read_bytes())
  check(draw(str(workdir / "events"), "report"), lives)
  for reader in READERS:
    check(draw(tmp_path, reader), lives)


def test_older_curves_that_cannot_be_read_do_not_end_a_run(server, workdir, monkeypatch, caplog):
  monkeypatch.setattr(events, "_RETRY_SECONDS", 0.0)
  live(workdir, 0, 60, 0.0)
  now = time.time
  monkeypatch.setattr(events.time, "time", lambda: now() + 2)  # no two starts within a second
  server.refuse("^GET", 403)
  live(workdir, 50, 70, 1.0)
  server.answer()
  assert server.refused() and "could not be listed" in caplog.text
  assert "step 50 may be drawn twice" in caplog.text
  steps, values, _ = events.read_scalars(str(workdir / "events"))["train/loss"]
  assert list(steps) == list(range(1, 71)) and set(values[50:]) == {1.0}


IMPATIENT = """
import types

from tests.trainer import tiny
from trainer.reporting import events
from trainer.workdir import files, storage

storage._PROBE_SECONDS, storage._RETRIES = 0.5, {"max_retries": 1}
storage.path_of("gs://bucket/run")
import gcsfs.retry

gcsfs.retry.random = types.SimpleNamespace(random=lambda: -100.0)  # no pauses

get_config = tiny.get_config
"""


def test_a_server_that_is_gone_for_good_ends_the_run_after_its_last_step(tmp_path):
  (tmp_path / "config.py").write_text(IMPATIENT)
  command = trainer(
    "gs://bucket/run",
    "total_steps=600",
    "log.every_steps=100",
    "checkpoint.every_steps=200",
    "checkpoint.retry_seconds=2",
    config=tmp_path / "config.py",
  )
  with (
    bucket_server.serving(tmp_path) as server,
    subprocess.Popen(
      command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT | server.environment
    ) as process,
  ):
    log = ""
    for line in process.stderr:
      log += line
      if "step 300/" in line:
        server.process.kill()
        break
    log += process.communicate(timeout=300)[1]
  assert process.returncode == HOST_LOST, log
  assert "could not be saved" in log and "Training goes on" in log and "step 600/600" in log
  assert "Traceback" not in log
  assert (
    "The checkpoint of step 600 could not be written to gs://bucket/run/checkpoints"
    in log.splitlines()[-1]
  )


@pytest.mark.slow
@pytest.mark.parametrize("status", CODES)
def test_a_stop_that_a_bucket_does_not_let_save(server, workdir, tmp_path, status):
  """A rerun mends one that is busy, and not one that refuses to be written."""
  (tmp_path / "config.py").write_text(IMPATIENT)
  overrides = "total_steps=100000", "log.every_steps=10", "optimizer.schedule=constant"
  command = trainer(workdir, *overrides, config=tmp_path / "config.py")
  process = Process(command, env=ENVIRONMENT)
  process.wait_for("step 20/")
  server.refuse(ANY_WRITE, status)
  process.send(signal.SIGTERM)
  assert process.finish() == CODES[status], process.log
  last = process.log.splitlines()[-1]
  assert "Traceback" not in process.log and "There is no whole checkpoint" in last
  assert ("Mend that" in last) == (status == 403) and last.endswith("the same command again.")
  server.answer()
  process = Process(command, env=ENVIRONMENT)
  process.wait_for("step 20/")
  process.send(signal.SIGTERM)
  assert process.finish() == PREEMPTED, process.log


def test_a_wrong_bucket_on_the_command_line(server):
  result = subprocess.run(
    trainer("gs://no-such-bucket/run"), capture_output=True, text=True, env=ENVIRONMENT, timeout=60
  )
  assert result.returncode == FAILED and "Traceback" not in result.stderr
  assert "there is no bucket no-such-bucket" in result.stderr.splitlines()[-1]


def test_two_hosts_are_stopped_and_one_goes_on(workdir):
  command = trainer(workdir, "total_steps=200", "log.every_steps=10", "checkpoint.every_steps=100")
  with running(2, 1, command) as pod:
    pod.wait_for("step 20/")
    os.kill(pod.pids()[1], signal.SIGTERM)
    assert pod.finish() == PREEMPTED, pod.log
  saved = int(pod.log.split("Stopped and saved at step ")[1].split()[0])
  assert whole(workdir)[-1] == saved
  assert f"Resuming from checkpoint {saved} of 200" in run(1, 1, command)
  assert json.loads((workdir / "final.json").read_text())["step"] == 200
