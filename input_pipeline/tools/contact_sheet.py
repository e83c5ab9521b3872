"""A picture of images as the model gets them, each with the name and number of its label."""

from collections.abc import Sequence
import contextlib
import math
from typing import Any, NamedTuple

import ml_collections
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from input_pipeline import augment, loader
from input_pipeline.errors import BadRecordError
from input_pipeline.order import seeds
from input_pipeline.rows import Batch, Draws, crop_of
from input_pipeline.sources import Source
from input_pipeline.sources.base import Subset

_COLUMNS = 8
_LEAST = 112  # pixels; smaller images are shown in multiples of their size, so that labels fit
_GAP = 8
_TEXT = 12  # pixels, height of letters
_LINE = 18


class Section(NamedTuple):
  """Images of one kind: a title, uint8 [n, size, size, 3], their captions, and which were bad."""

  title: str
  images: np.ndarray
  captions: Sequence[str]
  bad: np.ndarray


def training_section(source: Source, config: Any, count: int) -> Section:
  """Return the first `count` examples of a run of this config, augmented on the host as in it.

  A few less if `count` does not divide the batch.
  """
  # The order of parquet depends on the hosts and not on the batch; that of the others the reverse.
  batch_size = config.global_batch_size if source.indexed else min(count, len(source))
  # The part of the first of so many hosts: the order of streamed data depends on the whole batch.
  hosts = next(n for n in range(-(-batch_size // count), batch_size + 1) if batch_size % n == 0)
  with contextlib.closing(
    loader.train_batches(
      source, _alone(config.data), seed=config.seed, global_batch_size=batch_size, hosts=hosts
    )
  ) as batches:
    batch = next(batches)
  title = f"training, the first {len(batch['label'])} of a run with seed {config.seed}"
  return _section(title, source, batch)


def evaluation_section(source: Source, config: Any, count: int) -> Section:
  """Return the crops of `count` examples from all over a split, as in an evaluation."""
  indices = np.linspace(0, len(source) - 1, min(count, len(source))).astype(int).tolist()
  with contextlib.closing(
    loader.eval_batches(Subset(source, indices), _alone(config.data), batch_size=len(indices))
  ) as batches:
    batch = next(batches)
  return _section(f"evaluation, {len(indices)} of {len(source):,}", source, batch)


def views_section(source: Source, config: Any, count: int) -> Section:
  """Return 8 augmented views of each of `count` images, with the steps that each has had.

  Records that cannot be decoded are left out.
  """
  data, size = config.data, int(config.data.image_size)
  crop, operations = crop_of(data), augment.parse(data.operations)
  draws = Draws(seeds(config.seed)[1])
  views, captions = [], []
  for index in np.linspace(0, len(source) - 1, min(count, len(source))).astype(int).tolist():
    for epoch in range(_COLUMNS):
      rng = draws.of(epoch * len(source) + index)
      try:
        view = crop(source[index].image, rng, size)
      except BadRecordError:
        break
      captions.append(", ".join(augment.apply_named(operations, view, rng)) or "no step")
      views.append(view)
  title = f"{_COLUMNS} views of an image a row, by {data.operations}"
  pixels = np.stack(views) if views else np.zeros((0, size, size, 3), np.uint8)
  return Section(title, pixels, captions, np.zeros(len(views), bool))


def _alone(data: ml_collections.ConfigDict) -> Any:
  """Return `config.data` changed so that a single batch is cheap; its content stays the same."""
  data = data.copy_and_resolve_references()
  data.update(workers=0, threads=0, prefetch_batches=1, max_bad_fraction=1.0)
  data.stream_ahead_steps = 1
  return data


def _section(title: str, source: Source, batch: Batch) -> Section:
  captions = [f"{source.class_names[label]} ({label})" for label in batch["label"].tolist()]
  return Section(title, batch["image"], captions, batch["bad"])


def draw(sections: Sequence[Section]) -> tuple[Image.Image, list[list[tuple[int, int]]]]:
  """Draw sections one below the other.

  Pixels are shown unchanged; images under 112 pixels are enlarged by a whole number. Under each is
  its caption, in red if the record was bad and another image is shown.

  Returns:
    The picture; and for each section, (left, top) of each of its images.
  """
  zooms = [max(1, _LEAST // section.images.shape[1]) for section in sections]
  cells = [s.images.shape[1] * zoom + _GAP for s, zoom in zip(sections, zooms, strict=True)]
  rows = [math.ceil(len(section.captions) / _COLUMNS) for section in sections]
  height = _GAP + sum(_LINE + n * (c + _LINE) for n, c in zip(rows, cells, strict=True))
  sheet = Image.new("RGB", (_GAP + _COLUMNS * max(cells), height), "white")
  pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(_TEXT)
  places: list[list[tuple[int, int]]] = []
  top = _GAP
  for section, zoom, cell in zip(sections, zooms, cells, strict=True):
    pen.text((_GAP, top), section.title, "black", font)
    top += _LINE
    places.append([])
    for i, caption in enumerate(section.captions):
      left = _GAP + i % _COLUMNS * cell
      if i and i % _COLUMNS == 0:
        top += cell + _LINE
      places[-1].append((left, top))
      pixels = section.images[i].repeat(zoom, axis=0).repeat(zoom, axis=1)
      sheet.paste(Image.fromarray(pixels), (left, top))
      while len(caption) > 1 and font.getlength(caption) > cell - _GAP:
        caption = caption[:-2] + "…"
      pen.text((left, top + cell - _GAP), caption, "red" if section.bad[i] else "black", font)
    top += cell + _LINE
  return sheet, places
