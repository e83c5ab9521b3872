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


def abstract_totals(
  mesh: Mesh, classes: int = 0, real: bool = False
) -> dict[str, jax.ShapeDtypeStruct]:
  """Return the shapes of what `eval_step` adds to, replicated: scalars.

  Args:
    mesh: the mesh of the run.
    classes: if not 0, also `confusion`: examples by label and by the class with the highest logit.
    real: whether there are ReaL labels: also how many examples have any, and right answers.
  """
  whole = mesh_lib.replicated(mesh)
  totals = {name: jax.ShapeDtypeStruct((), t, sharding=whole) for name, t in _TOTALS.items()}
  for name in ("real_top1", "real_examples") if real else ():
    totals[name] = jax.ShapeDtypeStruct((), np.int32, sharding=whole)
  if classes:
    totals["confusion"] = jax.ShapeDtypeStruct((classes, classes), np.int32, sharding=whole)
  return totals


def zero_totals(totals: Mapping[str, jax.ShapeDtypeStruct]) -> Totals:
  """Return totals of these shapes with every number zero."""
  return {
    name: jax.device_put(np.zeros(x.shape, x.dtype), x.sharding) for name, x in totals.items()
  }


def abstract_allowed(mesh: Mesh, classes: int) -> jax.ShapeDtypeStruct:
  """Return the shape of which classes count, with `config.eval.classes` = data."""
  return jax.ShapeDtypeStruct((classes,), np.bool_, sharding=mesh_lib.replicated(mesh))


def abstract_count(mesh: Mesh) -> jax.ShapeDtypeStruct:
  """Return the shape of a number of batches."""
  return jax.ShapeDtypeStruct((), np.int32, sharding=mesh_lib.replicated(mesh))


class Result(TypedDict):
  """Means over the examples of a split, and their number.

  With ReaL labels `real_top1` is the mean over `real_examples`, those that have any. With
  `config.eval.raw` the `raw_` means are those of weights that are not averaged. `splits` holds
  the results of all splits but the first, by name. `confusion` is int32 [classes, classes], see
  `abstract_totals`; no result that is written has it.
  """

  loss: float
  top1: float
  top5: float
  examples: int
  raw_loss: NotRequired[float]
  raw_top1: NotRequired[float]
  raw_top5: NotRequired[float]
  real_top1: NotRequired[float]
  real_examples: NotRequired[int]
  confusion: NotRequired[np.ndarray]
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
  if "real_top1" in result:
    line += f"; ReaL {100 * result['real_top1']:.2f}% on {result['real_examples']} examples"
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
  totals: Mapping[str, jax.ShapeDtypeStruct] | None = None,
  allowed: np.ndarray | None = None,
  count: Callable[[int], None] = lambda done: None,
) -> Result | None:
  """Run the model over a whole split.

  Args:
    eval_step: the compiled `trainer.step.make_eval_step`.
    mesh: the mesh of the run.
    weights: what to evaluate and, if there is a second, what gives the `raw_` means.
    host_batches: this host's rows of each padded batch of the split.
    requests: returns what this host asks for, before each batch; a STOP of any host ends the
      evaluation on all.
    totals: what the step counts, see `abstract_totals`; None for what there is always. With
      `confusion` the result has that of the first weights; with `real_top1` batches must have
      `accepted`, see trainer/real_labels.py.
    allowed: bool [classes], which classes count; None for a step that counts all of them.
    count: called with the number of batches so far.

  Returns:
    The result, or None if it was stopped.

  Raises:
    NonFiniteError: if the mean loss is not a finite number.
  """
  shapes = totals or abstract_totals(mesh)
  counted = [zero_totals(shapes) for _ in weights]
  names = (*BATCH, "accepted") if "real_top1" in shapes else BATCH
  only = () if allowed is None else (jax.device_put(allowed, mesh_lib.replicated(mesh)),)
  in_flight: collections.deque[jax.Array] = collections.deque()
  with contextlib.closing(mesh_lib.prefetch(mesh, host_batches, names)) as batches:
    for done, batch in enumerate(batches):
      count(done)
      flags = requests()
      counted = [
        eval_step(variables, so_far, batch, flags, *only)
        for variables, so_far in zip(weights, counted, strict=True)
      ]
      in_flight.append(counted[-1]["request"])
      # Two batches late, one of two weights: that bounds those in flight, and the memory that they
      # hold.
      if len(in_flight) * len(weights) > 2 and jax.device_get(in_flight.popleft()) == STOP:
        return None
  sums = jax.device_get(counted)
  result, *raw = map(_means, sums)
  if "confusion" in shapes:
    result["confusion"] = sums[0]["confusion"]
  if raw:
    result["raw_loss"], result["raw_top1"] = raw[0]["loss"], raw[0]["top1"]
    result["raw_top5"] = raw[0]["top5"]
  return result


def _means(sums: Mapping[str, np.ndarray]) -> Result:
  examples = int(sums["examples"])
  loss, top1, top5 = (float(sums[name]) / examples for name in ("loss", "top1", "top5"))
  if not np.isfinite(loss):
    raise NonFiniteError(f"the evaluation loss is {loss}; the weights are not usable.")
  result = Result(loss=loss, top1=top1, top5=top5, examples=examples)
  if "real_top1" in sums:
    result["real_examples"] = int(sums["real_examples"])
    result["real_top1"] = float(sums["real_top1"]) / max(1, result["real_examples"])
  return result
