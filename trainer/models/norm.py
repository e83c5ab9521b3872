"""Batch normalisation (Ioffe and Szegedy, arXiv:1502.03167), float32 statistics under any dtype.

nnx.BatchNorm does not serve here, for three reasons. In flax 0.12.8, with `dtype=bfloat16`, it
rounds the running mean and variance, the scale and the bias to 8 bits before it uses them, so that
evaluation is not of the statistics that were kept. Its updates by index (`mean[...] = x`) look
for a sharding on a tracer, which searches the whole trace so far: the time to trace grows with the
square of depth. And it has no groups.
"""

from collections.abc import Callable, Mapping
import functools
from typing import Any, NamedTuple

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

# A mean so many deviations large is worth a warning: 0.2 % of the variance is lost.
FAR = 100.0


class BatchNorm(nnx.Module):
  """Batch normalisation over all axes but the last, within groups of consecutive examples.

  `train()` and `eval()` choose between the statistics of the batch and their running averages; a
  new layer trains. The running variance averages the biased variance of the batch, the one that
  normalises, unless `unbiased`. State: Params `scale` and `bias` unless not `affine`, BatchStats
  `mean` and `var`, all [channels] and float32 (float64 if `dtype` is).

  Several groups leave `mean` and `var` with a leading axis, each group with its own average:
  `join_groups` and `average_groups` then take the mean over them, for all layers at once.

  Args:
    channels: length of the last axis.
    momentum: share of the old running average kept at each step.
    epsilon: added to the variance.
    dtype: of the output; all arithmetic is at least float32.
    zero_scale: whether the scale starts at 0 instead of 1.
    affine: whether there are scale and bias.
    unbiased: whether the running variance averages n/(n - 1) times the variance of the n values of
      a channel in its group, as torch's does.
    shifted: whether variances are computed from distances to the running mean.
    together: whether barriers keep what training computes of vectors in few operations. Without,
      the compiler of TPUs makes about six of it, among them some that only change between the forms
      [C] and [1, C] of a vector.
    group: "global" for one group, "device" for one in each shard, or the examples of a group.
    shards: number of equal parts that the examples are split in over devices. It divides the number
      of groups, or the other way round.
  """

  def __init__(
    self,
    channels: int,
    *,
    momentum: float,
    epsilon: float,
    dtype: jax.typing.DTypeLike,
    zero_scale: bool,
    affine: bool = True,
    unbiased: bool = False,
    shifted: bool = False,
    together: bool = False,
    group: str = "global",
    shards: int = 1,
  ):
    self.momentum = momentum
    self.epsilon = epsilon
    self.dtype = jnp.dtype(dtype)
    self.unbiased = unbiased
    self.shifted = shifted
    self.together = together
    self.group = group
    self.shards = shards
    self.use_running_average = False  # the name that nnx.Module.train() and eval() look for
    wide = jnp.promote_types(dtype, jnp.float32)
    self.affine = affine
    if affine:
      self.scale = nnx.Param(jnp.full(channels, 0.0 if zero_scale else 1.0, wide))
      self.bias = nnx.Param(jnp.zeros(channels, wide))
    self.mean = nnx.BatchStat(jnp.zeros(channels, wide))
    self.var = nnx.BatchStat(jnp.ones(channels, wide))

  def directions(self) -> jax.Array:
    """Return `directions` of the scale."""
    return directions(self.scale.get_value())

  def __call__(
    self, x: jax.Array, pool: Callable[[jax.Array], jax.Array] | None = None
  ) -> jax.Array:
    """Return x [..., channels] normalised, scaled and shifted, in `dtype`.

    Args:
      x: activations; with `pool`, times `directions()`.
      pool: takes maxima of neighbours. Those of the output are returned; since it rises with this
        x, they are computed from the maxima of x, which are fewer.
    """
    pooled = None
    if pool is not None:
      directions = self.directions()
      x, pooled = x * directions, pool(x) * directions
    examples, shape = x.shape[0], x.shape if pooled is None else pooled.shape
    x = x.astype(self.mean.dtype)
    scale = self.scale.get_value() if self.affine else None
    bias = self.bias.get_value() if self.affine else None
    together = self.together and not self.use_running_average
    if self.use_running_average:
      mean, var = self.mean.get_value(), self.var.get_value()
    else:
      groups = {"global": 1, "device": self.shards}.get(self.group) or examples // int(self.group)
      # A cell lies on one device and in one group, so that its sums cross no device.
      cells = _Cells(max(groups, self.shards) if groups > 1 else 1, groups, self.shards)
      if groups > 1:
        x = x.reshape(cells.number, examples // cells.number, *x.shape[1:])
      # Of each cell, from the second micro-batch on.
      origin = self.mean.get_value() if self.shifted else None
      if together:
        vectors, (mean, var) = _vectors(x, origin, scale, bias, cells, self.epsilon)
        factor, shift = (cells.spread(vector, x) for vector in vectors)
      else:
        mean, var = cells.moments(x, origin)
      values = x.size // x.shape[-1] // groups
      correction = values / max(1, values - 1) if self.unbiased else 1
      for average, new in ((self.mean, mean), (self.var, var * correction)):
        average.set_value(
          self.momentum * average.get_value() + (1 - self.momentum) * jax.lax.stop_gradient(new)
        )
      mean, var = cells.spread(mean, x), cells.spread(var, x)
    if pooled is not None:
      x = pooled.astype(x.dtype).reshape(*x.shape[: x.ndim - pooled.ndim + 1], *pooled.shape[1:])
    if together:
      y = x * factor + shift
    else:
      factor = jax.lax.rsqrt(var + self.epsilon)
      if scale is not None:
        factor = factor * scale
      y = (x - mean) * factor
      if bias is not None:
        y = y + bias
    return y.astype(self.dtype).reshape(shape)


def directions(scale: jax.Array) -> jax.Array:
  """Return, for each channel, 1 if the output rises with the input and -1 if it falls."""
  scale = jax.lax.stop_gradient(scale)
  return jnp.where(scale < 0, -1, 1).astype(scale.dtype)


class _Cells(NamedTuple):
  """How the examples of a batch norm are split; each cell is on one device and in one group.

  Attributes:
    number: of cells; with 1, arrays have no axis of cells.
    groups: sets of cells with the same moments.
    shards: parts of the examples over devices.
  """

  number: int
  groups: int
  shards: int

  def axes(self, x: jax.Array) -> tuple[int, ...]:
    """Return the axes of x that sums are over."""
    return tuple(range(int(self.number > 1), x.ndim - 1))

  def spread(self, vector: jax.Array, x: jax.Array) -> jax.Array:
    """Give a vector [cells, C] the axes of x; [C] fits as it is."""
    if vector.ndim == 1:
      return vector
    return vector.reshape(self.number, *[1] * (x.ndim - 2), -1)

  def share(self, mean: jax.Array) -> jax.Array:
    """Return the mean over the cells of each group, to each cell."""
    return _share(mean, self.groups) if 1 < self.groups < self.shards else mean

  def moments(self, x: jax.Array, origin: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Return mean and variance of each cell's group.

    E[x^2] - E[x]^2 reads the activations once, not twice. In float32 it loses what `lost` says.
    Distances from any point, `origin`, have the same variance; those from the running mean are
    small.
    """
    y = x if origin is None else x - self.spread(origin, x)
    # Not stacked: the compiler sends both at once, and on a TPU no vector is moved for that.
    moments = jnp.mean(y, self.axes(x)), jnp.mean(jnp.square(y), self.axes(x))
    mean, square = map(self.share, moments)
    return mean if origin is None else mean + origin, _variance(mean, square)


def _variance(mean: jax.Array, square: jax.Array) -> jax.Array:
  """Return the variance by E[x] and E[x^2]."""
  return jnp.maximum(0.0, square - jnp.square(mean))


_Pair = tuple[jax.Array, jax.Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _vectors(
  x: jax.Array,
  origin: jax.Array | None,
  scale: jax.Array | None,
  bias: jax.Array | None,
  cells: _Cells,
  epsilon: float,
) -> tuple[_Pair, _Pair]:
  """Return factor and shift of each cell; and mean and variance, which have no gradient.

  Barriers keep what is computed of vectors in one operation forward and one backward; with the
  vectors of `as_rows` the latter adds gradients of scale and bias to those of other micro-batches.
  No vector that leaves an operation is needed for another: the backward pass begins at the sums
  again. x times a factor, and not its distance from the mean, is an addition less wherever x is
  read. Where the mean is n deviations, outputs lose n * 1e-7 by it in float32, and the gradient of
  scale n * 5e-7: much less than the variance does unless `shifted`.
  """
  return _vectors_forward(x, origin, scale, bias, cells, epsilon)[0]


def _of_sums(
  sums: _Pair,
  values: int,
  origin: jax.Array | None,
  scale: jax.Array | None,
  epsilon: float,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
  """Return mean, variance, 1 over the deviation and factor, by sums of so many values a cell."""
  mean, square = (each / values for each in sums)
  var = _variance(mean, square)
  root = jax.lax.rsqrt(var + epsilon)
  mean = mean if origin is None else mean + origin
  return mean, var, root, root if scale is None else root * scale


def _vectors_forward(
  x: jax.Array,
  origin: jax.Array | None,
  scale: jax.Array | None,
  bias: jax.Array | None,
  cells: _Cells,
  epsilon: float,
) -> tuple[tuple[_Pair, _Pair], tuple[Any, ...]]:
  y = x if origin is None else x - cells.spread(origin, x)
  axes = cells.axes(x)
  # Those of a group over several devices cross here alone: the backward pass has them.
  sums = jnp.sum(y, axes), jnp.sum(jnp.square(y), axes)
  sums = jax.lax.optimization_barrier((cells.share(sums[0]), cells.share(sums[1])))
  values = x.size // sums[0].size
  mean, var, _, factor = _of_sums(sums, values, origin, scale, epsilon)
  shift = -mean * factor if bias is None else bias - mean * factor
  return (jax.lax.optimization_barrier((factor, shift)), (mean, var)), (x, sums, origin, scale)


def _vectors_backward(
  cells: _Cells, epsilon: float, kept: tuple[Any, ...], gradients: tuple[_Pair, Any]
) -> tuple[jax.Array, None, jax.Array | None, jax.Array | None]:
  x, sums, origin, scale = kept
  (of_factor, of_shift), _ = gradients
  # Else the compiler takes what the forward pass has computed of the sums.
  sums, of_factor, of_shift = jax.lax.optimization_barrier((sums, of_factor, of_shift))
  values = x.size // sums[0].size
  mean, _, root, factor = _of_sums(sums, values, origin, scale, epsilon)
  of_scale = root * (of_factor - mean * of_shift)
  # The gradient of x, by its distance from the mean and by the mean.
  slope = cells.share(root * factor * of_scale) / -values
  constant = cells.share(factor * of_shift) / -values - slope * mean
  slope, constant = jax.lax.optimization_barrier((slope, constant))
  of_x = cells.spread(slope, x) * x + cells.spread(constant, x)
  if scale is None:
    return of_x, None, None, None
  if cells.number > 1:
    of_scale, of_shift = (jnp.sum(each, 0).reshape(scale.shape) for each in (of_scale, of_shift))
  return of_x, None, of_scale, of_shift


_vectors.defvjp(_vectors_forward, _vectors_backward)


def options(fields: Mapping[str, Any], shards: int) -> dict[str, Any]:
  """Return the arguments of every BatchNorm that the fields of a family decide.

  Args:
    fields: values of `config.model`, among them those that begin with bn_.
    shards: see BatchNorm.
  """
  names = ("momentum", "epsilon", "unbiased", "shifted", "together", "group")
  return {name: fields[f"bn_{name}"] for name in names} | {"shards": shards}


def check_groups(group: str, *, examples: int, shards: int) -> None:
  """Refuse BN groups that do not lie evenly on the batch and on the devices.

  Args:
    group: `config.model.bn_group`.
    examples: of a micro-batch, over all devices.
    shards: parts that they are split in over devices.

  Raises:
    ValueError: one sentence that names the field.
  """
  if not group.isdigit():
    return
  if examples % int(group):
    raise ValueError(
      f"config.model.bn_group is {group}, which does not divide the {examples} examples of a "
      "micro-batch (config.global_batch_size over config.accumulation_steps)."
    )
  groups = examples // int(group)
  if max(groups, shards) % min(groups, shards):
    raise ValueError(
      f"config.model.bn_group is {group}, which makes {groups} groups that do not lie evenly on "
      f"the {shards} parts that the batch is split in over config.mesh.data and config.mesh.fsdp."
    )


def lost(ratio: float) -> float:
  """Return what E[x^2] - E[x]^2 in float32 loses, as a share of the variance.

  As measured: 0.2 % at a ratio of 100, 1.4 % at 300, 13 % at 1,000 (tests/parity/test_norm.py).

  Args:
    ratio: mean over standard deviation.
  """
  return min(1.0, 1.4e-7 * ratio**2)


def means_over_deviations(
  batch_stats: Mapping[str, Any], epsilon: float, path: str = ""
) -> dict[str, float]:
  """Return the largest ratio of mean to deviation in each batch norm, by its path.

  Args:
    batch_stats: nested dict of arrays on the host.
    epsilon: added to the variances.
    path: of `batch_stats` in the whole.
  """
  if not {"mean", "var"} <= batch_stats.keys():
    below = [
      means_over_deviations(part, epsilon, f"{path}/{name}".strip("/"))
      for name, part in batch_stats.items()
      if isinstance(part, Mapping)
    ]
    return {name: ratio for part in below for name, ratio in part.items()}
  ratios = np.abs(batch_stats["mean"]) / np.sqrt(batch_stats["var"] + epsilon)
  return {path: float(np.max(ratios))}


def use_batch(model: nnx.Module) -> None:
  """Make every batch norm of a model in evaluation mode use, and store, the moments of its batch.

  What it stores is that of the batch alone, whatever its groups in training.
  """
  model.set_attributes(
    BatchNorm,
    nnx.BatchNorm,
    raise_if_not_found=False,
    use_running_average=False,
    momentum=0.0,
    group="global",
  )


def as_rows(params: Any, batch_stats: Any) -> Any:
  """Return parameters with the scale and the bias [..., C] of every batch norm as [..., 1, C].

  With `together` the moments of a device have that form, and the compiler of TPUs then adds the
  gradients of scale and bias to those of other micro-batches where it computes them.

  Args:
    params: nested dict of arrays.
    batch_stats: likewise; where it has `mean` and `var`, those parameters are of a batch norm.
  """
  if isinstance(batch_stats.get("mean"), jax.Array):
    return {name: x[..., None, :] for name, x in params.items()}
  return {
    name: as_rows(part, batch_stats[name]) if name in batch_stats else part
    for name, part in params.items()
  }


def merge_moments(mean: Any, new: Any, count: jax.Array) -> Any:
  """Return the moments of `count` batches and one more of the same size.

  The variance is that of all their examples together: the mean of the variances, and the variance
  of the means.

  Args:
    mean: tree whose leaves are named `mean` and `var`, of `count` batches; ignored if that is 0.
    new: likewise, of one batch.
    count: int32 scalar.
  """
  if not isinstance(mean.get("mean"), jax.Array):
    return {name: merge_moments(mean[name], new[name], count) for name in mean}
  share = 1 / (count + 1).astype(mean["mean"].dtype)
  distance = new["mean"] - mean["mean"]
  between = share * (1 - share) * jnp.square(distance)
  return {
    "mean": (1 - share) * mean["mean"] + share * new["mean"],
    "var": (1 - share) * mean["var"] + share * new["var"] + between,
  }


def _share(moments: jax.Array, groups: int) -> jax.Array:
  """Replace the moments [cells, C] of each cell by the mean over the cells of its group."""
  split = moments.reshape(groups, -1, moments.shape[-1])
  return jnp.broadcast_to(jnp.mean(split, axis=1, keepdims=True), split.shape).reshape(
    moments.shape
  )


class Joined(NamedTuple):
  """Running averages of all layers, those of groups in one array.

  Attributes:
    single: as the tree of them, with None for those of groups.
    grouped: [groups, values], those of a layer behind those of another; None if none has groups.
  """

  single: Any
  grouped: jax.Array | None


def join_groups(batch_stats: Any, like: Any) -> Joined:
  """Join what a step has made of running averages.

  Args:
    batch_stats: tree of arrays after a step, [groups, C] where a BatchNorm has several groups, or
      [blocks, groups, C] of stacked blocks.
    like: the same tree before the step, without groups.
  """
  single = jax.tree.map(lambda x, old: x if x.ndim == old.ndim else None, batch_stats, like)
  grouped = [
    jnp.moveaxis(x, -2, 0).reshape(x.shape[-2], -1)
    for x, old in zip(jax.tree.leaves(batch_stats), jax.tree.leaves(like), strict=True)
    if x.ndim > old.ndim
  ]
  return Joined(single, jnp.concatenate(grouped, axis=1) if grouped else None)


def average_groups(joined: Joined, like: Any) -> Any:
  """Return the running averages [C] of all layers, the mean over groups where there are several.

  Nothing in a step waits for that mean, and being of one array it costs a step one all-reduce.

  Args:
    joined: after a step.
    like: the tree of running averages before it.
  """
  if joined.grouped is None:
    return joined.single
  leaves, structure = jax.tree.flatten(like)
  single = jax.tree.leaves(joined.single, is_leaf=lambda x: x is None)
  grouped = [old for old, alone in zip(leaves, single, strict=True) if alone is None]
  ends = np.cumsum([old.size for old in grouped])
  parts = iter(jnp.split(jnp.mean(joined.grouped, axis=0), ends[:-1]))
  means = [
    next(parts).reshape(old.shape) if alone is None else alone
    for old, alone in zip(leaves, single, strict=True)
  ]
  return jax.tree.unflatten(structure, means)


def for_groups(average: jax.Array, like: jax.ShapeDtypeStruct) -> jax.Array:
  """Return a running average [..., C] as [..., groups, C] if `like` has groups."""
  if len(like.shape) > average.ndim:
    average = average[..., None, :]
  return jnp.broadcast_to(average, like.shape)
