"""Which layers of a net are sparse, and how many weights each of them keeps."""

from collections.abc import Collection, Mapping, Sequence
import dataclasses
import math
import re

import jax
import ml_collections
import numpy as np

from trainer import finetune
from trainer.errors import ConfigError
from trainer.models import packing
from trainer.state import Params, path_name

_SHOWN = 3  # parameters in a message
_ROUNDING = 1e-6  # of a number of weights


@dataclasses.dataclass(frozen=True)
class Layer:
  """A parameter that may be sparse; of a stacked leaf one for each block.

  Attributes:
    name: its path in a checkpoint.
    shape: of the block.
    kept: weights that are not zero; those of a gradual run at its end.
  """

  name: str
  shape: tuple[int, ...]
  kept: int

  @property
  def size(self) -> int:
    return math.prod(self.shape)

  @property
  def dense(self) -> bool:
    return self.kept == self.size


def find(config: ml_collections.ConfigDict, params: Params) -> list[Layer]:
  """Return the layers that `config.sparsity.leaves` names, with what each keeps.

  Args:
    config: a validated config with sparse weights.
    params: of the model, in either form; may be abstract.

  Raises:
    ConfigError: a pattern matches nothing, or takes some of the blocks of a loop, or a layer would
      have no weight left; one sentence.
  """
  fields, leaves = config.sparsity, jax.tree.leaves_with_path(params)
  paths = [path_name(path) for path, _ in leaves]
  shapes: dict[str, tuple[int, ...]] = {}
  for path, (_, leaf) in zip(paths, leaves, strict=True):
    shape = leaf.shape[int(packing.is_packed(path)) :]
    if len(shape) > 1:
      shapes |= dict.fromkeys(packing.names(path), shape)
  frozen = config.optimizer.freeze
  found = {
    name: shape
    for name, shape in shapes.items()
    if re.search(fields.leaves, name) and not (frozen and re.search(frozen, name))
  }
  if not found:
    raise ConfigError(
      f"config.sparsity.leaves is {fields.leaves!r}, which is in the path of no trained parameter "
      f"of two dimensions or more; they are {', '.join(list(shapes)[:_SHOWN])}, ..."
    )
  dense = {name for name in found if fields.dense and re.search(fields.dense, name)}
  if fields.dense and not dense:
    raise ConfigError(
      f"config.sparsity.dense is {fields.dense!r}, which is in the path of no parameter that "
      f"config.sparsity.leaves names; they are {', '.join(list(found)[:_SHOWN])}, ..."
    )
  if len(dense) == len(found):
    raise ConfigError(
      f"config.sparsity.dense is {fields.dense!r}, which leaves no layer that could be sparse; set "
      "config.sparsity.name to none, or name fewer."
    )
  finetune.check_packed("sparsity.leaves", fields.leaves, paths)
  if fields.dense:
    finetune.check_packed("sparsity.dense", fields.dense, paths)
  zeros = zero_shares(found, fields.sparsity, fields.distribution, dense)
  for name, share in zeros.items():
    size = math.prod(found[name])
    if size - share * size < 1 - _ROUNDING:
      raise ConfigError(
        f"config.sparsity.sparsity is {fields.sparsity}, by which {name} of {size:,} weights would "
        "keep less than one; lower it, or name the layer in config.sparsity.dense."
      )
  return [Layer(name, shape, _kept(shape, zeros[name])) for name, shape in found.items()]


def _kept(shape: Sequence[int], zeros: float) -> int:
  size = math.prod(shape)
  return size - math.floor(zeros * size)


def zero_shares(
  shapes: Mapping[str, Sequence[int]],
  sparsity: float,
  distribution: str,
  dense: Collection[str] = (),
) -> dict[str, float]:
  """Return the share of zeros of each layer.

  Erdos-Renyi-Kernel (arXiv:1911.11134) keeps a share of eps * (sum of the dimensions) / (their
  product). Layers whose share would be above 1 are dense, those with the largest first, and eps is
  solved again for the others.

  Args:
    shapes: of the layers, by name.
    sparsity: share of zeros, in each layer or in all of them but those of `dense`.
    distribution: uniform or erk.
    dense: names of layers without zeros, which do not count.
  """
  sparse = {name: shape for name, shape in shapes.items() if name not in dense}
  if distribution == "uniform":
    shares = dict.fromkeys(sparse, sparsity)
  else:
    shares = _erdos_renyi(sparse, sparsity)
  return {name: shares.get(name, 0.0) for name in shapes}


def _erdos_renyi(shapes: Mapping[str, Sequence[int]], sparsity: float) -> dict[str, float]:
  """Return the share of zeros of each layer that is not dense."""
  sizes = {name: math.prod(shape) for name, shape in shapes.items()}
  ratios = {name: float(np.sum(shape)) / sizes[name] for name, shape in shapes.items()}
  kept = sum(size - math.floor(sparsity * size) for size in sizes.values())
  while ratios:
    eps = kept / sum(ratio * sizes[name] for name, ratio in ratios.items())
    largest = max(ratios.values())
    if eps * largest <= 1:
      return {name: 1 - eps * ratio for name, ratio in ratios.items()}
    for name in [name for name, ratio in ratios.items() if ratio == largest]:
      del ratios[name]
      kept -= sizes[name]
  return {}
