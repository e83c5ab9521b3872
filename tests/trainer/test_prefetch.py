"""Batches on their way to the devices."""

import threading

import ml_collections
import numpy as np
import pytest

from trainer import mesh as mesh_lib


@pytest.fixture
def prefetch():
  mesh = mesh_lib.make_mesh(ml_collections.ConfigDict({"data": -1, "fsdp": 1, "space": 1}))
  return lambda host_batches: mesh_lib.prefetch(mesh, host_batches, ("image",))


def number_of(batch):
  return int(batch["image"][0, 0, 0, 0])


def host_batches(count):
  for number in range(count):
    yield {"image": np.full((8, 2, 2, 3), number, np.uint8), "label": np.zeros(8)}


def test_batches_that_are_there_are_handed_out_while_a_later_one_is_late(prefetch):
  arrived = threading.Event()

  def late():
    for batch in host_batches(6):
      if batch["image"][0, 0, 0, 0] == 2:
        assert arrived.wait(60)
      yield batch

  batches = prefetch(late())
  assert [number_of(next(batches)) for _ in range(2)] == [0, 1]
  arrived.set()
  assert [number_of(batch) for batch in batches] == [2, 3, 4, 5]


def test_what_the_loader_raises_is_raised_after_the_batches_before_it(prefetch):
  def failing():
    yield from host_batches(2)
    raise ValueError("the disk is gone")

  batches = prefetch(failing())
  assert [number_of(next(batches)) for _ in range(2)] == [0, 1]
  with pytest.raises(ValueError, match="disk is gone"):
    next(batches)


def test_closing_leaves_the_loader_to_others(prefetch):
  loader = host_batches(50)
  batches = prefetch(loader)
  next(batches)
  batches.close()
  loader.close()
