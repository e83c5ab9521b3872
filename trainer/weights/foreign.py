"""State dicts of other tools against the leaves of a model: spelling, layout, fit, a guess."""

from collections.abc import Callable, Iterable, Mapping
import dataclasses
import math
import re
from typing import Any

import ml_dtypes
import numpy as np

from configs.names import natural
from trainer.weights import spellings
from trainer.weights.errors import WeightsError

_SHOWN = 3  # mismatches in a message
# Put before every name by wrappers of a model: DistributedDataParallel, torch.compile, trainers.
_PREFIX = re.compile(r"(?:(?:module|_orig_mod|state_dict|model)\.)+")
# Counters beside the weights, of batch norm and of averaging.
_COUNTERS = re.compile(r"(?:.*\.)?num_batches_tracked|n_averaged")
_PARTS = ("bn", "conv")
# Dense layers of ours that are 1x1 convolutions in timm: squeeze-and-excitation, the head of
# ResNets with pre-activation.
_AS_CONVOLUTIONS = re.compile(
  r"(?:.*\.se\.(?:fc[12]|conv_reduce|conv_expand)|.*\.attn_last\.fc[12]|head\.fc)\.weight"
)
# Spellings of other tools, as regular expressions, and those of torchvision's ResNet and timm's
# VisionTransformer. In order: of the CIFAR nets of akamaster, of Hugging Face's
# ResNetForImageClassification, of torchvision's VisionTransformer.
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
  *(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
      (r"class_token", "cls_token"),
      (r"conv_proj\.(.*)", r"patch_embed.proj.\1"),
      (r"encoder\.pos_embedding", "pos_embed"),
      (r"encoder\.ln\.(.*)", r"norm.\1"),
      (r"encoder\.layers\.encoder_layer_(\d+)\.ln_(.*)", r"blocks.\1.norm\2"),
      (
        r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.in_proj_(.*)",
        r"blocks.\1.attn.qkv.\2",
      ),
      (
        r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.out_proj\.(.*)",
        r"blocks.\1.attn.proj.\2",
      ),
      (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.0\.(.*)", r"blocks.\1.mlp.fc1.\2"),
      (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.3\.(.*)", r"blocks.\1.mlp.fc2.\2"),
      (r"heads\.head\.(.*)", r"head.\1"),
    )
  ),
)


def plain_names(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Return the tensors by one spelling of their names, without counters: see Family.torch_name.

  Raises:
    WeightsError: half a sentence, if two names become the same.
  """
  bare = [
    (_PREFIX.sub("", name, count=1) if _PREFIX.match(name) else name, tensor)
    for name, tensor in tensors.items()
  ]
  bare = [(name, tensor) for name, tensor in bare if not _COUNTERS.fullmatch(name)]
  inverted = spellings.respell([name for name, _ in bare], "torchvision", "timm")
  result: dict[str, np.ndarray] = {}
  for name, tensor in bare:
    plain = inverted.get(name, name)
    for pattern, replacement in () if inverted else _SPELLINGS:
      if match := pattern.fullmatch(plain):
        plain = match.expand(replacement) if isinstance(replacement, str) else replacement(match)
        break
    if plain in result:
      raise WeightsError(f"has two tensors that mean {plain[:80]!r}")
    result[plain] = tensor
  return result


def theirs(leaf: str, name: str, array: np.ndarray, linear: str = "") -> np.ndarray:
  """Return a leaf as torch keeps it: [out, in, h, w] of convolutions, [out, in] of matrices.

  Args:
    leaf: its path.
    name: of the tensor.
    array: in our layout.
    linear: Family.LINEAR.
  """
  return array.transpose(_their_axes(leaf, array.ndim)).reshape(
    their_shape(leaf, name, array.shape, linear)
  )


def ours(leaf: str, tensor: np.ndarray) -> np.ndarray:
  """Return a tensor of torch as we keep that leaf; the inverse of `theirs` but for 1x1 kernels."""
  return tensor.transpose(np.argsort(_their_axes(leaf, tensor.ndim)))


def their_shape(leaf: str, name: str, shape: tuple[int, ...], linear: str = "") -> tuple[int, ...]:
  """Return the shape that `theirs` has."""
  if name.endswith(".gain"):  # of a standardised convolution
    return (*shape, 1, 1, 1)
  flat = len(shape) == 2 and _AS_CONVOLUTIONS.fullmatch(name) and not re.fullmatch(linear, name)
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
) -> Fit:
  """Return how a state dict fits the leaves of a model.

  Args:
    tensors: by torchvision's names, in torch's layout; see `plain_names`.
    leaves: shape and dtype of each leaf, by its path.
    name_of: path of a leaf -> torchvision's name.

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
    tensor, shape = tensors[name], their_shape(leaf, name, leaves[leaf].shape)
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


# Blocks of the four stages, whether they are bottlenecks: depth.
_DEPTHS: Mapping[tuple[tuple[int, ...], bool], int] = {
  ((2, 2, 2, 2), False): 18,
  ((3, 4, 6, 3), False): 34,
  ((3, 4, 6, 3), True): 50,
  ((3, 4, 23, 3), True): 101,
  ((3, 8, 36, 3), True): 152,
  ((3, 24, 36, 3), True): 200,
  ((4, 29, 53, 4), True): 270,
  ((4, 36, 72, 4), True): 350,
  ((4, 44, 87, 4), True): 420,
}


@dataclasses.dataclass(frozen=True)
class Guess:
  """What a state dict looks like.

  Attributes:
    name: as torchvision or timm name it, or words; "" if it is nothing known.
    depth: layers, if they are known.
    classes: length of the logits, if they are known.
  """

  name: str = ""
  depth: int | None = None
  classes: int | None = None

  def __str__(self) -> str:
    name = self.name or "no net of this family"
    return name + (f" with {self.classes:,} classes" if self.classes else "")


def guess(shapes: Mapping[str, tuple[int, ...]]) -> Guess:
  """Return what a state dict looks like, by names and shapes.

  Args:
    shapes: of each tensor, in torch's layout, by torchvision's or timm's names.
  """
  if "patch_embed.proj.weight" in shapes:
    return _transformer(shapes)
  if "conv_stem.weight" in shapes or "stages.0.0.conv1.gain" in shapes:
    return _guess_other(shapes)
  v2 = _blocks(r"stages\.(\d+)\.blocks\.(\d+)\.", shapes, first=0)
  blocks = v2 or _blocks(r"layer(\d+)\.(\d+)\.", shapes, first=1)
  head = next((shapes[n] for n in ("fc.weight", "head.fc.weight") if n in shapes), ())
  classes = head[0] if head else None
  start = "stages.0.blocks.0" if v2 else "layer1.0"
  inner = shapes.get(f"{start}.conv2.weight", ())
  if not blocks or len(inner) != 4:
    return Guess(classes=classes)
  bottleneck = f"{start}.conv3.weight" in shapes
  if len(blocks) == 3:
    depth = (3 if bottleneck else 2) * sum(blocks) + 2
    option = "B" if any("downsample" in name for name in shapes) else "A"
    return Guess(f"a CIFAR ResNet-{depth} with option {option}", depth, classes)
  known = _DEPTHS.get((tuple(blocks), bottleneck))
  if known is None:
    kind = "bottlenecks" if bottleneck else "basic blocks"
    return Guess(f"a ResNet of {', '.join(map(str, blocks))} {kind}", None, classes)
  return Guess(_variant(known, shapes, inner, bottleneck, start), known, classes)


# Width of a token: size in timm's names.
_TRANSFORMERS = {
  192: "tiny",
  384: "small",
  512: "medium",
  768: "base",
  1024: "large",
  1280: "huge",
}


def _transformer(shapes: Mapping[str, tuple[int, ...]]) -> Guess:
  """Return what the state dict of a Vision Transformer looks like."""
  kernel, positions = shapes["patch_embed.proj.weight"], shapes.get("pos_embed", ())
  classes = shapes.get("head.weight", (None,))[0]
  if len(kernel) != 4 or kernel[0] not in _TRANSFORMERS:
    return Guess("a Vision Transformer", None, classes)
  name = f"vit_{_TRANSFORMERS[kernel[0]]}_patch{kernel[2]}"
  if len(positions) == 3:
    name += f"_{math.isqrt(positions[1]) * kernel[2]}"
  return Guess(name, None, classes)


# Blocks of the stages and channels of the last convolution of EfficientNets: timm's name.
_EFFICIENTNETS: Mapping[tuple[tuple[int, ...], int], str] = {
  ((1, 2, 2, 3, 3, 4, 1), 1280): "efficientnet_b0",
  ((2, 3, 3, 4, 4, 5, 2), 1280): "efficientnet_b1",
  ((2, 3, 3, 4, 4, 5, 2), 1408): "efficientnet_b2",
  ((2, 3, 3, 5, 5, 6, 2), 1536): "efficientnet_b3",
  ((2, 4, 4, 6, 6, 8, 2), 1792): "efficientnet_b4",
  ((3, 5, 5, 7, 7, 9, 3), 2048): "efficientnet_b5",
  ((3, 6, 6, 8, 8, 11, 3), 2304): "efficientnet_b6",
  ((4, 7, 7, 10, 10, 13, 4), 2560): "efficientnet_b7",
  ((4, 8, 8, 11, 11, 15, 4), 2816): "efficientnet_b8",
  ((1, 2, 2, 3, 5, 8), 1280): "efficientnetv2_b0",
  ((2, 3, 3, 4, 6, 9), 1280): "efficientnetv2_b1",
  ((2, 3, 3, 4, 6, 10), 1408): "efficientnetv2_b2",
  ((2, 3, 3, 5, 7, 12), 1536): "efficientnetv2_b3",
  ((2, 4, 4, 6, 9, 15), 1280): "efficientnetv2_s",
  ((3, 5, 5, 7, 14, 18, 5), 1280): "efficientnetv2_m",
  ((4, 7, 7, 10, 19, 25, 7), 1280): "efficientnetv2_l",
}


def _guess_other(shapes: Mapping[str, tuple[int, ...]]) -> Guess:
  """Return what the state dict of an EfficientNet or of a net without normalisation looks like."""
  head = next((shapes[n] for n in ("classifier.weight", "head.fc.weight") if n in shapes), ())
  classes = head[0] if head else None
  if "conv_stem.weight" in shapes:
    blocks = tuple(_blocks(r"blocks\.(\d+)\.(\d+)\.", shapes, first=0))
    last = (*shapes.get("conv_head.weight", ()), 0)[0]
    return Guess(_EFFICIENTNETS.get((blocks, last), "an EfficientNet"), None, classes)
  blocks = tuple(_blocks(r"stages\.(\d+)\.(\d+)\.", shapes, first=0))
  if "final_conv.gain" in shapes:
    return Guess(f"dm_nfnet_f{blocks[0] - 1}" if blocks else "an NFNet", None, classes)
  depth = _DEPTHS.get((blocks, True))
  return Guess(f"nf_resnet{depth}" if depth else "an NF-ResNet", depth, classes)


def _variant(
  depth: int,
  shapes: Mapping[str, tuple[int, ...]],
  inner: tuple[int, ...],
  bottleneck: bool,
  start: str,
) -> str:
  """Return the name of a net of known depth; `inner` is the shape of its first 3x3 kernel."""
  se = "se" if f"{start}.se.fc1.weight" in shapes else ""
  deep = "conv1.0.weight" in shapes
  groups = inner[0] // max(inner[1], 1)
  if start.startswith("stages"):
    return f"resnetv2_{depth}"
  if bottleneck and groups > 1:
    return f"{se}resnext{depth}{'d' if deep else ''}_{groups}x{inner[1]}d"
  if bottleneck and inner[0] == 128:
    return f"wide_resnet{depth}_2"
  plain = f"resnetrs{depth}" if se and deep else f"{se}resnet{depth}{'d' if deep else ''}"
  return plain if inner[0] == 64 else f"{plain} of width {inner[0] / 64:g}"


def _blocks(pattern: str, names: Iterable[str], first: int) -> list[int]:
  """Return the number of blocks of each stage; empty unless they count without gaps."""
  found: dict[int, set[int]] = {}
  for name in names:
    if match := re.match(pattern, name):
      found.setdefault(int(match[1][:6]), set()).add(int(match[2][:6]))
  whole = sorted(found) == list(range(first, first + len(found)))
  whole = whole and all(len(blocks) == max(blocks) + 1 for blocks in found.values())
  return [len(found[stage]) for stage in sorted(found)] if whole else []
