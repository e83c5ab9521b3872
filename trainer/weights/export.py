"""Writes weights for other tools, and reads each file back before it is said to be done."""

from collections.abc import Callable, Iterator
import dataclasses
import importlib.util
import json
import math
import pathlib

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from configs.names import natural
from input_pipeline.errors import BadRecordError, DataError
from input_pipeline.sources import layout
from trainer import compiler, models
from trainer.state import Variables
from trainer.weights import images as image_files
from trainer.weights import net as net_lib
from trainer.weights import onnx_graph, read, safetensors
from trainer.weights.about import About
from trainer.weights.errors import WeightsError

FORMATS = ("safetensors", "onnx", "stablehlo")
TOLERANCE = 1e-4  # of logits, relative to the largest
_PLATFORMS = ("cpu", "cuda", "tpu")
_NEEDED = {"onnx": ("onnx", "onnxruntime"), "stablehlo": ("flatbuffers",), "safetensors": ()}
# What a file is by its suffix.
_NAMED = {".onnx": "onnx", ".safetensors": "safetensors", ".pth": "torch", ".pt": "torch"}
_BATCH = 16
_MOST_IMAGES = 256

# uint8 images [N, S, S, 3] -> logits [N, classes]
Predict = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Agreement:
  """How the logits of an exported file agree with those of the trainer.

  Attributes:
    images: number of those compared.
    top5: of these, those with the same five best classes in the same order.
    difference: largest difference of a logit over the largest logit.
  """

  images: int
  top5: int
  difference: float

  def __str__(self) -> str:
    return (
      f"the same top-5 on {self.top5:,} of {self.images:,} images, largest relative difference of "
      f"the logits {self.difference:.1e}"
    )


def export(
  origin: str,
  kind: str,
  out: str,
  *,
  averaged: bool = True,
  pixels: bool = False,
  size: int = 0,
  images: str = "",
  names: str = "timm",
) -> Agreement:
  """Write the weights of a run in a format, and compare what is read back with the model itself.

  Args:
    origin: see `read.read_model`.
    kind: one of FORMATS.
    out: file to write; it appears once the comparison has succeeded.
    averaged: whether averages over steps are taken where the run keeps them, as evaluation does.
    pixels: whether the graph takes uint8 images [N, H, W, 3] and normalises them itself. Otherwise
      it takes normalised ones, ONNX [N, 3, H, W] and StableHLO [N, H, W, 3].
    size: height and width of images in pixels; 0 for that of the evaluation.
    images: folder of images to compare on; "" for noise.
    names: torchvision, for its names of the tensors of safetensors where timm's differ.

  Raises:
    WeightsError: one sentence, if something is missing, or the logits differ.
  """
  missing = [name for name in _NEEDED[kind] if importlib.util.find_spec(name) is None]
  if missing:
    raise WeightsError(
      f"--format={kind} needs {' and '.join(missing)}; run: pip install -e '.[export]'"
    )
  target = pathlib.Path(out)
  if not target.parent.is_dir():
    raise WeightsError(f"--out={out} cannot be written: there is no folder {target.parent}.")
  if (named := _NAMED.get(target.suffix, kind)) != kind:
    raise WeightsError(f"--out={out} is named as {named}, but --format={kind} writes {kind}.")
  net, leaves, facts = read.read_model(origin, averaged)
  size = size or net.config.data.eval_image_size
  try:
    models.check_image(net.config.model, name="--size", size=size, space=1)
  except ValueError as error:
    raise WeightsError(str(error)) from error
  views = _views(images, net, size) if images else _noise(size)
  partial = target.with_name(f"{target.name}.partial")
  variables = jax.tree.map(jnp.asarray, net.variables(leaves))
  try:
    try:
      if kind == "safetensors":
        predict = _safetensors(net, leaves, facts, partial, names)
      elif kind == "onnx":
        predict = _onnx(net, variables, facts, partial, size, pixels)
      else:
        predict = _stablehlo(net, variables, facts, partial, size, pixels)
    except OSError as error:
      raise WeightsError(f"--out={out} cannot be written ({error.strerror}).") from error
    agreement = compare(_own(net, variables), predict, views)
    if not agreement.images:
      raise WeightsError(f"--images={images} holds no image that can be read.")
    if not agreement.difference <= TOLERANCE:
      raise WeightsError(
        f"{out} was not kept: read back, it gives {agreement}, above {TOLERANCE:g}."
      )
    if kind == "stablehlo":  # the format has no room for words
      target.with_name(f"{target.name}.json").write_text(json.dumps(facts.words(), indent=2) + "\n")
    partial.replace(target)
  finally:
    partial.unlink(missing_ok=True)
  return agreement


def _safetensors(
  net: net_lib.Net, leaves: net_lib.Leaves, facts: About, path: pathlib.Path, names: str
) -> Predict:
  tensors: dict[str, np.ndarray] = {}
  for leaf in sorted(leaves, key=natural):
    name = net.torch_name(leaf)
    tensors[name] = np.asarray(net.theirs(leaf, np.asarray(leaves[leaf])), order="C")
    if name.endswith("running_var"):  # torch's batch norm counts its batches
      counter = f"{name.removesuffix('running_var')}num_batches_tracked"
      tensors[counter] = np.array(facts.step or 0, np.int64)
  if names == "torchvision":
    tensors = net.by_torchvision(tensors)
    if not tensors:
      raise WeightsError(
        "--names=torchvision is for nets whose names differ there from timm's, and "
        f"{net.describe()} is none: leave it out."
      )
  words = facts.words() | {read.DIGEST: read.digest(tensors)}
  with open(path, "wb") as file:
    for part in safetensors.encode(tensors, words):
      file.write(part)
  again, _ = read.read_weights(str(path), net)
  unlike = [leaf for leaf in leaves if not np.array_equal(again[leaf], leaves[leaf])]
  if unlike:
    raise WeightsError(f"{path} was not kept: read back, {unlike[0]} has other values.")
  return _own(net, jax.tree.map(jnp.asarray, net.variables(again)))


def _onnx(
  net: net_lib.Net, variables: Variables, facts: About, path: pathlib.Path, size: int, pixels: bool
) -> Predict:
  import onnxruntime

  dtype = np.uint8 if pixels else np.float32
  try:
    model = onnx_graph.to_model(
      net.logits_of_pixels if pixels else net.logits,
      variables,
      jax.ShapeDtypeStruct((size, size, 3), dtype),
      channels_first=not pixels,
      words=facts.words(),
    )
  except WeightsError as error:
    raise WeightsError(f"{net.describe()} {error}.") from error
  path.write_bytes(model.SerializeToString())
  session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

  def predict(images: np.ndarray) -> np.ndarray:
    given = images if pixels else _normalised(net, images).transpose(0, 3, 1, 2)
    logits: np.ndarray = session.run(None, {"images": given})[0]
    return logits

  return predict


def _stablehlo(
  net: net_lib.Net, variables: Variables, facts: About, path: pathlib.Path, size: int, pixels: bool
) -> Predict:
  del facts
  function = net.logits_of_pixels if pixels else net.logits
  (batch,) = jax.export.symbolic_shape(onnx_graph.BATCH)
  dtype = np.uint8 if pixels else np.float32
  exported = jax.export.export(
    jax.jit(lambda images: function(variables, images)), platforms=_PLATFORMS
  )(jax.ShapeDtypeStruct((batch, size, size, 3), dtype))
  path.write_bytes(exported.serialize())
  again = jax.export.deserialize(bytearray(path.read_bytes()))

  def predict(images: np.ndarray) -> np.ndarray:
    return np.asarray(again.call(images if pixels else _normalised(net, images)))

  return predict


def _own(net: net_lib.Net, variables: Variables) -> Predict:
  """Return what the trainer itself makes of images, compiled for one size of batch."""
  compiled = compiler.jit(net.logits_of_pixels)

  def predict(images: np.ndarray) -> np.ndarray:
    padded = np.zeros((_BATCH, *images.shape[1:]), np.uint8)
    padded[: len(images)] = images
    return np.asarray(compiled(variables, padded))[: len(images)]

  return predict


def _normalised(net: net_lib.Net, images: np.ndarray) -> np.ndarray:
  data = net.config.data
  return ((images - np.asarray(data.mean)) / np.asarray(data.std)).astype(np.float32)


def compare(own: Predict, other: Predict, views: Iterator[np.ndarray]) -> Agreement:
  """Return how two functions agree on batches of images, uint8 [N, S, S, 3], of any N up to 16."""
  count, same, difference, largest = 0, 0, 0.0, 0.0
  for images in views:
    ours, theirs = own(images), other(images)
    if theirs.shape != ours.shape or not np.isfinite(theirs).all():
      return Agreement(len(images), 0, math.inf)
    best = [np.argsort(-logits, axis=1, kind="stable")[:, :5] for logits in (ours, theirs)]
    count, same = count + len(images), same + int((best[0] == best[1]).all(1).sum())
    difference = max(difference, float(np.abs(ours - theirs).max()))
    largest = max(largest, float(np.abs(ours).max()))
  return Agreement(count, same, difference / largest if largest else difference)


def _noise(size: int) -> Iterator[np.ndarray]:
  """Yield a batch of noise and a single image: the size of a batch is free."""
  rng = np.random.default_rng(0)
  for count in (_BATCH - 1, 1):
    yield rng.integers(0, 256, (count, size, size, 3), np.uint8)


def _views(folder: str, net: net_lib.Net, size: int) -> Iterator[np.ndarray]:
  """Return batches of the images of a folder, prepared as for evaluation.

  Raises:
    WeightsError: if there is no image.
  """
  files = image_files.files_in(folder)
  if not files:
    raise WeightsError(f"--images={folder} holds no image ({', '.join(layout.IMAGE_SUFFIXES)}).")

  def batches() -> Iterator[np.ndarray]:
    batch: list[np.ndarray] = []
    for path in files[:_MOST_IMAGES]:
      try:
        batch.append(image_files.view(path.read_bytes(), net, size))
      except (BadRecordError, DataError, OSError):
        continue
      if len(batch) == _BATCH:
        yield np.stack(batch)
        batch = []
    if batch:
      yield np.stack(batch)

  return batches()
