"""Reused memory for batches, which decoding processes write and the trainer reads.

Grain passes an array from a process to the trainer in a new segment of shared memory. Making,
filling, mapping and dropping a segment per batch costs a tenth of the time of decoding; slots that
stay cost next to nothing, and images are decoded straight into them.
"""

import dataclasses
import math
import mmap
import os
import threading
from typing import Any
import weakref

import numpy as np

# Number of this decoding process among its siblings; None in the process that started them.
_worker: int | None = None


def set_worker(index: int) -> None:
  """Set which slots belong to this decoding process: those of number `index`."""
  global _worker
  _worker = index


@dataclasses.dataclass(frozen=True)
class Slot:
  """What is sent from process to process in place of an array."""

  number: int
  shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Claim:
  """A slot and its array: uint8, not cleared."""

  slot: Slot
  array: np.ndarray


class _Lease:
  """The owner of the memory of an array, kept alive by the array and all its views."""

  def __init__(self, memory: mmap.mmap, offset: int, shape: tuple[int, ...]):
    view = np.frombuffer(memory, np.uint8, math.prod(shape), offset).reshape(shape)
    self._view = view
    self.__array_interface__ = view.__array_interface__


class Slots:
  """Arrays of about one size in memory that all processes of a loader share.

  The memory has no name: it is freed with the last process that has it, however that ends, and no
  limit of /dev/shm applies. Each decoding process has slots of its own, so processes need not agree
  on which to take. A byte per slot marks it as in use: set by the decoding process, cleared by the
  one that reads.

  Attributes:
    nbytes: the most memory that the slots can take.
  """

  def __init__(self, shape: tuple[int, ...], workers: int, slots_per_worker: int):
    """Reserve the memory; pages that are never written take none.

    Args:
      shape: of the largest array, uint8.
      workers: number of decoding processes.
      slots_per_worker: arrays of each process that can be in use at a time.
    """
    self._slots_per_worker = slots_per_worker
    count = workers * slots_per_worker
    self._first = _whole_pages(
      count
    )  # of the arrays; before it are the bytes that mark slots as in use
    self._stride = _whole_pages(math.prod(shape))
    fd = os.memfd_create("batches")
    weakref.finalize(self, os.close, fd)
    self.nbytes = self._first + count * self._stride
    os.ftruncate(fd, self.nbytes)
    self._path = f"/proc/{os.getpid()}/fd/{fd}"
    self._map()

  def _map(self) -> None:
    with open(self._path, "rb+") as f:
      self._memory = mmap.mmap(f.fileno(), 0)
    self._lock = threading.Lock()
    self._opened: set[int] = set()  # slots whose arrays are in use in this process

  def __getstate__(self) -> dict[str, Any]:
    state = self.__dict__.copy()
    del state["_memory"], state["_lock"], state["_opened"]
    return state

  def __setstate__(self, state: dict[str, Any]) -> None:
    self.__dict__.update(state)
    self._map()

  def claim(self, shape: tuple[int, ...]) -> Claim | None:
    """Take a free slot of this decoding process; None if all are in use.

    Args:
      shape: of its array, not larger than the one that memory was reserved for.
    """
    if _worker is None:
      raise RuntimeError("only decoding processes have slots")
    first = _worker * self._slots_per_worker
    with self._lock:  # against other threads of this process
      for number in range(first, first + self._slots_per_worker):
        if not self._memory[number]:
          self._memory[number] = 1
          slot = Slot(number, shape)
          return Claim(slot, self._array(slot))
    return None

  def open(self, slot: Slot) -> np.ndarray:
    """Return the array of a slot, which becomes free when the array and all its views are gone."""
    array = self._array(slot)
    self._opened.add(slot.number)
    weakref.finalize(array.base, self._release, slot.number).atexit = False
    return array

  def _release(self, number: int) -> None:
    self._opened.discard(number)
    self._memory[number] = 0

  def free(self, worker: int) -> None:
    """Free the slots of a decoding process that has ended, but for arrays in use in this one."""
    first = worker * self._slots_per_worker
    for number in set(range(first, first + self._slots_per_worker)) - self._opened:
      self._memory[number] = 0

  def _array(self, slot: Slot) -> np.ndarray:
    first = self._first + slot.number * self._stride
    return np.asarray(_Lease(self._memory, first, slot.shape))


def _whole_pages(size: int) -> int:
  return -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
