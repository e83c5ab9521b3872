"""Parts of a split: which examples they have, from every kind of source, on any number of hosts."""

import collections
import contextlib

import numpy as np
import pytest
import simplejpeg

from configs import base
from input_pipeline import loader, sources
from input_pipeline.errors import DataError
from input_pipeline.records import Record
from input_pipeline.sources import slices
from input_pipeline.sources.base import Source
from tests.input_pipeline import conftest

PARTS = ("train[:70%]", "train[70%:90%]", "train[90%:]")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
  """A folder of 72 training images and 12 others of six classes, each of another grey."""
  root = tmp_path_factory.mktemp("folder")
  for split, count in (("train", 72), ("val", 12)):
    for i in range(count):
      path = root / split / f"class{i % 6}" / f"{i:02d}.jpg"
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(simplejpeg.encode_jpeg(np.full((8, 8, 3), 3 * i, np.uint8)))
  return root


@pytest.fixture(scope="module")
def prepared(tmp_path_factory, pictures):
  """The same in three shards."""
  out = tmp_path_factory.mktemp("prepared") / "out"
  assert conftest.run_prepare("--out", out, "--folder", pictures, "--shards", 3) == 0
  return out


@pytest.fixture(scope="module")
def parquet(tmp_path_factory, pictures):
  """The same training images in parquet: row groups of 10."""
  datasets = pytest.importorskip("datasets", reason="parquet needs datasets")
  root = tmp_path_factory.mktemp("parquet")
  files = sorted((pictures / "train").glob("*/*.jpg"))
  table = datasets.Dataset.from_dict(
    {
      "image": [{"bytes": f.read_bytes(), "path": f.name} for f in files],
      "label": [int(f.parent.name[-1]) for f in files],
    },
    features=datasets.Features(
      {"image": datasets.Image(), "label": datasets.ClassLabel(names=[f"c{i}" for i in range(6)])}
    ),
  )
  table.to_parquet(str(root / "train-00000-of-00001.parquet"), batch_size=10)
  return root


def data_of(kind, path):
  data = base.get_config().data
  data.update(kind=kind, path=str(path), image_size=8, eval_image_size=8, eval_resize=8)
  data.update(workers=0, threads=0, prefetch_batches=1, synthetic_examples=72, hf_window=20)
  data.update(stream_lanes=2, stream_block=4, stream_window=2)
  return data


def pass_over(source, data, hosts=1):
  """Return what an evaluation on so many hosts counts: the number of each (label, pixels)."""
  seen = collections.Counter()
  for host in range(hosts):
    with contextlib.closing(
      loader.eval_batches(source, data, batch_size=8, host=host, hosts=hosts)
    ) as batches:
      for batch in batches:
        for i in np.flatnonzero(batch["mask"]):
          seen[int(batch["label"][i]), batch["image"][i].tobytes()] += 1
  return seen


@pytest.fixture(params=["array_record", "stream", "folder", "hf"])
def data(request, prepared, pictures):
  if request.param == "hf":
    return data_of("hf", f"hf:{request.getfixturevalue('parquet')}")
  return data_of(request.param, pictures if request.param == "folder" else prepared)


def test_parts_share_nothing_and_leave_nothing_out(data):
  whole = pass_over(sources.open_source(data, "train", 6), data)
  parts = [sources.open_source(data, name, 6) for name in PARTS]
  assert [len(part) for part in parts] == [50, 15, 7]
  # On any number of hosts each example counts once.
  seen = [pass_over(part, data, hosts) for part, hosts in zip(parts, (1, 2, 4), strict=True)]
  assert [sum(s.values()) for s in seen] == [50, 15, 7]
  assert sum(seen, collections.Counter()) == whole
  assert pass_over(parts[2], data, 1) == seen[2]
  # The folder is class by class, a part of it is not.
  assert {label for label, _ in seen[0]} == set(range(6))
  assert len({label for label, _ in seen[1]}) >= 5


def test_an_epoch_of_a_part_has_each_of_its_examples_once(data, monkeypatch):
  data.update(flip=False, crop_area=(1.0, 1.0), crop_aspect=(1.0, 1.0))
  part = sources.open_source(data, "train[:70%]", 6)
  labels = collections.Counter(label for label, _ in pass_over(part, data).elements())
  seen = collections.Counter()
  with contextlib.closing(
    loader.train_batches(part, data, seed=1, global_batch_size=10)
  ) as batches:
    for _ in range(5):
      seen.update(next(batches)["label"].tolist())
  assert seen == labels


def test_parts_of_synthetic_examples():
  data = data_of("synthetic", "")
  parts = [sources.open_source(data, name, 6) for name in PARTS]
  names = [part[i].name for part in parts for i in range(len(part))]
  assert sorted(names) == sorted(f"synthetic {i}" for i in range(72))
  # A pass repeats four batches, and still counts what the part holds.
  assert sum(pass_over(parts[0], data, 2).values()) == 50


def test_array_record_and_stream_have_the_same_slices(prepared):
  both = [data_of(kind, prepared) for kind in ("array_record", "stream")]
  seen = [pass_over(sources.open_source(d, "train[:13]", 6), d) for d in both]
  assert seen[0] == seen[1] and sum(seen[0].values()) == 13


def test_a_whole_split_is_as_it_was(prepared):
  data = data_of("array_record", prepared)
  plain, dressed = (sources.open_source(data, name, 6) for name in ("train", " train[:] "))
  assert type(plain) is type(dressed) and len(plain) == len(dressed) == 72
  assert [plain[i] for i in range(72)] == [dressed[i] for i in range(72)]


def test_which_examples_is_for_ever():
  """Other numbers would mix training examples into the minival of a run that resumes."""
  assert slices.choose(20, 0, 5).tolist() == [1, 4, 10, 13, 17]
  part = slices.parse("train[99%:]")
  assert part.bounds(1_281_167) == (1_268_355, 1_281_167)
  assert slices.parse("train[:99%]").bounds(1_281_167) == (0, 1_268_355)
  assert slices.parse("train[12.5%:300]").bounds(1000) == (125, 300)


@pytest.mark.parametrize(
  "split, words",
  [
    ("train[99%]", "write a split as NAME or NAME"),
    ("train[-5:]", "write a split as NAME or NAME"),
    ("train[:5", "write a split as NAME or NAME"),
    ("", "write a split as NAME or NAME"),
    ("train[100%:]", r"is \[72:72\] of the 72 examples of 'train', which holds none"),
    ("train[:0.1%]", "which holds none"),
    ("train[9:3]", "which holds none"),
    ("train[60:80]", "goes beyond them"),
    ("trian[:5]", "has no split 'trian'"),
  ],
)
def test_what_is_no_part_is_refused(prepared, split, words):
  with pytest.raises(DataError, match=words) as error:
    sources.open_source(data_of("array_record", prepared), split, 6)
  assert "\n" not in str(error.value)


def test_several_splits():
  field = "config.data.eval_split"
  assert slices.several("train[99%:], val", field) == ["train[99%:]", "val"]
  for text, words in (
    ("val,val", "names 'val' twice"),
    ("val,", "config.data.eval_split is ''"),
  ):
    with pytest.raises(DataError, match=words):
      slices.several(text, field)


class Backwards(Source):
  """A source with an order of its own."""

  num_classes, class_names = 6, ()

  @classmethod
  def open(cls, data, split, num_classes):
    del data, split, num_classes
    return cls()

  def __len__(self):
    return 10

  def __getitem__(self, index):
    return Record(b"", index, "")

  def train_reader(self, plan):
    raise NotImplementedError


def test_a_source_with_an_order_of_its_own_serves_no_part():
  data = data_of(f"{__name__}:Backwards", "")
  with pytest.raises(DataError, match="Backwards has an order of its own"):
    sources.open_source(data, "train[:5]", 6)
