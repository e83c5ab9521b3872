"""Sparse training: masks in the state, and the steps that change them; see README.md here.

To add a method, give it a name in configs/sparsity_fields.py and a branch in `Sparse._changed`.
"""

from collections.abc import Callable, Mapping
import dataclasses
from typing import NamedTuple
import zlib

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax

from configs import base, sparsity_fields
from trainer import compiler
from trainer.errors import ConfigError
from trainer.models import packing
from trainer.sparse import layers as layers_lib
from trainer.sparse import select
from trainer.state import Params, TrainState, Tree, by_path, path_name

# Arrays of sparse leaves by their path.
Leaves = dict[str, jax.Array]

METRICS = ("density", "mask_changed")


class Update(NamedTuple):
  """What a training step makes of its gradient.

  Attributes:
    grads: that the optimizer was given.
    params: the new ones.
    opt_state: likewise.
    masks: likewise.
    metrics: of METRICS: the share of weights that are not zero after the step, and of those whose
      mask it has changed; of all weights that `config.sparsity.leaves` names.
  """

  grads: Params
  params: Params
  opt_state: optax.OptState
  masks: Tree
  metrics: list[jax.Array]


@dataclasses.dataclass(frozen=True)
class Sparse:
  """The sparse weights of a run.

  A mask is a bool leaf beside its parameter, True where the weight is not zero. Dense layers have
  none.

  Attributes:
    config: a validated config.
    layers: all that may be sparse.
    begin: counted step of the first change.
    end: of the last.
    offset: added to the steps taken, gives the counted steps; see trainer.config.Durations.
  """

  config: ml_collections.ConfigDict
  layers: list[layers_lib.Layer]
  begin: int
  end: int
  offset: int = 0

  @property
  def size(self) -> int:
    """Weights that `config.sparsity.leaves` names."""
    return sum(layer.size for layer in self.layers)

  @property
  def kept(self) -> int:
    """Those of them that are not zero, of a gradual run at its end."""
    return sum(layer.kept for layer in self.layers)

  @property
  def _kept(self) -> Mapping[str, int]:
    return {layer.name: layer.kept for layer in self.layers if not layer.dense}

  def draw(self, params: Params) -> Tree:
    """Return the masks of step 0: a random choice by `config.seed`; of a gradual run all ones.

    Args:
      params: of the model, in the form that the steps have.
    """
    return self._select(params, lambda leaves: self._random(leaves, jnp.int32(0)))

  def of_weights(self, params: Params) -> Tree:
    """Return the masks of a run that begins with these weights: the largest of each layer."""
    return self._select(params, lambda leaves: _each(select.magnitudes, leaves))

  def _select(self, params: Params, scores: Callable[[Leaves], Leaves]) -> Tree:
    leaves = self._sparse_leaves(params)
    ones = _each(lambda leaf: jnp.ones(leaf.shape, bool), leaves)
    if self.config.sparsity.name == "gradual":
      return nested(ones)
    return nested(_largest(scores(leaves), ones, self._final_counts(leaves)))

  def with_masks(
    self, init: Callable[[], TrainState], optimizer: optax.GradientTransformation
  ) -> Callable[[], TrainState]:
    """Return a function that makes the state of step 0 with masks, from one without."""

    def masked() -> TrainState:
      state = init()
      return self.started(state, optimizer, self.draw(state.params))

    return masked

  def started(
    self, state: TrainState, optimizer: optax.GradientTransformation, masks: Tree
  ) -> TrainState:
    """Return a state of step 0 with these masks on its weights and their averages."""
    params = apply(masks, state.params)
    ema = state.ema and state.ema | {"params": apply(masks, state.ema["params"])}
    opt_state = optimizer.init(params)
    return dataclasses.replace(state, params=params, opt_state=opt_state, ema=ema, masks=masks)

  def step(
    self,
    optimizer: optax.GradientTransformation,
    grads: Params,
    params: Params,
    state: TrainState,
  ) -> Update:
    """Take the step of the optimizer, or change the masks.

    A step that changes masks takes the gradient of all weights, zero or not, and no step of the
    optimizer, whose counts go on: so do the authors of RigL.

    The choice is a branch and not a second program: the usual steps compute nothing of it, and
    nothing more is compiled.

    Args:
      optimizer: of the run.
      grads: of all weights, over the whole batch.
      params: as the optimizer takes them.
      state: before the step.
    """
    masks, own = state.masks, apply(state.masks, grads)

    def take(grads: Params, masks: Tree) -> tuple[Params, optax.OptState, Tree]:
      updates, opt_state = optimizer.update(apply(masks, grads), state.opt_state, params)
      # An optimizer that moves a weight of gradient 0 shall not make it denser.
      return apply(masks, optax.apply_updates(params, updates)), opt_state, masks

    def change(grads: Params, masks: Tree) -> tuple[Params, optax.OptState, Tree]:
      new = self._changed(grads, params, by_path(masks), state.step)
      # Of the optimizer's step only its counts are kept.
      _, counted = optimizer.update(apply(masks, grads), state.opt_state, params)
      opt_state = self._restarted(
        state.opt_state, counted, optimizer.init(params), params, by_path(masks), new
      )
      masks = nested(new)
      return apply(masks, params), opt_state, masks

    if self.config.sparsity.name == "static":
      params, opt_state, new = take(grads, masks)
    else:
      with compiler.one_in(self.config.sparsity.every_steps):
        params, opt_state, new = jax.lax.cond(self.due(state.step), change, take, grads, masks)
    return Update(own, params, opt_state, new, self._metrics(masks, new))

  def due(self, step: jax.Array) -> jax.Array:
    """Whether the step after so many steps taken changes the masks."""
    count = step + self.offset
    on_time = (count - self.begin) % self.config.sparsity.every_steps == 0
    if self.config.sparsity.name == "gradual":
      on_time |= count == self.end
    return on_time & (count >= self.begin) & (count <= self.end)

  def mask_averages(self, ema: dict[str, Tree], masks: Tree, step: jax.Array) -> dict[str, Tree]:
    """Return averaged weights without those that this step has dropped.

    Between changes the average of a zero stays one.
    """
    if self.config.sparsity.name == "static":
      return ema
    with compiler.one_in(self.config.sparsity.every_steps):
      params = jax.lax.cond(self.due(step), apply, lambda _, params: params, masks, ema["params"])
    return ema | {"params": params}

  def drop_fraction(self, step: jax.Array) -> jax.Array:
    """Return which part of its weights a layer exchanges, float32."""
    fields = self.config.sparsity
    if fields.drop_anneal == "constant":
      return jnp.float32(fields.drop_fraction)
    return fields.drop_fraction / 2 * (1 + jnp.cos(jnp.pi * self._progress(step)))

  def pruned(self, step: jax.Array) -> jax.Array:
    """Return which part of its final zeros a layer of a gradual run has, float32."""
    return 1 - (1 - self._progress(step)) ** self.config.sparsity.power

  def _progress(self, step: jax.Array) -> jax.Array:
    part = (step + self.offset - self.begin) / (self.end - self.begin)
    return jnp.clip(part.astype(jnp.float32), 0.0, 1.0)

  def _changed(self, grads: Params, params: Params, masks: Leaves, step: jax.Array) -> Leaves:
    """Return the masks after the change that is due."""
    weights = self._sparse_leaves(params)
    sizes = _each(select.magnitudes, weights)
    now = {name: _active(mask, name) for name, mask in masks.items()}
    if self.config.sparsity.name == "gradual":
      final, at_end = self._final_counts(weights), step + self.offset >= self.end
      part = self.pruned(step)
      size = {name: _block_size(leaf, name) for name, leaf in weights.items()}
      count = {
        name: jnp.where(
          at_end, final[name], size[name] - jnp.floor(part * (size[name] - final[name])).astype(int)
        ).astype(jnp.int32)
        for name in weights
      }
      # A resume may have changed the schedule; what is zero stays zero.
      return _largest(sizes, masks, {name: jnp.minimum(count[name], now[name]) for name in now})
    part = self.drop_fraction(step)
    dropped = {name: jnp.floor(part * count).astype(jnp.int32) for name, count in now.items()}
    stay = _largest(sizes, masks, {name: now[name] - dropped[name] for name in now})
    if self.config.sparsity.name == "set":
      scores = self._random(weights, step + self.offset + 1)
    else:
      scores = _each(select.magnitudes, self._sparse_leaves(grads))
    # Those just dropped may come back.
    grown = _largest(scores, _each(jnp.logical_not, stay), dropped)
    return {name: stay[name] | grown[name] for name in stay}

  def _restarted(
    self,
    old: optax.OptState,
    counted: optax.OptState,
    fresh: optax.OptState,
    params: Params,
    masks: Leaves,
    new: Leaves,
  ) -> optax.OptState:
    """Return the state of the optimizer: new weights start as at step 0, its counts go on."""
    shapes = {name: leaf.shape for name, leaf in by_path(params).items()}

    def one(
      path: tuple[object, ...], x: jax.Array, count: jax.Array, start: jax.Array
    ) -> jax.Array:
      parts = path_name(path).split("/")
      tails = ("/".join(parts[i:]) for i in range(len(parts)))
      name = next((tail for tail in tails if shapes.get(tail) == x.shape), None)
      if name is None:
        return count
      return jnp.where(masks[name] & new[name], x, start) if name in masks else x

    return jax.tree.map_with_path(one, old, counted, fresh)

  def _metrics(self, masks: Tree, new: Tree) -> list[jax.Array]:
    before, after = by_path(masks), by_path(new)
    zeros = sum((jnp.sum(~mask, dtype=jnp.int32) for mask in after.values()), jnp.int32(0))
    if self.config.sparsity.name == "static":
      changed = jnp.int32(0)
    else:
      changed = sum(
        (jnp.sum(after[name] ^ before[name], dtype=jnp.int32) for name in after), jnp.int32(0)
      )
    return [1 - zeros / self.size, changed / self.size]

  def _sparse_leaves(self, tree: Params) -> Leaves:
    """Return the leaves that have masks, by path."""
    kept = self._kept
    return {n: leaf for n, leaf in by_path(tree).items() if packing.names(n)[0] in kept}

  def _final_counts(self, leaves: Leaves) -> dict[str, jax.Array]:
    kept = self._kept
    return {n: jnp.array([kept[name] for name in packing.names(n)], jnp.int32) for n in leaves}

  def _random(self, leaves: Leaves, draw: jax.Array) -> Leaves:
    """Return random scores by (seed, number of the draw, name of the block)."""
    key = jax.random.fold_in(jax.random.key(self.config.seed), zlib.crc32(b"sparsity"))
    key = jax.random.fold_in(key, draw)

    def one(name: str, leaf: jax.Array) -> jax.Array:
      numbers = np.array([zlib.crc32(n.encode()) for n in packing.names(name)], np.uint32)
      keys = jax.vmap(jax.random.fold_in, (None, 0))(key, numbers)
      blocks = _blocks(leaf, name)
      bits = jax.vmap(lambda key: jax.random.bits(key, blocks.shape[1:], jnp.uint32))(keys)
      return bits.reshape(leaf.shape)

    return {name: one(name, leaf) for name, leaf in leaves.items()}


def make(
  config: ml_collections.ConfigDict, params: Params, total: int, offset: int = 0
) -> Sparse | None:
  """Return the sparse weights of a run; None if there are none.

  Args:
    config: a validated config.
    params: of the model; may be abstract.
    total: counted steps of the run.
    offset: see Sparse.

  Raises:
    ConfigError: one sentence that names the field.
  """
  fields = config.sparsity
  if fields.name == "none":
    return None
  found = layers_lib.find(config, params)
  if fields.name == "static":
    return Sparse(config, found, 0, 0, offset)
  for name in ("begin_steps", "end_steps"):
    if fields[name] >= total:
      raise ConfigError(
        f"config.sparsity.{name} is {fields[name]}, but the run has only {total} steps; it must be "
        "below that."
      )
  begin = fields.begin_steps or round(fields.begin_share * total)
  end = fields.end_steps or min(round(fields.end_share * total), total - 1)
  if begin >= end:
    raise ConfigError(
      f"config.sparsity.begin_* is step {begin} and config.sparsity.end_* step {end} of a run of "
      f"{total}; the end must come after the begin."
    )
  return Sparse(config, found, begin, end, offset)


def check(config: ml_collections.ConfigDict) -> None:
  """Refuse fields of `config.sparsity` that its method has no use for.

  Raises:
    ValueError: one sentence.
  """
  fields = config.sparsity
  for key in sparsity_fields.UNUSED[fields.name]:
    if fields[key] != base.RUN[f"sparsity.{key}"].default:
      raise ValueError(
        f"config.sparsity.{key} is {fields[key]!r}, but config.sparsity.name is {fields.name}, "
        "which has no use for it; choose another method, or leave it out."
      )


def apply(masks: Tree, tree: Tree) -> Tree:
  """Return a tree of the form of the parameters with zeros where a mask is False."""
  if not masks:
    return tree
  by_name = by_path(masks)

  def one(path: tuple[object, ...], leaf: jax.Array) -> jax.Array:
    mask = by_name.get(path_name(path))
    return leaf if mask is None else jnp.where(mask, leaf, 0)

  return jax.tree.map_with_path(one, tree)


def _largest(scores: Leaves, allowed: Leaves, counts: Mapping[str, jax.Array]) -> Leaves:
  found = select.largest(
    [_blocks(score, name) for name, score in scores.items()],
    [_blocks(allowed[name], name) for name in scores],
    [counts[name] for name in scores],
  )
  return {
    name: mask.reshape(score.shape)
    for (name, score), mask in zip(scores.items(), found, strict=True)
  }


def _blocks(leaf: jax.Array, name: str) -> jax.Array:
  """Return a leaf with the blocks as its first axis, be it one."""
  return leaf if packing.is_packed(name) else leaf[None]


def _block_size(leaf: jax.Array, name: str) -> int:
  return leaf.size // len(packing.names(name))


def _active(mask: jax.Array, name: str) -> jax.Array:
  blocks = _blocks(mask, name)
  return jnp.sum(blocks, axis=range(1, blocks.ndim), dtype=jnp.int32)


def _each(function: Callable[[jax.Array], jax.Array], leaves: Leaves) -> Leaves:
  return {name: function(leaf) for name, leaf in leaves.items()}


def nested(leaves: Leaves) -> Tree:
  tree: Tree = {}
  for name, leaf in leaves.items():
    *parents, last = name.split("/")
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[last] = leaf
  return tree
