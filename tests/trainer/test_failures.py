"""A failure of input, memory or a library: the last good state is saved, all leave alike."""

import errno
import json
import multiprocessing
import os
import shutil

import numpy as np
import pytest
import simplejpeg

from input_pipeline import loader
from input_pipeline.errors import DataError, InputLost, UnusableData
from tests.trainer import tiny
from tests.trainer.shared import fingerprints, run, trainer
from tests.trainer.test_data import images
from trainer import train as train_lib
from trainer.errors import FAILED, HOST_LOST, RunFailed, exit_code
from trainer.reporting import events
from trainer.workdir import storage


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
  return str(tmp_path_factory.mktemp("compiled"))


@pytest.fixture
def config(compiled):
  config = tiny.get_config()
  config.data.kind, config.total_steps, config.compilation_cache = "synthetic", 6, compiled
  return config


@pytest.fixture
def fail_at(monkeypatch):
  """Make the loaders raise at their batch of this number, counted from 0 in each loader."""
  original = loader.BatchIterator.__next__

  def patch(number, error, training=True):
    made = {}

    def following(self):
      at = made[id(self)] = made.get(id(self), -1) + 1
      if at == number and (self.count > 1000) == training:
        raise error
      return original(self)

    monkeypatch.setattr(loader.BatchIterator, "__next__", following)

  yield patch
  monkeypatch.setattr(loader.BatchIterator, "__next__", original)


def saved(workdir):
  return sorted(int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit())


def refused(config, workdir):
  with pytest.raises(RunFailed) as failed:
    train_lib.train(config, str(workdir))
  assert "\n" not in str(failed.value)
  return failed.value.exit_code, str(failed.value)


FAILURES = {
  "a file is gone": FileNotFoundError(2, "No such file or directory"),
  "memory": MemoryError(),
  "library": RuntimeError("from deep inside\nand more"),
  "bucket": InputLost("gs://bucket/x could not be read within 300 s."),
}


def test_a_failure_saves_and_may_be_mended_by_a_rerun_but_not_twice(tmp_path, config, fail_at):
  quiet, workdir = tmp_path / "quiet", tmp_path / "run"
  expected = train_lib.train(config, str(quiet))
  for step, error in enumerate(FAILURES.values()):
    # Each at another step of the same run; the loader of a start begins with the step after it.
    fail_at(1, error)
    code, words = refused(config, workdir)
    assert code == HOST_LOST and f"Step {step + 2} failed: " in words, words
    assert f"Step {step + 1} is saved; the same command resumes" in words
    assert saved(workdir)[-1] == step + 1
  assert "gs://bucket/x could not be read" in words
  starts = json.loads((workdir / "starts.json").read_text())["history"]
  assert [start["failure"]["step"] for start in starts] == [2, 3, 4, 5]
  fail_at(0, DataError("x.array_record is missing"))
  code, words = refused(config, workdir)
  assert code == FAILED and "It failed so in an earlier start as well." in words
  assert "mend the cause first" in words and saved(workdir)[-1] == 4
  fail_at(-1, None)
  assert train_lib.train(config, str(workdir))["loss"] == expected["loss"]
  assert fingerprints(workdir, 6) == fingerprints(quiet, 6)


def test_data_that_are_bad_as_they_are_end_the_run_at_once(tmp_path, config, fail_at):
  fail_at(2, UnusableData("9 records cannot be decoded."))
  code, words = refused(config, tmp_path)
  assert code == FAILED and "9 records cannot be decoded. Step 2 is saved" in words
  assert saved(tmp_path) == [2]


def test_an_evaluation_that_fails(tmp_path, config, fail_at):
  config.eval.precise_bn_examples = 16
  fail_at(1, MemoryError(), training=False)
  code, words = refused(config, tmp_path)
  assert (
    code == HOST_LOST and "The evaluation of step 6 failed: MemoryError. Step 6 is saved" in words
  )
  code, words = refused(config, tmp_path)
  assert code == FAILED and saved(tmp_path) == [6]
  with pytest.raises(RunFailed, match=r"evaluation of step 6 failed: MemoryError") as failed:
    train_lib.evaluate_only(config, str(tmp_path))
  assert failed.value.exit_code == HOST_LOST
  fail_at(-1, None)
  assert train_lib.train(config, str(tmp_path))["examples"] == 64


def test_a_batch_that_no_step_needs_may_fail(tmp_path, config, fail_at):
  fail_at(6, OSError())
  config.eval.every_steps = 5
  assert train_lib.train(config, str(tmp_path))["step"] == 6


def test_an_error_out_of_the_loop_saves_what_is_whole(tmp_path, config, monkeypatch):
  def broken(self, step, metrics):
    if step == 3:
      raise OSError(28, "No space left on device")

  monkeypatch.setattr("trainer.reporting.telemetry.Telemetry.step", broken)
  code, words = refused(config, tmp_path)
  assert code == HOST_LOST and "OSError: [Errno 28] No space left on device" in words
  assert saved(tmp_path) == [3]


def test_a_failure_on_a_full_disk_is_mended_by_no_rerun(tmp_path, config, fail_at, monkeypatch):
  full = shutil.disk_usage(tmp_path)._replace(free=0)
  monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
  for number, (error, last) in enumerate(
    ((MemoryError(), "the same command again."), (UnusableData("Bad."), "the failure as well."))
  ):
    fail_at(1, error)
    code, words = refused(config, tmp_path / str(number))
    assert code == FAILED and "step 1 could not be written" in words and words.endswith(last), words


def test_a_table_that_cannot_be_written_does_not_end_a_run(tmp_path, config, monkeypatch, caplog):
  original = storage.write_whole

  def full(path, text):
    if path.name == "eval_classes.json":
      raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    original(path, text)

  monkeypatch.setattr(storage, "write_whole", full)
  config.eval.per_class = True
  assert train_lib.train(config, str(tmp_path))["step"] == 6
  assert "eval_classes.json could not be written" in caplog.text


def test_killed_decoding_processes(tmp_path, config, shards, monkeypatch):
  config.data.kind, config.data.path, config.data.workers = "auto", str(shards), 1
  config.eval.every_steps, config.total_steps = 2, 4
  train_lib.train(config, str(tmp_path / "quiet"))
  original = loader.BatchIterator.__next__

  def killing(self):
    batch = original(self)
    for process in multiprocessing.active_children():
      process.kill()
    return batch

  monkeypatch.setattr(loader.BatchIterator, "__next__", killing)
  config.data.worker_restarts = 1
  code, words = refused(config, tmp_path / "run")
  assert code == HOST_LOST and "config.data.worker_restarts allows no further one" in words
  config.data.worker_restarts = 100
  final = train_lib.train(config, str(tmp_path / "run"))
  assert final["workers_replaced"] > 2
  assert fingerprints(tmp_path / "run", 4) == fingerprints(tmp_path / "quiet", 4)
  scalars = events.read_scalars(str(tmp_path / "run" / "events"))
  assert scalars["train/workers_replaced"][1][-1] > 0


HUNG = """
import os, pathlib
from input_pipeline import loader
from tests.trainer import tiny

original = loader.BatchIterator.__next__
images, mark = pathlib.Path({folder!r}), pathlib.Path({mark!r})

def following(self):
  following.made += 1
  if following.made == 4:
    mark.touch()
    for image in images.glob("train/*/*.jpg"):  # as in a mount that has stopped to answer
      image.rename(f"{{image}}.kept")
      os.mkfifo(image)
  return original(self)

following.made = 0
if not mark.exists():
  loader.BatchIterator.__next__ = following

def get_config():
  config = tiny.get_config()
  config.data.path, config.global_batch_size, config.total_steps = {folder!r}, 8, 40
  config.data.worker_timeout_seconds = config.data.stream_give_up_seconds = 3.0
  return config
"""


@pytest.mark.parametrize(
  "overrides", [(), pytest.param(("data.threads=0",), marks=pytest.mark.slow)]
)
def test_files_that_hang_the_threads_that_read_them(tmp_path, overrides):
  folder, file = tmp_path / "images", tmp_path / "mine.py"
  for number in range(60):
    image = folder / ("train" if number < 48 else "val") / str("ab"[number % 2]) / f"{number}.jpg"
    image.parent.mkdir(parents=True, exist_ok=True)
    image.write_bytes(simplejpeg.encode_jpeg(np.full((20, 20, 3), number, np.uint8)))
  file.write_text(HUNG.format(folder=str(folder), mark=str(tmp_path / "mark")))
  overrides = "data.kind=auto", "model.num_classes=2", "data.workers=0", *overrides
  log = run(1, 1, trainer(tmp_path / "run", *overrides, config=file), HOST_LOST)
  line = next(line for line in log.splitlines() if "made nothing for 6 s" in line)
  assert "config.data.worker_timeout_seconds" in line and "is saved" in line
  (step,) = saved(tmp_path / "run")
  assert 2 < step < 40
  for image in folder.glob("train/*/*.kept"):
    image.rename(image.with_suffix(""))
  run(1, 1, trainer(tmp_path / "run", *overrides, config=file))
  run(1, 1, trainer(tmp_path / "quiet", *overrides, config=file))
  assert fingerprints(tmp_path / "run", 40) == fingerprints(tmp_path / "quiet", 40)


def test_a_folder_that_is_unmounted_under_a_run(tmp_path, config, monkeypatch):
  """One file that is gone costs a record. All of them are no bad records: a rerun may find them."""
  folder, away = images(tmp_path / "data", ["cat", "dog"]), tmp_path / "away"
  config.data.kind, config.data.path, config.model.num_classes = "folder", str(folder), 2
  config.data.threads = 0
  train_lib.train(config, str(tmp_path / "quiet"))
  original = loader.BatchIterator.__next__

  def unmounting(self):
    unmounting.made += 1
    if unmounting.made == 4:
      folder.rename(away)
    return original(self)

  unmounting.made = 0
  monkeypatch.setattr(loader.BatchIterator, "__next__", unmounting)
  code, words = refused(config, tmp_path / "run")
  assert code == HOST_LOST and "train was removed, renamed or unmounted under this run" in words
  assert saved(tmp_path / "run") == [3] and "the same command resumes" in words
  away.rename(folder)
  train_lib.train(config, str(tmp_path / "run"))
  assert fingerprints(tmp_path / "run", 6) == fingerprints(tmp_path / "quiet", 6)


def test_exit_codes_of_errors():
  codes = {InputLost("x"): HOST_LOST, UnusableData("x"): FAILED, RunFailed("x", 76): 76}
  assert {error: exit_code(error) for error in codes} == codes
  assert exit_code(KeyError("x")) == 1


ON_HOST_1 = """
import os, pathlib
from input_pipeline import loader
from tests.trainer import tiny

original, made = loader.BatchIterator.__next__, {{}}
training = not pathlib.Path({mark!r}).exists()

def following(self):
  at = made[id(self)] = made.get(id(self), -1) + 1
  if (self.count > 1000) == training and at == (29 if training else self.count - 1):
    raise MemoryError
  return original(self)

if os.environ["JAX_PROCESS_ID"] == "1":
  loader.BatchIterator.__next__ = following

get_config = tiny.get_config
"""


def test_all_hosts_save_the_step_before_the_one_that_fails_on_one_of_them(tmp_path):
  mark, file = tmp_path / "mark", tmp_path / "mine.py"
  file.write_text(ON_HOST_1.format(mark=str(mark)))
  overrides = "total_steps=40", "checkpoint.every_steps=29", "checkpoint.keep_last=9"
  workdir, quiet = tmp_path / "run", tmp_path / "quiet"
  log = run(2, 1, trainer(workdir, *overrides, config=file), HOST_LOST)
  assert log.count("ended with code 76") == 2
  assert "Step 30 failed on host 1: MemoryError. Step 29 is saved" in log
  assert saved(workdir) == [29]
  mark.touch()  # from now on the evaluation fails, at its last batch
  log = run(2, 1, trainer(workdir, *overrides, config=file), HOST_LOST)
  assert "Resuming from checkpoint 29 of 40" in log and log.count("ended with code 76") == 2
  assert "The evaluation of step 40 failed on host 1: MemoryError. Step 40 is saved" in log
  run(2, 1, trainer(quiet, *overrides))
  for step in (29, 40):  # the steps that were undone have left nothing
    assert fingerprints(workdir, step) == fingerprints(quiet, step)
