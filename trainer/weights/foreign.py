"""State dicts of other tools against the leaves of a model: spelling, layout, fit, a guess."""

from collections.abc import Callable, Mapping
import dataclasses
import functools
import re
from typing import Any

import ml_dtypes
import numpy as np

from configs import families
from configs.names import natural
from trainer.models import names
from trainer.models.family import Family
from trainer.weights.errors import WeightsError

_SHOWN = 3  # mismatches in a message
# Put before names by wrappers of a model: DistributedDataParallel, torch.compile, trainers, MMCV.
_PREFIX = re.compile(r"(?:(?:module|_orig_mod|state_dict|model|backbone)\.)+")
# Counters beside the weights, of batch norm and of averaging.
_COUNTERS = re.compile(r"(?:.*\.)?num_batches_tracked|n_averaged")
_PARTS = ("bn", "conv")
# The matrix of the head, in state dicts of any family.
_HEADS = ("fc.weight", "head.fc.weight", "head.weight", "classifier.weight")
# Spellings of other tools, as regular expressions, and those of torchvision's ResNet. In order: of
# the CIFAR nets of akamaster, of Hugging Face's ResNetForImageClassification.
_SPELLINGS: tuple[tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]], ...] = (
  (re.compile(r"linear\.(weight|bias)"), r"fc.\1"),
  (re.compile(r"(layer\d+\.\d+)\.shortcut\.(\d\..*)"), r"\1.downsample.\2"),
  (re.compile(r"resnet\.embedder\.embedder\.convolution\.(.*)"), r"conv1.\1"),
  (re.compile(r"resnet\.embedder\.embedder\.normalization\.(.*)"), r"bn1.\1"),
  (
    re.compile(r"resnet\.encoder\.stages\.(\d+)\.layers\.(\d+)\.shortcut\.(\w+)\.(.*)"),
    lambda m: f"layer{int(m[1]) + 1}.{m[2]}.downsample.{int(m[3] != 'convolution')}.{m[4]}",
  ),
  (
    re.compile(r"resnet\.encoder\.stages\.(\d+)\.layers\.(\d+)\.layer\.(\d+)\.(\w+)\.(.*)"),
    lambda m: f"layer{int(m[1]) + 1}.{m[2]}.{_PARTS[m[4] == 'convolution']}{int(m[3]) + 1}.{m[5]}",
  ),
  (re.compile(r"classifier\.1\.(weight|bias)"), r"fc.\1"),
)


def plain_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Return the tensors by one spelling of their names, without counters: see Family.torch_name.

  Raises:
    WeightsError: half a sentence, if two names become the same.
  """
  bare = _renamed(tensors, _without_prefix)
  bare = {name: tensor for name, tensor in bare.items() if not _COUNTERS.fullmatch(name)}
  for family in _families():
    if respelt := family.respell(bare, "timm"):
      if len(respelt) < len(bare):
        raise WeightsError("has tensors of the same meaning by two libraries' names")
      return respelt
  return _renamed(bare, _respelt)


def _renamed(
  tensors: Mapping[str, np.ndarray], rename: Callable[[str], str]
) -> dict[str, np.ndarray]:
  result: dict[str, np.ndarray] = {}
  for name, tensor in tensors.items():
    plain = rename(name)
    if plain in result:
      raise WeightsError(f"has two tensors that mean {plain[:80]!r}")
    result[plain] = tensor
  return result


def _without_prefix(name: str) -> str:
  match = _PREFIX.match(name)
  return name[match.end() :] if match else name


def _respelt(name: str) -> str:
  for pattern, replacement in _SPELLINGS:
    if match := pattern.fullmatch(name):
      return match.expand(replacement) if isinstance(replacement, str) else replacement(match)
  return name


def theirs(leaf: str, name: str, array: np.ndarray, convolutions: str = "") -> np.ndarray:
  """Return a leaf as torch keeps it: [out, in, h, w] of convolutions, [out, in] of matrices.

  Args:
    leaf: its path.
    name: of the tensor.
    array: in our layout.
    convolutions: Family.CONVOLUTIONS.
  """
  return array.transpose(_their_axes(leaf, array.ndim)).reshape(
    their_shape(leaf, name, array.shape, convolutions)
  )


def ours(leaf: str, tensor: np.ndarray) -> np.ndarray:
  """Return a tensor of torch as we keep that leaf; the inverse of `theirs` but for 1x1 kernels."""
  return tensor.transpose(np.argsort(_their_axes(leaf, tensor.ndim)))


def their_shape(
  leaf: str, name: str, shape: tuple[int, ...], convolutions: str = ""
) -> tuple[int, ...]:
  """Return the shape that `theirs` has."""
  if name.endswith(".gain"):  # of a standardised convolution
    return (*shape, 1, 1, 1)
  flat = len(shape) == 2 and re.fullmatch(convolutions, name)
  return tuple(shape[axis] for axis in _their_axes(leaf, len(shape))) + (1, 1) * bool(flat)


def _their_axes(leaf: str, ndim: int) -> tuple[int, ...]:
  if leaf.split("/")[-1] == "kernel" and ndim >= 2:
    return (ndim - 1, ndim - 2, *range(ndim - 2))
  return tuple(range(ndim))


def _ours(
  leaf: str, tensor: np.ndarray, shape: tuple[int, ...], dtype: np.dtype[Any]
) -> np.ndarray:
  axes = _their_axes(leaf, len(shape))
  tensor = tensor.reshape([shape[axis] for axis in axes]).transpose(np.argsort(axes))
  with np.errstate(over="ignore"):  # it is refused afterwards, by name
    return np.asarray(tensor.astype(dtype), order="C")  # keeps a scalar one


@dataclasses.dataclass(frozen=True)
class Fit:
  """How tensors fit the leaves of a model.

  Attributes:
    found: leaves that fit, in our layout and the dtype of the model.
    missing: names of tensors that are not there, by leaf.
    misfits: (name, its shape, the shape that is needed) by leaf.
    left_over: names of tensors that the model has no leaf for.
  """

  found: dict[str, np.ndarray]
  missing: dict[str, str]
  misfits: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]]
  left_over: list[str]

  @property
  def complete(self) -> bool:
    """Whether every leaf is found and nothing is left over."""
    return not (self.missing or self.misfits or self.left_over)

  def problems(self) -> str:
    """Return what does not fit, with the first of each kind; "" if everything does."""
    kinds = (
      ("not in the file", list(self.missing.values())),
      (
        "of another shape",
        [
          f"{name} {list(has)} instead of {list(needs)}"
          for name, has, needs in self.misfits.values()
        ],
      ),
      ("without a place in the model", self.left_over),
    )
    return "; ".join(
      f"{len(names)} {what} ({', '.join(sorted(names, key=natural)[:_SHOWN])}"
      f"{', ...' if names[_SHOWN:] else ''})"
      for what, names in kinds
      if names
    )


def fit(
  tensors: Mapping[str, np.ndarray],
  leaves: Mapping[str, Any],
  name_of: Callable[[str], str],
  convolutions: str = "",
) -> Fit:
  """Return how a state dict fits the leaves of a model.

  Args:
    tensors: by torchvision's names, in torch's layout; see `plain_names`.
    leaves: shape and dtype of each leaf, by its path.
    name_of: path of a leaf -> torchvision's name.
    convolutions: Family.CONVOLUTIONS.

  Raises:
    WeightsError: half a sentence, if a tensor holds what is no weight: integers where the leaf has
      none, or numbers that are not finite, or negative variances.
  """
  result = Fit({}, {}, {}, [])
  names = {leaf: name_of(leaf) for leaf in leaves}
  for leaf, name in names.items():
    if name not in tensors:
      result.missing[leaf] = name
      continue
    tensor, shape = tensors[name], their_shape(leaf, name, leaves[leaf].shape, convolutions)
    dtype = np.dtype(leaves[leaf].dtype)
    # Some files have 1x1 convolutions as matrices, or the other way round.
    if _significant(tensor.shape) != _significant(shape):
      result.misfits[leaf] = name, tensor.shape, shape
      continue
    _check_values(leaf, name, tensor, counts=dtype.kind == "i")
    result.found[leaf] = _ours(leaf, tensor, leaves[leaf].shape, dtype)
    if not np.isfinite(result.found[leaf]).all():
      raise WeightsError(f"holds numbers in {name!r} that are too large for {dtype}")
  known = set(names.values())
  result.left_over.extend(name for name in tensors if name not in known)
  return result


def _significant(shape: tuple[int, ...]) -> tuple[int, ...]:
  return shape[:-2] if len(shape) == 4 and shape[2:] == (1, 1) else shape


def _check_values(leaf: str, name: str, tensor: np.ndarray, counts: bool) -> None:
  floating = tensor.dtype.kind == "f" or tensor.dtype == ml_dtypes.bfloat16
  if tensor.dtype.kind != "i" if counts else not floating:
    kind = "whole" if counts else "floating point"
    raise WeightsError(f"holds {tensor.dtype} in {name!r}, where {kind} numbers belong")
  values = tensor.astype(np.float32) if tensor.dtype == ml_dtypes.bfloat16 else tensor
  if not np.isfinite(values).all():
    raise WeightsError(f"holds numbers in {name!r} that are not finite")
  if leaf.split("/")[-1] == "var" and (values < 0).any():
    raise WeightsError(f"holds negative variances in {name!r}")


def guess(shapes: Mapping[str, tuple[int, ...]]) -> names.Looks:
  """Return what a state dict looks like, by names and shapes.

  Args:
    shapes: of each tensor, in torch's layout, by the names of Family.torch_name.
  """
  looks = next(filter(None, (family.guess(shapes) for family in _families())), names.Looks())
  head = next((shapes[name] for name in _HEADS if name in shapes), ())
  return looks._replace(classes=head[0] if head else None)


@functools.cache
def _families() -> tuple[type[Family], ...]:
  return tuple(families.find(name) for name in families.FAMILIES)
