"""The images that `input_pipeline.bench` uses."""

from collections.abc import Sequence
import io
import os
import statistics

from array_record.python import array_record_module
import numpy as np
from PIL import Image

from configs import base, recipes
from input_pipeline import image, records
from input_pipeline.errors import DataError
from input_pipeline.prepare import shards
from input_pipeline.sources import Source, catalog, open_source
from input_pipeline.sources.array_record import ArrayRecordSource


class Sample(Source):
  """Some examples of a source, repeated."""

  def __init__(self, source: Source, count: int):
    """Choose up to `count` examples, evenly over the source."""
    step = max(1, len(source) // count)
    self.num_classes, self.class_names = source.num_classes, source.class_names
    self._indices = range(0, len(source), step)[:count]
    self._source = source

  def __len__(self) -> int:
    return recipes.IMAGENET  # shuffling few costs more

  def __getitem__(self, index: int) -> records.Record:
    return self._source[self._indices[index % len(self._indices)]]

  def once(self) -> list[records.Record]:
    """Return each example of the sample once."""
    return [self[i] for i in range(len(self._indices))]


def open_data(path: str, split: str, count: int, folder: str) -> Source:
  """Open the data of a bench.

  Args:
    path: as `config.data.path`, or a folder of class folders, or "" to generate images.
    split: of the data.
    count: largest number of images to use.
    folder: where a shard is written if the images are not in shards yet.
  """
  if not path:
    made = [records.Record(_photograph(i), 0, f"generated {i}") for i in range(min(count, 64))]
    return write_shard(folder, made)
  data = base.get_config().data
  data.path = path
  source = open_source(data, split, None)
  if not source.indexed:
    raise DataError(
      f"{path} has no access by index, which a bench needs; make shards of it with "
      "`python -m input_pipeline.prepare --from` and measure those."
    )
  return source if source.shards else write_shard(folder, Sample(source, count).once())


def write_shard(folder: str, examples: Sequence[records.Record], max_size: int = 0) -> Source:
  """Write examples to an ArrayRecord file as `prepare` does, with --max-size if it is not 0."""
  name = f"{max_size}.array_record"
  writer = array_record_module.ArrayRecordWriter(os.path.join(folder, name), records.WRITER_OPTIONS)
  for example in examples:
    rgb = image.decode(example.image)
    if max_size and min(rgb.shape[:2]) > max_size:
      example = records.Record(shards.shrink(rgb, max_size), example.label, example.name)
    writer.write(records.encode(example))
  writer.close()
  classes = [str(i) for i in range(1 + max(e.label for e in examples))]
  shard = catalog.Shard(name, len(examples), None)
  return ArrayRecordSource(catalog.LocalFolder(folder), catalog.Split([shard], classes, ""))


def _photograph(seed: int) -> bytes:
  """Return a JPEG with the size, bytes and detail at all scales of a typical one of ImageNet."""
  rng = np.random.default_rng(seed)
  pixels = np.zeros((375, 500, 3), np.float32)
  for n in (4, 8, 16, 32, 64, 128, 256):
    noise = Image.fromarray(rng.integers(0, 256, (n, n, 3), np.uint8))
    pixels += np.asarray(noise.resize((500, 375), Image.Resampling.BICUBIC)) / n**0.5
  file = io.BytesIO()
  square = Image.fromarray(np.clip(pixels * 0.55, 0, 255).astype(np.uint8))
  square.save(file, "JPEG", quality=95, subsampling=0)
  return file.getvalue()


def pixel_effect(
  before: Sequence[records.Record], after: Sequence[records.Record]
) -> tuple[float, float]:
  """Return the mean absolute difference, of 255 levels, of training and of evaluation views."""
  train, evaluated = [], []
  data = base.get_config().data
  augmentation = (224, data.crop_area, data.crop_aspect, False)
  for i, pair in enumerate(zip(before, after, strict=True)):
    views = [image.train_view(e.image, np.random.default_rng(i), *augmentation) for e in pair]
    train.append(np.abs(np.subtract(*views, dtype=np.int16)).mean())
    views = [image.eval_view(e.image, 256, 224) for e in pair]
    evaluated.append(np.abs(np.subtract(*views, dtype=np.int16)).mean())
  return statistics.mean(train), statistics.mean(evaluated)
