"""Parts of a model that are not trained, or at a rate of their own: for fine-tuning.

`config.optimizer.freeze` names parameters that stay as they are: they have no gradient, no weight
decay, and no place in the state of the optimizer or in the norm that clips the gradient. A batch
norm whose parameters are all frozen computes as in evaluation, by its running averages, which stay
as well: a frozen trunk is then the same function in training as in evaluation.

`config.optimizer.lr_scales` multiplies the whole update of a parameter, its decay included, as the
rate of a parameter group does in torch.
"""

from collections.abc import Sequence
import functools
import re
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import ml_collections
import optax

from trainer.errors import ConfigError
from trainer.models import packing
from trainer.models.norm import BatchNorm
from trainer.state import Params, Tree, by_path, path_name

_SHOWN = 3  # parameters in a message


def parse_scales(text: str) -> list[tuple[str, float]]:
  """Return the (pattern, factor) pairs of `config.optimizer.lr_scales`.

  Raises:
    ValueError: one sentence that names the field.
  """
  pairs = []
  for entry in filter(None, (part.strip() for part in text.split(","))):
    pattern, _, number = entry.rpartition(":")
    try:
      re.compile(pattern)
      factor = float(number)
    except (re.error, ValueError):
      factor = 0.0
    if not (pattern and 0 < factor < float("inf")):
      raise ValueError(
        f"config.optimizer.lr_scales has {entry!r}, which is no PATTERN:FACTOR with a regular "
        "expression without commas and a positive factor; '^head/:10, ^stem:0.1' is one."
      )
    pairs.append((pattern, factor))
  return pairs


def check(config: ml_collections.ConfigDict, params: Params) -> None:
  """Refuse patterns that no parameter matches, and a run in which nothing is trained.

  Args:
    config: a validated config.
    params: of the model; may be abstract.

  Raises:
    ConfigError: one sentence that names the field.
  """
  paths = list(by_path(params))
  names = [name for path in paths for name in packing.names(path)]
  fields = config.optimizer
  wanted = [("freeze", fields.freeze)] if fields.freeze else []
  wanted += [("lr_scales", pattern) for pattern, _ in parse_scales(fields.lr_scales)]
  for field, pattern in wanted:
    if not any(re.search(pattern, name) for name in names):
      raise ConfigError(
        f"config.optimizer.{field} has {pattern!r}, which is in the path of no parameter; they are "
        f"{', '.join(names[:_SHOWN])}, ..."
      )
  if fields.freeze and all(re.search(fields.freeze, name) for name in names):
    raise ConfigError(
      f"config.optimizer.freeze is {fields.freeze!r}, which matches every parameter; nothing would "
      "be trained."
    )
  for field in ("freeze", "no_decay", "no_agc"):
    if fields[field]:
      check_packed(f"optimizer.{field}", fields[field], paths)


def check_packed(field: str, pattern: str, paths: Sequence[str]) -> None:
  """Refuse a pattern that takes some of the blocks that are one block in a loop.

  Raises:
    ConfigError: one sentence that names the field.
  """
  for path in paths:
    if len({bool(re.search(pattern, name)) for name in packing.names(path)}) > 1:
      stage = path.partition("block")[0].rstrip("_") or "the net"
      raise ConfigError(
        f"config.{field} is {pattern!r}, which does not take the blocks of {stage} "
        "alike; config.model.scan runs them as one: name all of them, or set it to False."
      )


def wrap(
  config: ml_collections.ConfigDict, rule: optax.GradientTransformation
) -> optax.GradientTransformation:
  """Return the rule for the parameters that are trained, with their factors.

  Without `freeze` the state is that of the rule itself.
  """
  fields = config.optimizer
  if scales := parse_scales(fields.lr_scales):
    rule = _scaled(rule, scales)
  if fields.freeze:
    rules = {True: rule, False: optax.set_to_zero()}
    rule = optax.partition(rules, functools.partial(trained, fields.freeze))
  return rule


def _scaled(
  rule: optax.GradientTransformation, scales: Sequence[tuple[str, float]]
) -> optax.GradientTransformation:
  def factor(name: str) -> float:
    return next((factor for pattern, factor in scales if re.search(pattern, name)), 1.0)

  def scale(path: tuple[object, ...], update: jax.Array) -> jax.Array:
    first, *others = map(factor, packing.names(path_name(path)))
    if any(other != first for other in others):
      blocks = jnp.array([first, *others], update.dtype)
      return update * blocks.reshape(-1, *[1] * (update.ndim - 1))
    return update if first == 1.0 else update * first

  def update(
    updates: optax.Updates, state: optax.OptState, params: optax.Params | None = None
  ) -> tuple[optax.Updates, optax.OptState]:
    updates, state = rule.update(updates, state, params)
    return jax.tree.map_with_path(scale, updates), state

  return optax.GradientTransformation(rule.init, update)


def trained(pattern: str, params: Params) -> Tree:
  """Return whether each parameter is trained, as a tree of `params`' form; "" leaves them all."""
  return _map(params, lambda name, _: not (pattern and re.search(pattern, name)))


def frozen(pattern: str, params: Params) -> dict[str, Any]:
  """Return the parameters that match, by path."""
  return {name: leaf for name, leaf in by_path(params).items() if re.search(pattern, name)}


def stop_gradients(pattern: str, params: Params) -> Params:
  """Return the parameters, without a gradient for those that match; "" leaves them all."""
  if not pattern:
    return params
  return _map(params, lambda name, x: jax.lax.stop_gradient(x) if re.search(pattern, name) else x)


def freeze_norms(pattern: str, model: nnx.Module) -> None:
  """Put each batch norm in evaluation mode whose parameters all match; "" leaves them all."""
  for path, module in nnx.iter_modules(model) if pattern else ():
    if isinstance(module, BatchNorm | nnx.BatchNorm):
      own = [(*path, *inner) for inner, _ in nnx.to_flat_state(nnx.state(module, nnx.Param))]
      if own and all(re.search(pattern, "/".join(map(str, name))) for name in own):
        module.eval()


def _map(tree: Tree, function: Any) -> Tree:
  """Map function(name, leaf) over a tree of parameters; stacked blocks go by the first one's."""
  return jax.tree.map_with_path(
    lambda path, leaf: function(packing.names(path_name(path))[0], leaf), tree
  )
