"""Noise, to measure a run without its input."""

from typing import Self

import ml_collections
import numpy as np
import simplejpeg

from input_pipeline.errors import DataError
from input_pipeline.records import Record
from input_pipeline.sources.base import IndexReader, Source


class SyntheticReader(IndexReader):
  """The same few batches over and over: what remains is the cost of the run itself."""

  distinct = 4


class SyntheticSource(Source):
  """JPEGs of noise, one class after the other."""

  index_reader = SyntheticReader

  def __init__(self, num_examples: int, num_classes: int):
    self.class_names = tuple(str(i) for i in range(num_classes))
    self.num_classes = num_classes
    self._num_examples = num_examples

  @classmethod
  def open(cls, data: ml_collections.ConfigDict, split: str, num_classes: int | None) -> Self:
    """See Source."""
    del split
    if data.synthetic_examples < 1:
      raise DataError("config.data.synthetic_examples must be at least 1.")
    if num_classes is None:
      raise DataError("config.data.kind=synthetic needs a number of classes.")
    return cls(data.synthetic_examples, num_classes)

  def __len__(self) -> int:
    return self._num_examples

  def __getitem__(self, index: int) -> Record:
    if not 0 <= index < len(self):
      raise IndexError(f"example {index} of {len(self)}")
    noise = np.random.default_rng(index).integers(0, 256, (32, 32, 3), np.uint8)
    return Record(simplejpeg.encode_jpeg(noise), index % self.num_classes, f"synthetic {index}")
