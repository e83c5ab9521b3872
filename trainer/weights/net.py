"""A model for evaluation in float32, without its arrays, and the leaves that it needs."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np

from configs import base
from trainer import mesh, models
from trainer.augment import normalize
from trainer.errors import ConfigError
from trainer.models.rngs import streams
from trainer.state import Model, Variables, path_name, split
from trainer.weights import foreign

# Arrays, or their shapes, by path: "stage1_block1/conv1/kernel".
Leaves = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Net:
  """What a config makes of images, given the leaves.

  Attributes:
    config: of the run.
    model: without its arrays.
    shapes: of the arrays.
  """

  config: ml_collections.ConfigDict
  model: Model
  shapes: Variables

  @property
  def leaves(self) -> Leaves:
    """Shapes and dtypes of all arrays by path."""
    return flatten(self.shapes)

  def torch_name(self, leaf: str) -> str:
    """Return the name of a leaf in a state dict."""
    model = self.config.model
    return models.family_of(model).torch_name(leaf, models.own_fields(model))

  @property
  def convolutions(self) -> str:
    """Family.CONVOLUTIONS."""
    return models.family_of(self.config.model).CONVOLUTIONS

  def resized(self, leaf: str, array: np.ndarray) -> np.ndarray | None:
    """Return a leaf of a model for another image size in the shape that it has in this one.

    None if it has this shape, or cannot be brought to it.
    """
    model, shape = self.config.model, self.leaves[leaf].shape
    if array.shape == shape:
      return None
    fields = models.own_fields(model)
    return models.family_of(model).resize(leaf, array.astype(np.float32), shape, fields)

  def theirs(self, leaf: str, array: np.ndarray) -> np.ndarray:
    """Return a leaf in the shape and layout that it has in a state dict."""
    return foreign.theirs(leaf, self.torch_name(leaf), array, self.convolutions)

  def by_torchvision(self, tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return a state dict as torchvision has it; nothing if that is timm's, or there is none."""
    return models.family_of(self.config.model).respell(tensors, "torchvision")

  def variables(self, leaves: Mapping[str, Any]) -> Variables:
    """Return leaves by path as the nested dicts of the model."""
    paths, structure = jax.tree.flatten_with_path(self.shapes)
    return jax.tree.unflatten(structure, [leaves[_name(path)] for path, _ in paths])

  def logits(self, variables: Variables, images: jax.Array) -> jax.Array:
    """Return float32 logits [N, classes] of normalised images, float32 [N, H, W, 3]."""
    logits: jax.Array = self.model.merge(variables, None)(images)
    return logits

  def logits_of_pixels(self, variables: Variables, images: jax.Array) -> jax.Array:
    """Return the same of uint8 images [N, H, W, 3]."""
    return self.logits(variables, normalize(images, self.config.data, jnp.float32))

  def describe(self) -> str:
    """Return the name of the model, as the trainer prints it at start."""
    return models.family_of(self.config.model).describe(models.own_fields(self.config.model))


def build(config: ml_collections.ConfigDict, dtype: str = "float32") -> Net:
  """Return the model of a config; makes no array.

  Args:
    config: of a run.
    dtype: of activations.

  Raises:
    ConfigError: if the config has no such model.
    NoDevices: if JAX cannot use the devices that it is asked for.
  """
  mesh.device_count()
  model_config = ml_collections.ConfigDict(config.model.to_dict())
  # The same leaves and numbers by a program that other tools can read.
  for name, value in (("dtype", dtype), ("scan", False), ("remat", "none")):
    if name in model_config:
      model_config[name] = value
  made: list[Model] = []

  def create() -> Variables:
    # `split` needs no streams that a merge would seed: evaluation draws nothing.
    model, variables = split(
      models.create(
        model_config, image_size=config.data.image_size, rngs=streams(default=jax.random.key(0))
      )
    )
    made.append(model)
    return variables

  try:
    shapes = jax.eval_shape(create)
  except ValueError as error:
    raise ConfigError(str(error)) from error
  return Net(config, made[0], shapes)


def flatten(variables: Variables) -> Leaves:
  """Return the arrays of a model by path, without the names of their collections."""
  return {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(variables)}


def _name(path: tuple[Any, ...]) -> str:
  return path_name(path[1:])


def config_of(values: Mapping[str, Any]) -> ml_collections.ConfigDict:
  """Return the config of a run by its flat form, as in a checkpoint.

  A field that is new since then takes its default; one that is gone is left out.

  Raises:
    ConfigError: if it names no model family.
  """
  try:
    config = base.get_config(str(values.get("model.name", "resnet")))
  except (ValueError, AttributeError) as error:
    raise ConfigError(str(error)) from error
  with config.unlocked():
    for name, value in values.items():
      *sections, leaf = name.split(".")
      node: Any = config
      for section in sections:
        node = node.get(section) if isinstance(node, ml_collections.ConfigDict) else None
      if isinstance(node, ml_collections.ConfigDict) and leaf in node:
        node[leaf] = tuple(value) if isinstance(value, list) else value
  return config


def random_leaves(net: Net, seed: int = 0) -> Leaves:
  """Return leaves that no part of a net hides behind: scales and variances around 1, no zeros."""
  rng = np.random.default_rng(seed)
  result = {}
  for name, leaf in net.leaves.items():
    kind = name.split("/")[-1]
    if kind in ("scale", "var"):
      values = rng.uniform(0.5, 1.5, leaf.shape)
    elif kind == "kernel":
      fan_in = max(1, int(np.prod(leaf.shape[:-1])))
      values = rng.normal(0, (2 / fan_in) ** 0.5, leaf.shape)
    else:
      values = rng.normal(0, 0.1, leaf.shape)
    result[name] = values.astype(leaf.dtype)
  return result
