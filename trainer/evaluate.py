"""Exact evaluation: every example counts once on any number of devices."""

import collections
from collections.abc import Callable, Iterator
import contextlib
from typing import Any

import jax
from jax.sharding import Mesh
import numpy as np

from trainer import mesh as mesh_lib
from trainer.errors import NonFiniteError
from trainer.step import STOP

BATCH = ("image", "label", "mask")
_TOTALS = {
  "loss": np.float32,
  "top1": np.int32,
  "top5": np.int32,
  "examples": np.int32,
  "request": np.int32,
}


def abstract_totals(mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
  """Returns the shapes of what `eval_step` adds to: replicated scalars."""
  return {
    name: jax.ShapeDtypeStruct((), dtype, sharding=mesh_lib.replicated(mesh))
    for name, dtype in _TOTALS.items()
  }


def zero_totals(mesh: Mesh) -> dict[str, jax.Array]:
  """Returns `abstract_totals` with every number zero."""
  return {
    name: jax.device_put(np.zeros((), x.dtype), x.sharding)
    for name, x in abstract_totals(mesh).items()
  }


def evaluate(
  eval_step: Callable[..., Any],
  mesh: Mesh,
  params: Any,
  batch_stats: Any,
  host_batches: Iterator[dict[str, np.ndarray]],
  requests: Callable[[], jax.Array],
) -> dict[str, Any] | None:
  """Runs the model over a whole split.

  Args:
    eval_step: the compiled `trainer.step.make_eval_step`.
    mesh: the mesh of the run.
    params: what to evaluate.
    batch_stats: running BN statistics that belong to `params`.
    host_batches: this host's rows of each padded batch of the split.
    requests: returns what this host asks for, before each batch; a STOP of any host ends the evaluation on all.

  Returns:
    {'loss', 'top1', 'top5': float means, 'examples': int count}, or None if it was stopped.

  Raises:
    NonFiniteError: if the mean loss is not a finite number.
  """
  totals = zero_totals(mesh)
  in_flight = collections.deque()
  with contextlib.closing(mesh_lib.prefetch(mesh, host_batches, BATCH)) as batches:
    for batch in batches:
      totals = eval_step(params, batch_stats, totals, batch, requests())
      in_flight.append(totals["request"])
      # Two batches late: that bounds the batches in flight, and with them the memory that they hold.
      if len(in_flight) > 2 and jax.device_get(in_flight.popleft()) == STOP:
        return None
  totals = jax.device_get(totals)
  examples = int(totals["examples"])
  result = {name: float(totals[name]) / examples for name in ("loss", "top1", "top5")}
  if not np.isfinite(result["loss"]):
    raise NonFiniteError(f"the evaluation loss is {result['loss']}; the weights are not usable.")
  return result | {"examples": examples}
