"""Exact evaluation: every example counts once on any number of devices.

Precise BN (`config.eval.precise_bn_examples`): while weights move, running averages lag behind
them, and averaged weights have had no batch at all. So before an evaluation the moments of every
batch norm can be computed with the weights as they are. As in pycls and fvcore, each batch is
normalised by its own moments. Unlike there, the images are training images prepared as those of the
evaluation are, because apparent sizes differ between the two (arXiv:1906.06423), and the variance
is over all examples, not the mean of those of batches. The state of the run is left alone.
"""

import collections
from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
from typing import NotRequired, TypedDict

import jax
from jax.sharding import Mesh
import numpy as np

from trainer import mesh as mesh_lib
from trainer.errors import NonFiniteError
from trainer.pod.requests import STOP
from trainer.state import Variables
from trainer.step import EvalStep, StatisticsStep, Totals

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


def abstract_count(mesh: Mesh) -> jax.ShapeDtypeStruct:
  """Return the shape of a number of batches."""
  return jax.ShapeDtypeStruct((), np.int32, sharding=mesh_lib.replicated(mesh))


class Result(TypedDict):
  """Means over the examples of a split, and their number.

  With `config.eval.raw` the `raw_` means are those of weights that are not averaged. `splits` holds
  the results of all splits but the first, by name.
  """

  loss: float
  top1: float
  top5: float
  examples: int
  raw_loss: NotRequired[float]
  raw_top1: NotRequired[float]
  raw_top5: NotRequired[float]
  splits: NotRequired[dict[str, "Result"]]


def join(results: Mapping[str, Result]) -> Result:
  """Return the result of the first of several splits, which holds those of the others."""
  first, *others = results
  if not others:
    return results[first]
  return {**results[first], "splits": {name: results[name] for name in others}}


def in_words(result: Result) -> list[str]:
  """Return a line for each split: 'top1 76.13%, top5 92.86%, loss 0.9611 on 50000 examples'."""
  line = (
    f"top1 {100 * result['top1']:.2f}%, top5 {100 * result['top5']:.2f}%, "
    f"loss {result['loss']:.4f} on {result['examples']} examples"
  )
  if "raw_top1" in result:
    line += f"; not averaged: top1 {100 * result['raw_top1']:.2f}%"
  others = result.get("splits", {})
  return [line, *(f"{name}: {words}" for name in others for words in in_words(others[name]))]


def precise_bn(
  statistics_step: StatisticsStep,
  mesh: Mesh,
  variables: Variables,
  host_batches: Iterator[dict[str, np.ndarray]],
) -> Variables:
  """Return the variables with the moments of these batches as running statistics.

  Args:
    statistics_step: the compiled `trainer.step.make_statistics_step`.
    mesh: the mesh of the run.
    variables: weights, and statistics of no importance.
    host_batches: this host's rows of each batch, none of them padding.
  """
  count = abstract_count(mesh)
  so_far = variables.batch_stats, jax.device_put(np.zeros((), count.dtype), count.sharding)
  with contextlib.closing(mesh_lib.prefetch(mesh, host_batches, ("image",))) as batches:
    for batch in batches:
      before, so_far = so_far, statistics_step(variables, so_far, batch)
      jax.block_until_ready(before)  # bounds the batches in flight
  return variables._replace(batch_stats=so_far[0])


def evaluate(
  eval_step: EvalStep,
  mesh: Mesh,
  weights: Sequence[Variables],
  host_batches: Iterator[dict[str, np.ndarray]],
  requests: Callable[[], jax.Array],
) -> Result | None:
  """Run the model over a whole split.

  Args:
    eval_step: the compiled `trainer.step.make_eval_step`.
    mesh: the mesh of the run.
    weights: what to evaluate and, if there is a second, what gives the `raw_` means.
    host_batches: this host's rows of each padded batch of the split.
    requests: returns what this host asks for, before each batch; a STOP of any host ends the
      evaluation on all.

  Returns:
    The result, or None if it was stopped.

  Raises:
    NonFiniteError: if the mean loss is not a finite number.
  """
  totals = [zero_totals(mesh) for _ in weights]
  in_flight: collections.deque[jax.Array] = collections.deque()
  with contextlib.closing(mesh_lib.prefetch(mesh, host_batches, BATCH)) as batches:
    for batch in batches:
      flags = requests()
      totals = [
        eval_step(variables, so_far, batch, flags)
        for variables, so_far in zip(weights, totals, strict=True)
      ]
      in_flight.append(totals[-1]["request"])
      # Two batches late: that bounds the batches in flight, and with them the memory that they
      # hold.
      if len(in_flight) * len(weights) > 2 and jax.device_get(in_flight.popleft()) == STOP:
        return None
  result, *raw = (_means(sums) for sums in jax.device_get(totals))
  if raw:
    result["raw_loss"], result["raw_top1"] = raw[0]["loss"], raw[0]["top1"]
    result["raw_top5"] = raw[0]["top5"]
  return result


def _means(sums: Mapping[str, np.ndarray]) -> Result:
  examples = int(sums["examples"])
  loss, top1, top5 = (float(sums[name]) / examples for name in ("loss", "top1", "top5"))
  if not np.isfinite(loss):
    raise NonFiniteError(f"the evaluation loss is {loss}; the weights are not usable.")
  return Result(loss=loss, top1=top1, top5=top5, examples=examples)
