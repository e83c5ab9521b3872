"""Options of XLA without which a program is slow, or wrong."""

from collections.abc import Callable
import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import jaxlib.version

Options = dict[str, str | bool]

# Without it the compiler computes a gradient that is wanted in shards by one convolution for each
# shard, in a loop that passes the sums around a ring. With 4 of 64 channels at a time that leaves
# the matrix units empty.
_TPU_TRAINING: Options = {"xla_tpu_enable_windowed_einsum_for_reduce_scatter": "false"}
# Without it the compiler (libtpu 0.0.42) splits the sum over slices of a large kernel over few of
# the chips of each slice, 16 of 256 for instance, which send a sixteenth each. What is smaller than
# this it joins, and each chip sends its part of that.
_TPU_SLICES: Options = {"xla_tpu_dcn_all_reduce_combiner_threshold_bytes": str(2**22)}
# From jaxlib 0.11 on, sums and products go to YNNPACK together with what feeds them. In bfloat16
# it then returns numbers of 1e33 for the mean of a 1x1 convolution of the sum of two batch norms
# with ReLU, which ends MDEQ (seen with 0.11.2 and 0.12.0). No option of 0.10 has this name.
_CPU: Options = {"xla_cpu_experimental_ynn_fusion_type": ""}
_FUSES = tuple(int(part) for part in jaxlib.version.__version__.split(".")[:2]) >= (0, 11)


def options(platform: str, *, training: bool = False, slices: bool = False) -> Options:
  """Return what to compile with, for `jax.jit` or `jax.stages.Lowered.compile`.

  Args:
    platform: of the devices, as "tpu".
    training: whether the program is a training step.
    slices: whether the devices are of several slices.
  """
  if platform == "tpu" and training:
    return _TPU_TRAINING | (_TPU_SLICES if slices else {})
  return _CPU if platform == "cpu" and _FUSES else {}


def parse(words: str) -> Options:
  """Return the options of `config.compiler_options`, as in "xla_a=0.55 xla_b=true"."""
  pairs = (word.split("=", 1) for word in words.split())
  booleans = {"true": True, "false": False}
  return {name: booleans.get(value.lower(), value) for name, value in pairs}


def jit(function: Callable[..., Any]) -> jax.stages.Wrapped:
  """Return `jax.jit` of a function, with the options for the devices of this process."""
  return jax.jit(function, compiler_options=options(jax.default_backend()))


def before_widening(function: Callable[..., Any], *arguments: Any) -> Any:
  """Return the dtypes of what a function returns, of floats those before it widened them at last.

  The gradient of a parameter that is cast to bfloat16 first is computed in bfloat16 and then cast
  to float32: bfloat16 holds it without loss.
  """
  jaxpr, returned = jax.make_jaxpr(function, return_shape=True)(*arguments)
  equation_of = {id(each): equation for equation in jaxpr.eqns for each in equation.outvars}

  def dtype(variable: Any) -> jnp.dtype:
    after: jnp.dtype = variable.aval.dtype
    equation = equation_of.get(id(variable))
    name = equation.primitive.name if equation else ""
    if equation is None or name not in ("sharding_constraint", "convert_element_type"):
      return after
    (of,) = equation.invars
    if name == "sharding_constraint":
      return dtype(of)
    before: jnp.dtype = of.aval.dtype
    is_float = jnp.issubdtype(before, jnp.inexact)
    return before if is_float and jnp.promote_types(before, after) == after else after

  return jax.tree.unflatten(jax.tree.structure(returned), map(dtype, jaxpr.jaxpr.outvars))


def one_in(steps: int) -> contextlib.AbstractContextManager[None]:
  """Name a `lax.cond` inside as one whose dearest branch is taken once in so many steps.

  Nothing but the names of operations changes, by which trainer.tools.tpu_cost weighs the branches.
  """
  return jax.named_scope(f"one_in_{steps}")


def one_round() -> contextlib.AbstractContextManager[None]:
  """Name a loop inside as one that turns once, though its program does not say so."""
  return jax.named_scope("one_round")
