"""MDEQ: one block of several resolutions, applied until nothing changes (arXiv:2006.08656).

A stem makes features x of the image. The function f takes maps z of every resolution and x to new
maps: a residual block for each resolution, then each resolution becomes the sum over all of them.
The head sees the fixed point z = f(z, x), which solvers of equilibrium.py find from 0; its gradient
is the implicit one. So memory does not depend on the iterations, and all layers share their
weights.

What has to be equal in all iterations, else there is no fixed point, is made once a step: kernels
of a length of their own, and the mask of dropout. Norms in f are of groups of channels of an
example. The state of the solvers and norms are float32 at least, convolutions of the dtype of the
config. Departs from the public code: the head sees the fixed point itself in training too, where
that applies f once more; and examples are done one by one, not the batch.
"""

from collections.abc import Mapping
import functools
from typing import Any, ClassVar, NamedTuple, Self

from flax import nnx
import jax
import jax.numpy as jnp

from configs.fields import Fields
from trainer.models import equilibrium, norm
from trainer.models.convolution import convolve, dense
from trainer.models.equilibrium import Solution, Solver, State
from trainer.models.family import ENDLESS, AuxiliaryLoss, Family, Metric, StepsTaken, sow
from trainer.models.layers import Layers, scaled
from trainer.models.mdeq_fields import MDEQ as FIELDS
from trainer.models.mdeq_fields import VARIANTS

GROUPS = 8  # of channels, in norms of the function; the last ones have half as many
_EPSILON = 1e-5
_SMALL = nnx.initializers.normal(0.01)
# Kernels with a length of their own, and the head, start as those of torch do.
_UNIFORM = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")


class _Layers(Layers):
  """Convolutions and batch norms of stem and head, which start at N(0, 0.01)."""

  def small_conv(
    self, inputs: int, outputs: int, kernel: int, stride: int = 1, *, bias: bool = False
  ) -> nnx.Conv:
    """Return a square convolution."""
    return nnx.Conv(
      inputs,
      outputs,
      (kernel, kernel),
      strides=stride,
      padding=kernel // 2,
      use_bias=bias,
      dtype=self.dtype,
      param_dtype=self.param_dtype,
      rngs=self.rngs,
      kernel_init=_SMALL,
      bias_init=_SMALL,
      conv_general_dilated=dense,
    )

  def plain_norm(self, channels: int) -> norm.BatchNorm:
    """Return a batch norm without scale and bias."""
    return norm.BatchNorm(
      channels, dtype=self.dtype, zero_scale=False, affine=False, **self.norm_options
    )


class Kernel(nnx.Module):
  """A square kernel, of a length of its own for each output channel if it has a gain.

  Args:
    inputs: channels that come in.
    outputs: channels that go out.
    size: height and width.
    layers: of the net.
    gained: whether length and direction are apart (weight normalisation, arXiv:1602.07868).
  """

  def __init__(self, inputs: int, outputs: int, size: int, layers: Layers, *, gained: bool = False):
    draw = _UNIFORM if gained else _SMALL
    kernel = draw(layers.rngs.params(), (size, size, inputs, outputs), layers.param_dtype)
    self.kernel = nnx.Param(kernel)
    self.gained = gained
    if gained:
      self.gain = nnx.Param(_lengths(kernel))

  def arrays(self) -> jax.Array:
    """Return the kernel [h, w, in, out] that is convolved with."""
    kernel = self.kernel.get_value()
    return kernel * (self.gain.get_value() / _lengths(kernel)) if self.gained else kernel


def _lengths(kernel: jax.Array) -> jax.Array:
  return jnp.sqrt(jnp.sum(jnp.square(kernel), axis=(0, 1, 2)))


class Affine(nnx.Module):
  """Scale and bias of a group norm."""

  def __init__(self, channels: int, layers: Layers):
    self.scale = nnx.Param(jnp.ones(channels, layers.param_dtype))
    self.bias = nnx.Param(jnp.zeros(channels, layers.param_dtype))

  def arrays(self) -> tuple[jax.Array, jax.Array]:
    """Return both."""
    return self.scale.get_value(), self.bias.get_value()


class Shape(NamedTuple):
  """What the function f is, beside its arrays.

  Attributes:
    channels: of each resolution, the highest first.
    expansion: channels inside a residual block over those around it.
    weight_norm: whether kernels of residual blocks and behind the sums have a gain.
    post_affine: whether the last norms have scale and bias.
    dtype: of convolutions.
  """

  channels: tuple[int, ...]
  expansion: int
  weight_norm: bool
  post_affine: bool
  dtype: jnp.dtype


class Function(nnx.Module):
  """The parameters of f: what `function` computes with."""

  def __init__(self, shape: Shape, layers: Layers):
    gained = functools.partial(Kernel, layers=layers, gained=shape.weight_norm)
    channels = shape.channels
    names = []

    def keep(name: str, module: Kernel | Affine) -> None:
      setattr(self, name, module)
      names.append(name)

    for i, c in enumerate(channels):
      inner = shape.expansion * c
      keep(f"branch{i}_conv1", gained(c, inner, 3))
      keep(f"branch{i}_norm1", Affine(inner, layers))
      keep(f"branch{i}_conv2", gained(inner, c, 3))
      keep(f"branch{i}_norm2", Affine(c, layers))
      keep(f"branch{i}_norm3", Affine(c, layers))
    for i, c in enumerate(channels):
      for j, source in enumerate(channels):
        for k in range(i - j):  # halvings, of which the last changes the channels
          outputs = c if k == i - j - 1 else source
          keep(f"fuse{j}to{i}_conv{k}", Kernel(source, outputs, 3, layers))
          keep(f"fuse{j}to{i}_norm{k}", Affine(outputs, layers))
        if j > i:
          keep(f"fuse{j}to{i}_conv0", Kernel(source, c, 1, layers))
          keep(f"fuse{j}to{i}_norm0", Affine(c, layers))
      keep(f"post{i}_conv", gained(c, c, 1))
      if shape.post_affine:
        keep(f"post{i}_norm", Affine(c, layers))
    self.names = tuple(names)

  def arrays(self) -> dict[str, Any]:
    """Return the arrays by the names of the layers, to be made once a step."""
    return {name: getattr(self, name).arrays() for name in self.names}


def function(shape: Shape, args: Mapping[str, Any], z: State) -> State:
  """Return f(z): figure 2 of arXiv:2006.08656.

  Args:
    shape: of the net.
    args: "arrays" of Function; "injection", what the stem makes of the images, in the shape of the
      first of z; and "masks", a factor [N, 1, 1, C] for each resolution, or () for none.
    z: maps [N, H, W, C], of half the height and width each.
  """
  arrays, masks = args["arrays"], args["masks"]

  def conv(x: jax.Array, name: str, stride: int = 1) -> jax.Array:
    kernel = arrays[name].astype(shape.dtype)
    return convolve(x.astype(shape.dtype), kernel, stride, [(kernel.shape[0] // 2,) * 2] * 2)

  def normalise(x: jax.Array, name: str, groups: int = GROUPS) -> jax.Array:
    return group_norm(x.astype(z[0].dtype), arrays.get(name), groups)

  branches = []
  for i, x in enumerate(z):
    y = nnx.relu(normalise(conv(x, f"branch{i}_conv1"), f"branch{i}_norm1"))
    y = conv(y, f"branch{i}_conv2").astype(x.dtype)
    if masks:
      y = y * masks[i]
    if i == 0:
      y = y + args["injection"]
    y = normalise(y, f"branch{i}_norm2")
    branches.append(normalise(nnx.relu(y + x), f"branch{i}_norm3"))
  new = []
  for i in range(len(z)):
    total = jnp.zeros_like(z[i])
    for j, y in enumerate(branches):
      name = f"fuse{j}to{i}"
      for k in range(i - j):
        y = normalise(conv(nnx.relu(y) if k else y, f"{name}_conv{k}", 2), f"{name}_norm{k}")
      if j > i:
        y = _enlarge(normalise(conv(y, f"{name}_conv0"), f"{name}_norm0"), 2 ** (j - i))
      total = total + y
    total = conv(nnx.relu(total), f"post{i}_conv")
    new.append(normalise(total, f"post{i}_norm", GROUPS // 2))
  return tuple(new)


def group_norm(x: jax.Array, affine: tuple[jax.Array, jax.Array] | None, groups: int) -> jax.Array:
  """Return x [N, H, W, C] with mean 0 and variance 1 in each group of channels of an example.

  Args:
    x: maps, in float32 or float64.
    affine: scale and bias [C] that follow, or None.
    groups: neighbouring channels are in one.
  """
  n, _, _, c = x.shape

  # Channel by channel first: an axis of the few channels of a group a TPU would pad to 128.
  def mean(x: jax.Array) -> jax.Array:
    of_groups = jnp.mean(jnp.mean(x, axis=(1, 2)).reshape(n, groups, c // groups), axis=2)
    return jnp.repeat(of_groups, c // groups, axis=1)[:, None, None]

  x = x - mean(x)
  x = x * jax.lax.rsqrt(mean(jnp.square(x)) + _EPSILON)
  return x if affine is None else x * affine[0] + affine[1]


def _enlarge(x: jax.Array, times: int) -> jax.Array:
  """Return x [N, H, W, C] with each pixel as `times` x `times` of its kind."""
  n, h, w, c = x.shape
  x = jnp.broadcast_to(x[:, :, None, :, None], (n, h, times, w, times, c))
  return x.reshape(n, times * h, times * w, c)


class Bottleneck(nnx.Module):
  """A bottleneck of the head; its batch norms have no scale and bias but in the shortcut."""

  def __init__(self, inputs: int, inner: int, layers: _Layers):
    outputs = 4 * inner
    self.conv1 = layers.small_conv(inputs, inner, 1)
    self.bn1 = layers.plain_norm(inner)
    self.conv2 = layers.small_conv(inner, inner, 3)
    self.bn2 = layers.plain_norm(inner)
    self.conv3 = layers.small_conv(inner, outputs, 1)
    self.bn3 = layers.plain_norm(outputs)
    self.projects = inputs != outputs
    if self.projects:
      self.projection_conv = layers.small_conv(inputs, outputs, 1)
      self.projection_bn = layers.norm(outputs)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Return [N, H, W, 4 * inner]."""
    y = nnx.relu(self.bn1(self.conv1(x)))
    y = nnx.relu(self.bn2(self.conv2(y)))
    shortcut = self.projection_bn(self.projection_conv(x)) if self.projects else x
    return nnx.relu(self.bn3(self.conv3(y)) + shortcut)


class MDEQ(Family):
  """Stem, fixed point of several resolutions, head that joins them."""

  FIELDS: ClassVar[Fields] = FIELDS
  TRIAL: ClassVar[Mapping[str, Any]] = {
    "variant": "tiny",
    "width": 0.25,
    "expansion": 1,
    "forward_iterations": 4,
    "backward_iterations": 4,
    "unrolled_layers": 2,
  }
  METRICS: ClassVar[tuple[str, ...]] = ("residual", "iterations", "jacobian_loss")

  @classmethod
  def describe(cls, fields: Mapping[str, Any]) -> str:
    """Return "MDEQ-tiny, solver anderson" and the like."""
    return cls.titled(f"MDEQ-{fields['variant']}", fields, "variant")

  @classmethod
  def check_image(cls, fields: Mapping[str, Any], *, name: str, size: int, space: int) -> None:
    """Refuse sizes that the resolutions do not divide; see Family."""
    del space
    variant = VARIANTS[fields["variant"]]
    step = 2 ** (variant.halvings + len(variant.channels) - 1)
    if size % step:
      raise ValueError(
        f"{name} has {size} pixels, which the lowest resolution of config.model.variant = "
        f"{fields['variant']!r}, 1/{step} of it, does not divide; the nearest that fits is "
        f"{max(1, round(size / step)) * step}."
      )

  @classmethod
  def check_split(cls, fields: Mapping[str, Any], *, examples: int, shards: int) -> None:
    """Refuse BN groups that do not lie evenly on the batch and on the devices; see Family."""
    norm.check_groups(fields["bn_group"], examples=examples, shards=shards)

  @classmethod
  def build(
    cls,
    fields: Mapping[str, Any],
    *,
    num_classes: int,
    dtype: jax.typing.DTypeLike,
    image_size: int,
    shards: int,
    rngs: nnx.Rngs,
  ) -> Self:
    """Return a new model; see Family."""
    cls.check_image(fields, name="config.data.image_size", size=image_size, space=1)
    layers = _Layers(
      dtype,
      False,
      rngs,
      **norm.options(fields, shards),
    )
    return cls(fields, num_classes, layers)

  def __init__(self, fields: Mapping[str, Any], num_classes: int, layers: _Layers):
    """Build stem, function and head.

    Args:
      fields: values of FIELDS.
      num_classes: of the head.
      layers: maker of convolutions and norms.
    """
    variant, width = VARIANTS[fields["variant"]], fields["width"]
    channels = tuple(max(1, round(c * width / GROUPS)) * GROUPS for c in variant.channels)
    heads = [scaled(c, width) for c in variant.head]
    self.dtype, self.wide = layers.dtype, layers.param_dtype
    first = channels[0]
    strides = [2 if i < variant.halvings else 1 for i in range(2)]
    self.stem_conv1 = layers.small_conv(3, first, 3, strides[0])
    self.stem_bn1 = layers.norm(first)
    self.stem_conv2 = layers.small_conv(first, first, 3, strides[1])
    self.stem_bn2 = layers.norm(first)
    self.injects = variant.halvings > 0 or len(channels) > 2
    if self.injects:
      self.inject_conv = layers.small_conv(first, first, 1)
      self.inject_bn = layers.norm(first)
    self.shape = Shape(
      channels, fields["expansion"], fields["weight_norm"], variant.post_affine, self.dtype
    )
    self.function = Function(self.shape, layers)
    for i, (inputs, inner) in enumerate(zip(channels, heads, strict=True)):
      setattr(self, f"head{i}", Bottleneck(inputs, inner, layers))
      if i:
        outputs = 4 * inner
        setattr(
          self, f"join{i}_conv", layers.small_conv(4 * heads[i - 1], outputs, 3, 2, bias=True)
        )
        setattr(self, f"join{i}_bn", layers.norm(outputs))
    final = scaled(variant.final, width)
    self.final_conv = layers.small_conv(4 * heads[-1], final, 1, bias=True)
    self.final_bn = layers.norm(final)
    bound = nnx.initializers.uniform(2 * final**-0.5)
    self.head = layers.linear(
      final,
      num_classes,
      kernel_init=_UNIFORM,
      bias_init=lambda *args: bound(*args) - final**-0.5,
    )
    self.solvers = tuple(
      Solver(
        fields["solver"],
        fields[iterations],
        fields["stop"],
        fields["tolerance"],
        fields["anderson_history"],
        fields["anderson_ridge"],
        fields["anderson_damping"],
      )
      for iterations in ("forward_iterations", "backward_iterations")
    )
    self.phantom = fields["gradient"] == "phantom"
    self.phantom_steps, self.phantom_damping = fields["phantom_steps"], fields["phantom_damping"]
    self.unrolled_steps, self.layers = fields["unrolled_steps"], fields["unrolled_layers"]
    self.jacobian_weight = fields["jacobian_weight"]
    self.jacobian_share, self.jacobian_steps = fields["jacobian_share"], fields["jacobian_steps"]
    # In the state whether it is used or not, so that a resume may change the fields that use it.
    self.steps_taken = StepsTaken(jnp.int32(ENDLESS))
    self.deterministic = False  # the name that nnx.Module.train() and eval() look for
    # Streams exist only where they are drawn from; they are seeded anew in each step.
    self.dropout = fields["dropout"]
    if self.dropout:
      self.masks = layers.rngs.dropout.fork()
    if self.jacobian_weight:
      self.probes = layers.rngs.jacobian.fork()

  def inputs(self, x: jax.Array) -> tuple[dict[str, Any], State]:
    """Return the first arguments of `function` for images, and the maps that solvers start from.

    Args:
      x: normalised images, floating point [N, H, W, 3].
    """
    x = nnx.relu(self.stem_bn1(self.stem_conv1(x.astype(self.dtype))))
    x = nnx.relu(self.stem_bn2(self.stem_conv2(x)))
    if self.injects:
      x = nnx.relu(self.inject_bn(self.inject_conv(x)))
    n, h, w, _ = x.shape
    channels, masks = self.shape.channels, ()
    if self.dropout and not self.deterministic:
      masks = tuple(
        jax.random.bernoulli(self.masks(), 1 - self.dropout, (n, 1, 1, c)).astype(self.wide)
        / (1 - self.dropout)
        for c in channels
      )
    start = tuple(jnp.zeros((n, h >> i, w >> i, c), self.wide) for i, c in enumerate(channels))
    injection = x.astype(self.wide)
    return {"arrays": self.function.arrays(), "injection": injection, "masks": masks}, start

  def fixed_point(self, args: Mapping[str, Any], start: State) -> Solution:
    """Return the fixed point, or in the first steps of a run what so many layers make of `start`.

    Args:
      args: what `inputs` has returned.
      start: likewise.
    """
    f = functools.partial(function, self.shape)

    def solved(args: Mapping[str, Any], start: State) -> Solution:
      if not self.phantom or self.deterministic:
        return equilibrium.fixed_point(f, *self.solvers, args, start)
      fixed = jax.lax.stop_gradient(args)
      found = equilibrium.solve(functools.partial(f, fixed), start, self.solvers[0])
      near = equilibrium.unroll(f, self.phantom_steps, self.phantom_damping, args, found.z)
      return found._replace(z=near.z)

    if not self.unrolled_steps:
      return solved(args, start)
    # Layers are computed anew in the backward pass, which keeps nothing of a branch not taken.
    return jax.lax.cond(
      self.steps_taken.get_value() <= self.unrolled_steps,
      jax.checkpoint(functools.partial(equilibrium.unroll, f, self.layers, 1.0)),
      solved,
      args,
      start,
    )

  def _sow(self, args: Mapping[str, Any], found: Solution) -> None:
    """Leave behind the loss of the Jacobian, and how well the equation was solved."""
    loss = jnp.zeros((), self.wide)
    if self.jacobian_weight:
      key, draw = self.probes(), self.probes()
      chosen = jax.random.uniform(draw) < self.jacobian_share
      if self.jacobian_steps:
        chosen &= self.steps_taken.get_value() <= self.jacobian_steps
      estimate = functools.partial(
        equilibrium.jacobian_loss, functools.partial(function, self.shape)
      )
      z = jax.lax.stop_gradient(found.z)
      loss = jax.lax.cond(chosen, estimate, lambda *_: loss, args, z, key)
      sow(self, AuxiliaryLoss, "auxiliary_loss", self.jacobian_weight * loss)
    residual = jnp.mean(jax.lax.stop_gradient(found.residual))
    iterations = jnp.mean(found.iterations.astype(self.wide))
    for name, value in zip(
      self.METRICS, (residual, iterations, jax.lax.stop_gradient(loss)), strict=True
    ):
      sow(self, Metric, name, value)

  def classify(self, z: State) -> jax.Array:
    """Return the logits of maps of all resolutions."""
    y, *others = [getattr(self, f"head{i}")(x.astype(self.dtype)) for i, x in enumerate(z)]
    for i, x in enumerate(others, 1):
      joined = getattr(self, f"join{i}_bn")(getattr(self, f"join{i}_conv")(y))
      y = x + nnx.relu(joined)
    y = nnx.relu(self.final_bn(self.final_conv(y)))
    return self.head(jnp.mean(y, axis=(1, 2), dtype=self.wide))

  def __call__(self, x: jax.Array) -> jax.Array:
    """Return float32 logits [N, num_classes].

    Args:
      x: normalised images, floating point [N, H, W, 3].
    """
    args, start = self.inputs(x)
    found = self.fixed_point(args, start)
    if not self.deterministic:
      self._sow(args, found)
    return self.classify(found.z)
