"""Other input pipelines, which `input_pipeline.bench` compares with. Nothing else imports this.

Each gets the bytes of images and returns batches without end, made in one thread. TensorFlow,
DALI and timm are imported in the process that uses them.
"""

import collections
from collections.abc import Callable, Iterator, Sequence
import importlib.metadata
import importlib.util
import io
import itertools
import os
import random
import tempfile
from typing import Any

import ml_collections
import numpy as np
from PIL import Image

from input_pipeline import image
from input_pipeline.records import Record

_SIZE, _RESIZE = 224, 256
_AREA, _ASPECT = (0.08, 1.0), (3 / 4, 4 / 3)
_MEAN, _STD = (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)

Spent = collections.Counter[str]  # CPU seconds by stage
Made = tuple[Iterator[Any], Spent]  # batches, and what ours counts while it makes them
Examples = Sequence[Record]


def installed(task: str) -> Iterator[tuple[str, Callable[[Examples, int], Made]]]:
  """Yield name and maker of each rival that can be imported; `task` is TRAIN, EVAL or A1."""
  if task == "A1":
    if importlib.util.find_spec("timm"):
      yield f"timm {_version('timm')}, Pillow {_version('pillow')}, to uint8", timm_a1
    return
  if importlib.util.find_spec("tensorflow"):
    name = f"tf.data {_version('tensorflow-cpu', 'tensorflow')}"
    flax = "as in Flax's ImageNet example: decode_and_crop_jpeg, bicubic, float32 normalised"
    yield f"{name}, {flax}", {"TRAIN": tf_flax_train, "EVAL": tf_flax_eval}[task]
    plain = "the same, bilinear to uint8"
    yield f"{name}, {plain}", {"TRAIN": tf_uint8_train, "EVAL": tf_uint8_eval}[task]
  if importlib.util.find_spec("nvidia") and importlib.util.find_spec("nvidia.dali"):
    name = f"DALI {_version('nvidia-dali-cuda120', 'nvidia-dali-cuda130')} on CPU, antialiased"
    yield f"{name}, float32 normalised", {"TRAIN": dali_train, "EVAL": dali_eval}[task]
    yield f"{name}, uint8", {"TRAIN": dali_uint8_train, "EVAL": dali_uint8_eval}[task]
  name = f"Pillow {_version('pillow')}, antialiased to uint8, as torchvision uses it"
  yield name, {"TRAIN": pillow_train, "EVAL": pillow_eval}[task]


def _version(*packages: str) -> str:
  """Return the version of the first of these packages that is installed."""
  for package in packages:
    try:
      return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      continue
  return "of unknown version"


def tf_flax_train(examples: Examples, batch_size: int) -> Made:
  return _tf(examples, batch_size, True, "bicubic", True)


def tf_flax_eval(examples: Examples, batch_size: int) -> Made:
  return _tf(examples, batch_size, False, "bicubic", True)


def tf_uint8_train(examples: Examples, batch_size: int) -> Made:
  return _tf(examples, batch_size, True, "bilinear", False)


def tf_uint8_eval(examples: Examples, batch_size: int) -> Made:
  return _tf(examples, batch_size, False, "bilinear", False)


def _tf(examples: Examples, batch_size: int, train: bool, method: str, normalise: bool) -> Made:
  """TFRecord to batches: the steps of Flax's example, with the boxes of our default config."""
  os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
  os.environ["CUDA_VISIBLE_DEVICES"] = ""
  os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # it logs a greeting; errors are exceptions
  import tensorflow as tf

  path = os.path.join(tempfile.mkdtemp(), "images.tfrecord")
  with tf.io.TFRecordWriter(path) as writer:
    for example in examples:
      feature = {
        "image": tf.train.Feature(bytes_list=tf.train.BytesList(value=[example.image])),
        "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[example.label])),
      }
      message = tf.train.Example(features=tf.train.Features(feature=feature))
      writer.write(message.SerializeToString())

  def box(data: ml_collections.ConfigDict) -> Any:
    height, width = tf.unstack(tf.io.extract_jpeg_shape(data)[:2])
    if train:
      begin, size, _ = tf.image.sample_distorted_bounding_box(
        tf.stack([height, width, 3]),
        tf.constant([0.0, 0.0, 1.0, 1.0], shape=[1, 1, 4]),
        min_object_covered=0.1,
        aspect_ratio_range=_ASPECT,
        area_range=_AREA,
        max_attempts=10,
      )
      return tf.concat([begin[:2], size[:2]], 0)
    side = tf.cast(_SIZE / _RESIZE * tf.cast(tf.minimum(height, width), tf.float32), tf.int32)
    return tf.stack([(height - side + 1) // 2, (width - side + 1) // 2, side, side])

  def view(message: Any) -> dict[str, Any]:
    features = {
      "image": tf.io.FixedLenFeature([], tf.string),
      "label": tf.io.FixedLenFeature([], tf.int64),
    }
    parsed = tf.io.parse_single_example(message, features)
    data = parsed["image"]
    pixels = tf.io.decode_and_crop_jpeg(data, box(data), channels=3)
    pixels = tf.image.resize([pixels], [_SIZE, _SIZE], method=method)[0]
    if train:
      pixels = tf.image.random_flip_left_right(pixels)
    if normalise:
      pixels = (pixels - tf.constant(_MEAN)) / tf.constant(_STD)
    else:
      pixels = tf.saturate_cast(tf.round(pixels), tf.uint8)
    return {"image": pixels, "label": parsed["label"]}

  options = tf.data.Options()
  options.threading.private_threadpool_size = 1
  options.threading.max_intra_op_parallelism = 1
  batches = tf.data.TFRecordDataset(path).repeat().map(view, num_parallel_calls=1)
  batches = batches.batch(batch_size, drop_remainder=True).with_options(options)
  return batches.as_numpy_iterator(), collections.Counter()


def dali_train(examples: Examples, batch_size: int) -> Made:
  return _dali(examples, batch_size, True, True)


def dali_eval(examples: Examples, batch_size: int) -> Made:
  return _dali(examples, batch_size, False, True)


def dali_uint8_train(examples: Examples, batch_size: int) -> Made:
  return _dali(examples, batch_size, True, False)


def dali_uint8_eval(examples: Examples, batch_size: int) -> Made:
  return _dali(examples, batch_size, False, False)


def _dali(examples: Examples, batch_size: int, train: bool, normalise: bool) -> Made:
  """Files to batches."""
  from nvidia.dali import fn, pipeline_def, types

  folder = tempfile.mkdtemp()
  files = []
  for i, example in enumerate(examples):
    files.append(os.path.join(folder, f"{i}.jpg"))
    with open(files[-1], "wb") as f:
      f.write(example.image)

  @pipeline_def(batch_size=batch_size, num_threads=1, device_id=None, prefetch_queue_depth=1)
  def pipeline() -> tuple[Any, Any]:
    data, labels = fn.readers.file(files=files, labels=[e.label for e in examples])
    if train:
      pixels = fn.decoders.image_random_crop(
        data,
        device="cpu",
        random_area=list(_AREA),
        random_aspect_ratio=list(_ASPECT),
        adjust_orientation=False,
      )
      pixels = fn.resize(pixels, size=[_SIZE, _SIZE])
      mirror = fn.random.coin_flip()
    else:
      pixels = fn.decoders.image(data, device="cpu", adjust_orientation=False)
      pixels = fn.resize(pixels, resize_shorter=_RESIZE)
      mirror = 0
    if normalise:
      pixels = fn.crop_mirror_normalize(
        pixels,
        crop=(_SIZE, _SIZE),
        mirror=mirror,
        mean=list(_MEAN),
        std=list(_STD),
        dtype=types.FLOAT,
        output_layout="HWC",
      )
    else:
      pixels = fn.crop_mirror_normalize(
        pixels, crop=(_SIZE, _SIZE), mirror=mirror, dtype=types.UINT8, output_layout="HWC"
      )
    return pixels, labels

  running = pipeline()
  running.build()
  return (running.run() for _ in itertools.count()), collections.Counter()


def timm_a1(examples: Examples, batch_size: int) -> Made:
  """Bytes in memory to batches of uint8, as timm's loader makes them before its prefetcher."""
  from timm.data.transforms_factory import create_transform
  import torch

  torch.set_num_threads(1)
  for seed in (torch.manual_seed, random.seed, np.random.seed):
    seed(0)
  transform = create_transform(
    _SIZE,
    is_training=True,
    interpolation="random",
    auto_augment="rand-m7-mstd0.5-inc1",
    use_prefetcher=True,
  )
  data = itertools.cycle([example.image for example in examples])
  return (
    torch.stack(
      [
        transform(Image.open(io.BytesIO(d)).convert("RGB"))
        for d in itertools.islice(data, batch_size)
      ]
    )
    for _ in itertools.count()
  ), collections.Counter()


def pillow_train(examples: Examples, batch_size: int) -> Made:
  return _pillow(examples, batch_size, True)


def pillow_eval(examples: Examples, batch_size: int) -> Made:
  return _pillow(examples, batch_size, False)


def _pillow(examples: Examples, batch_size: int, train: bool) -> Made:
  """Bytes in memory to batches: decode all pixels, then crop and resize."""
  rng = np.random.default_rng(0)

  def view(data: bytes) -> np.ndarray:
    rgb = Image.open(io.BytesIO(data)).convert("RGB")
    if train:
      top, left, height, width = image.draw_box(rgb.height, rgb.width, rng, _AREA, _ASPECT)
      rgb = rgb.crop((left, top, left + width, top + height))
      rgb = rgb.resize((_SIZE, _SIZE), Image.Resampling.BILINEAR)
      if rng.random() < 0.5:
        rgb = rgb.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    else:
      scale = _RESIZE / min(rgb.size)
      size = max(_RESIZE, int(rgb.width * scale)), max(_RESIZE, int(rgb.height * scale))
      rgb = rgb.resize(size, Image.Resampling.BILINEAR)
      left, top = (round((side - _SIZE) / 2) for side in size)
      rgb = rgb.crop((left, top, left + _SIZE, top + _SIZE))
    return np.asarray(rgb)

  data = itertools.cycle([example.image for example in examples])
  return (
    np.stack([view(d) for d in itertools.islice(data, batch_size)]) for _ in itertools.count()
  ), collections.Counter()
