"""What hosts ask for in a step is read two steps later, and forgotten once it is met."""

import jax
import numpy as np
import pytest

from trainer import mesh as mesh_lib
from trainer.pod.requests import FAIL, NOTHING, SAVE, STOP, Requests


@pytest.fixture
def mesh(config):
  return mesh_lib.make_mesh(config.mesh)


@pytest.mark.parametrize(
  "stop, wanted, expected",
  [(False, False, NOTHING), (False, True, SAVE), (True, False, STOP), (True, True, STOP)],
)
def test_a_stop_counts_more_than_a_save(mesh, stop, wanted, expected):
  flags = Requests(mesh, lambda: stop, lambda: wanted).flags()
  assert (flags.shape, flags.dtype) == ((jax.device_count(),), np.int32)
  assert set(np.asarray(flags).tolist()) == {expected}


def test_a_request_is_read_two_steps_later(mesh):
  requests = Requests(mesh, lambda: False)
  made = {6: SAVE, 9: STOP}
  agreed = {}
  for step in range(5, 13):
    requests.note(step, jax.numpy.int32(made.get(step, NOTHING)))
    agreed[step] = requests.agreed
    requests.forget(SAVE)
  assert agreed == {step: {8: SAVE}.get(step, STOP if step >= 11 else NOTHING) for step in agreed}


def test_a_failure_counts_from_its_step_on_and_the_first_one_stays(mesh):
  requests = Requests(mesh, lambda: True)
  assert not requests.fails(7)
  requests.fail(7, MemoryError())
  requests.fail(6, OSError())
  assert requests.failure[0] == 7 and isinstance(requests.failure[1], MemoryError)
  flags = {step: int(requests.flags(step)[0]) for step in (6, 7, 8)}
  assert flags == {6: STOP, 7: FAIL, 8: FAIL}
  assert int(requests.flags()[0]) == STOP  # an evaluation does not need that batch
  for step in (6, 7, 8, 9):
    requests.note(step, jax.numpy.int32(flags.get(step, FAIL)))
  assert requests.agreed == FAIL and requests.failed_step == 7
  requests.flush()
  assert requests.failed_step == 7
  requests.fail(None, OSError())  # of an evaluation before
  assert int(requests.flags()[0]) == int(requests.flags(1)[0]) == FAIL


def test_a_flush_reads_every_step(mesh):
  requests = Requests(mesh, lambda: False)
  requests.note(1, jax.numpy.int32(SAVE))
  assert requests.agreed == NOTHING
  requests.flush()
  assert requests.agreed == SAVE
  requests.note(2, jax.numpy.int32(STOP))
  requests.flush()
  requests.forget(SAVE)
  assert requests.agreed == STOP
