"""Exact evaluation: every example counts once on any number of devices."""

import collections
from collections.abc import Callable, Iterator
import contextlib
from typing import TypedDict

import jax
from jax.sharding import Mesh
import numpy as np

from trainer import mesh as mesh_lib
from trainer.errors import NonFiniteError
from trainer.pod.requests import STOP
from trainer.state import Variables
from trainer.step import EvalStep, Totals

# The entries of a host batch that an evaluation reads.
BATCH = ("image", "label", "mask")
_TOTALS = {
  "loss": np.float32,
  "top1": np.int32,
  "top5": np.int32,
  "examples": np.int32,
  "request": np.int32,
}


def abstract_totals(mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
  """Return the shapes of what `eval_step` adds to: replicated scalars."""
  return {
    name: jax.ShapeDtypeStruct((), dtype, sharding=mesh_lib.replicated(mesh))
    for name, dtype in _TOTALS.items()
  }


def zero_totals(mesh: Mesh) -> Totals:
  """Return `abstract_totals` with every number zero."""
  return {
    name: jax.device_put(np.zeros((), x.dtype), x.sharding)
    for name, x in abstract_totals(mesh).items()
  }


class Result(TypedDict):
  """Means over the examples of a split, and their number."""

  loss: float
  top1: float
  top5: float
  examples: int


def evaluate(
  eval_step: EvalStep,
  mesh: Mesh,
  variables: Variables,
  host_batches: Iterator[dict[str, np.ndarray]],
  requests: Callable[[], jax.Array],
) -> Result | None:
  """Run the model over a whole split.

  Args:
    eval_step: the compiled `trainer.step.make_eval_step`.
    mesh: the mesh of the run.
    variables: what to evaluate.
    host_batches: this host's rows of each padded batch of the split.
    requests: returns what this host asks for, before each batch; a STOP of any host ends the
      evaluation on all.

  Returns:
    The result, or None if it was stopped.

  Raises:
    NonFiniteError: if the mean loss is not a finite number.
  """
  totals = zero_totals(mesh)
  in_flight: collections.deque[jax.Array] = collections.deque()
  with contextlib.closing(mesh_lib.prefetch(mesh, host_batches, BATCH)) as batches:
    for batch in batches:
      totals = eval_step(variables, totals, batch, requests())
      in_flight.append(totals["request"])
      # Two batches late: that bounds the batches in flight, and with them the memory that they
      # hold.
      if len(in_flight) > 2 and jax.device_get(in_flight.popleft()) == STOP:
        return None
  sums = jax.device_get(totals)
  examples = int(sums["examples"])
  loss, top1, top5 = (float(sums[name]) / examples for name in ("loss", "top1", "top5"))
  if not np.isfinite(loss):
    raise NonFiniteError(f"the evaluation loss is {loss}; the weights are not usable.")
  return Result(loss=loss, top1=top1, top5=top5, examples=examples)
