"""Decoding processes that are killed, hang or run out of memory: replaced, and no batch changes."""

import contextlib
import functools
import os
import signal

import numpy as np
import psutil
import pytest

from input_pipeline import loader
from input_pipeline.errors import InputLost
from input_pipeline.workers import pool
from tests.input_pipeline.test_loader import Memory, digest, opened, started_since, take

_STEPS = 40


@contextlib.contextmanager
def training(source, data, **where):
  """A loader of batches of 8 and its decoding processes, after the first batch."""
  before = set(psutil.Process().children(recursive=True))
  iterator = loader.train_batches(source, data, seed=0, global_batch_size=8, **where)
  with contextlib.closing(iterator):
    first = next(iterator)
    yield iterator, first, lambda: started_since(before)


def test_killed_processes_are_replaced_and_no_batch_changes(shards, caplog):
  expected = digest(take(*opened(shards), _STEPS))
  replacements = pool.Replacements(3)
  source, data = opened(shards, workers=2, threads=1, prefetch_batches=2)
  with training(source, data, replacements=replacements) as (iterator, first, workers):
    batches = [first]
    for how in (signal.SIGKILL, signal.SIGSEGV):
      for process in workers()[:1]:
        process.send_signal(how)
      batches += [next(iterator) for _ in range(10)]
    (one, other) = workers()
    one.kill()
    batches += [next(iterator) for _ in range(_STEPS - len(batches))]
    assert len(workers()) == 2 and other in workers()  # in place, and no other
  assert digest(batches) == expected
  assert replacements.count == 3
  assert "was killed by SIGKILL, as the system does where memory runs out" in caplog.text
  assert "was killed by SIGSEGV" in caplog.text
  assert not workers()


def test_a_process_that_hangs_is_replaced(shards, caplog):
  expected = digest(take(*opened(shards), 12))
  limits = {"worker_timeout_seconds": 3.0, "stream_give_up_seconds": 3.0}
  with training(*opened(shards, workers=1, **limits)) as (iterator, first, workers):
    (hung,) = workers()
    hung.suspend()
    assert digest([first] + [next(iterator) for _ in range(11)]) == expected
    assert not hung.is_running()
  assert "has made nothing for 6 s" in caplog.text


def test_the_slots_of_a_killed_process_are_used_again(shards, caplog):
  held = []
  with training(*opened(shards, workers=1)) as (iterator, first, workers):
    held.append((first["image"], first["image"].copy()))
    for _ in range(12):
      for process in workers()[: len(held) % 4 == 1]:
        process.kill()
      batch = next(iterator)
      held.append((batch["image"], batch["image"].copy()))
    memory = iterator._batches._rows.slots
    assert sum(memory._memory[: memory._slots_per_worker]) <= memory._slots_per_worker
  for image, copy in held:  # nothing was written over arrays in use
    np.testing.assert_array_equal(image, copy)


def test_too_many_end_the_run_with_the_reason(shards):
  with (
    training(*opened(shards, workers=1, worker_restarts=1)) as (iterator, _, workers),
    pytest.raises(InputLost) as lost,
  ):
    for _ in range(50):
      for process in workers():
        process.kill()
      next(iterator)
  assert "config.data.worker_restarts allows no further" in str(lost.value)
  assert "lower config.data.workers or config.data.prefetch_batches" in str(lost.value)


class Failing(Memory):
  """Raises what `error` makes, always or, with the path of a mark, once."""

  def __init__(self, images, error, mark=None):
    super().__init__(images)
    self.error, self.mark = error, mark

  def __getitem__(self, index):
    if self.mark is None:
      raise self.error()
    with contextlib.suppress(FileExistsError):
      os.close(os.open(self.mark, os.O_CREAT | os.O_EXCL))
      raise self.error()
    return super().__getitem__(index)


def test_a_process_out_of_memory_is_replaced(shards, tmp_path, caplog):
  source, data = opened(shards, workers=1, worker_restarts=1)
  images = [source[i].image for i in range(4)]
  expected = digest(take(Memory(images), data, 3))
  failing = Failing(images, MemoryError, str(tmp_path / "failed"))
  assert digest(take(failing, data, 3)) == expected
  assert "ran out of memory" in caplog.text


class Unsendable(Exception):
  """An error that cannot be sent from process to process."""

  def __init__(self, one, two):
    super().__init__(f"{one} and {two}")


@pytest.mark.parametrize(
  ("error", "kind"),
  [
    (functools.partial(KeyError, "depth"), KeyError),
    (functools.partial(Unsendable, 1, 2), RuntimeError),
  ],
)
def test_another_error_arrives_as_it_is(shards, error, kind):
  data = opened(shards, workers=1)[1]
  with pytest.raises(kind, match=r"depth|Unsendable: 1 and 2"):
    take(Failing([b""], error), data, 1)


def test_replacements_are_counted_within_an_hour(monkeypatch):
  times = [0.0, 1.0, 2.0, 3600.5, 3600.6, 3601.5]
  few = pool.Replacements(2)
  monkeypatch.setattr("time.monotonic", iter(times).__next__)
  found = [few.allow() for _ in times]
  assert found == [True, True, False, True, False, True] and few.count == 4
