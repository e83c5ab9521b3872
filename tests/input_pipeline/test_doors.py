"""What is added from outside of the package: a source of its own, by config; and the front door."""

import subprocess
import sys

import numpy as np
import pytest

import input_pipeline
from input_pipeline import sources
from input_pipeline.records import Record
from input_pipeline.sources.base import ENDLESS, IndexReader, Source
from tests.input_pipeline.conftest import data_config, encoded, picture
from tests.input_pipeline.test_loader import digest, evaluate, joined, take

_HERE = "tests.input_pipeline.test_doors"


class Pictures(Source):
  """As many pictures as the path says, a class each."""

  def __init__(self, count):
    self.num_classes = count
    self.class_names = tuple(f"picture {i}" for i in range(count))

  @classmethod
  def open(cls, data, split, num_classes):
    return cls(int(data.path) if split == "train" else 5)

  def __len__(self):
    return self.num_classes

  def __getitem__(self, index):
    return Record(encoded(picture(index, 24, 24)), index, f"picture {index}")


class Backwards:
  """An order by index."""

  def __init__(self, length):
    self._length = length

  def __getitem__(self, number):
    return self._length - 1 - number % self._length


class BackwardPictures(Pictures):
  """The same in an order of its own."""

  order = "backwards"

  def train_reader(self, plan):
    return IndexReader(self, plan, range(plan.first_step, ENDLESS), Backwards(len(self)))

  def describe_order(self, data, *, global_batch_size, hosts):
    return "the last one first"


def opened(kind, split="train", **fields):
  data = data_config("19", kind=f"{_HERE}:{kind}", **fields)
  return input_pipeline.open_source(data, split, 19 if split == "train" else 5), data


def test_a_source_from_outside_is_trained_on():
  expected = take(*opened("Pictures"), 19)
  labels = np.concatenate([batch["label"] for batch in expected]).reshape(8, 19)
  assert all(sorted(epoch) == list(range(19)) for epoch in labels)
  assert len({tuple(epoch) for epoch in labels}) == 8
  parts = [take(*opened("Pictures"), 19, host=host, hosts=2) for host in (0, 1)]
  assert digest(joined(parts)) == digest(expected)
  assert digest(take(*opened("Pictures", workers=1), 3, first_step=2)) == digest(expected[2:5])


def test_a_source_from_outside_is_evaluated():
  batches = evaluate(*opened("Pictures", "val"), batch=4)
  assert [batch["label"].tolist() for batch in batches] == [[0, 1, 2, 3], [4, 0, 0, 0]]
  assert batches[1]["mask"].tolist() == [True, False, False, False]


def test_a_source_from_outside_may_have_an_order_of_its_own():
  source, data = opened("BackwardPictures")
  (batch,) = take(source, data, 1)
  assert batch["label"].tolist() == list(range(18, 10, -1))
  assert source.describe_order(data, global_batch_size=8, hosts=1) == "the last one first"
  assert sources.order_of(data.kind, data.path) == "backwards"


@pytest.mark.parametrize(
  ("kind", "path", "order"),
  [
    ("auto", "", "shuffle"),
    ("auto", "/no/such/folder", "shuffle"),
    ("array_record", "/no/such/folder", "shuffle"),
    ("folder", "~/images", "shuffle"),
    ("synthetic", "", "shuffle"),
    ("auto", "gs://bucket/folder", "lanes"),
    ("stream", "/no/such/folder", "lanes"),
    ("auto", "hf:imagenet-1k", "windows"),
    ("hf", "gs://bucket/folder", "windows"),
  ],
)
def test_the_order_of_an_old_run_follows_from_its_config(kind, path, order):
  assert sources.order_of(kind, path) == order
  assert order in sources.ORDERS


@pytest.mark.parametrize(
  ("kind", "says"),
  [
    ("lmdb", "is 'lmdb'; there is auto, array_record, stream, folder, hf, synthetic"),
    ("streams", "is 'streams'; did you mean stream"),
    ("no.such:Source", "is 'no.such:Source', which cannot be imported"),
    (f"{_HERE}:Absent", "which cannot be imported"),
    (f"{_HERE}:Backwards", "which is no subclass of input_pipeline.sources.base.Source"),
  ],
)
def test_a_kind_that_is_not_there_is_named(kind, says):
  with pytest.raises(input_pipeline.DataError, match=f"config.data.kind .*{says}"):
    input_pipeline.open_source(data_config("", kind=kind), "train", 3)


def test_a_known_kind_passes_the_check():
  for kind in ("auto", *sources.KINDS, f"{_HERE}:Pictures"):
    sources.check_kind(kind)
  with pytest.raises(ValueError, match=r"config.data.kind"):
    sources.check_kind("lmdb")


def test_the_front_door_is_light():
  code = """
import sys
import input_pipeline
from input_pipeline import sources
assert not {"grain", "jax", "tensorstore"} & sys.modules.keys()
assert callable(input_pipeline.open_source) and issubclass(input_pipeline.DataError, Exception)
assert "jax" not in sys.modules
assert callable(input_pipeline.train_batches) and callable(input_pipeline.eval_batches)
try:
  input_pipeline.absent
except AttributeError as e:
  print(e)
"""
  done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
  assert done.stdout == "module 'input_pipeline' has no attribute 'absent'\n", done.stderr
