"""Memory of batches that is shared by processes and used again."""

import gc
import os
import pickle

import numpy as np
import pytest

from input_pipeline.workers import slots
from tests.input_pipeline import test_loader


@pytest.fixture
def pair(monkeypatch):
  """What reads and what decodes, with two slots for each of two processes, of which it is one."""
  monkeypatch.setattr(slots, "_worker", 1)
  reader = slots.Slots((2, 3, 3), workers=2, slots_per_worker=2)
  return reader, pickle.loads(pickle.dumps(reader))


def test_what_is_written_is_read_without_a_copy(pair):
  reader, decoder = pair
  claim = decoder.claim((2, 3, 3))
  claim.array[:] = np.arange(18).reshape(2, 3, 3)
  found = reader.open(claim.slot)
  assert found.dtype == np.uint8
  np.testing.assert_array_equal(found, np.arange(18).reshape(2, 3, 3))
  claim.array[0] = 9
  assert (found[0] == 9).all()


def test_a_slot_is_free_again_when_the_last_view_of_it_is_gone(pair):
  reader, decoder = pair
  first, second = decoder.claim((2, 3, 3)), decoder.claim((2, 3, 3))
  assert first.slot != second.slot
  assert decoder.claim((2, 3, 3)) is None
  found = reader.open(first.slot)
  view = found.reshape(-1)[3:].reshape(5, 3)[1:]
  del found
  gc.collect()
  assert decoder.claim((2, 3, 3)) is None
  del view
  assert decoder.claim((2, 3, 3)).slot == first.slot


def test_the_memory_goes_with_the_last_that_has_it():
  def count():
    with open("/proc/self/maps", encoding="utf-8") as maps:
      return maps.read().count("memfd:batches"), len(os.listdir("/proc/self/fd"))

  before = count()
  memory = slots.Slots((4, 4, 4), workers=1, slots_per_worker=1)
  assert count() > before
  array = memory.open(slots.Slot(0, (4, 4, 4)))
  del memory
  gc.collect()
  array[:] = 1
  assert count()[0] == before[0] + 1
  del array
  gc.collect()
  assert count() == before


def test_batches_that_are_kept_are_not_overwritten(shards):
  # More than there are slots, so that the last ones come the other way.
  expected = test_loader.take(*test_loader.opened(shards), 16)
  fields = {"workers": 1, "threads": 1, "prefetch_batches": 1}
  got = test_loader.take(*test_loader.opened(shards, **fields), 16)
  bases = {type(batch["image"].base) for batch in got}
  assert slots._Lease in bases and len(bases) > 1
  assert test_loader.digest(got) == test_loader.digest(expected)
