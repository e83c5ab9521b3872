"""Image files of a person, prepared as an evaluation prepares those of its data."""

import io
import os
import pathlib

import numpy as np
from PIL import Image

from configs.names import natural
from input_pipeline import image
from input_pipeline.errors import BadRecordError
from input_pipeline.sources import layout
from trainer.weights import net as net_lib

_LEAST = 2  # pixels of a side; a single pixel shows nothing


def files_in(folder: str | os.PathLike[str]) -> list[pathlib.Path]:
  """Return the image files in a folder and all folders in it, by their suffix, as one counts."""
  files = [path for path in pathlib.Path(folder).rglob("*") if layout.is_image(path.name)]
  return sorted((p for p in files if p.is_file()), key=lambda path: natural(str(path)))


def view(data: bytes, net: net_lib.Net, size: int = 0) -> np.ndarray:
  """Return what the model sees of an image file: uint8 [size, size, 3].

  Args:
    data: the whole file.
    net: the model, whose config has the size and the resize of evaluation.
    size: pixels; the resize follows in proportion. 0 is that of evaluation.

  Raises:
    BadRecordError: if it is no image, damaged, or a single row of pixels.
    DataError: if it is smaller than `size`, and the config resizes nothing.
  """
  fields = net.config.data
  size = size or fields.eval_image_size
  resize = fields.eval_resize and max(
    size, round(size * fields.eval_resize / fields.eval_image_size)
  )
  pixels = image.eval_view(data, resize, size, fields.eval_interpolation)
  with Image.open(io.BytesIO(data)) as opened:
    width, height = opened.size
  if min(width, height) < _LEAST:
    raise BadRecordError(f"has {width} x {height} pixels, which show nothing")
  return pixels
