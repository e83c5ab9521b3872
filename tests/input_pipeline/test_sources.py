"""Opening data of each kind, and every sentence that says why they cannot be opened."""

import contextlib
import json
import os
import pickle
import resource
import shutil
import time

import pytest

from input_pipeline import records, sources
from input_pipeline.errors import BadRecordError, DataError, InputLost
from input_pipeline.sources import array_record, catalog
from tests.input_pipeline.conftest import data_config, make_folder, tfds_folder, write_shard


def open_source(path, split="train", num_classes=3, **fields):
  return sources.open_source(data_config(path, **fields), split, num_classes)


def all_of(source):
  found = [source[i] for i in range(len(source))]
  return sorted((r.label, r.name.rpartition("/")[2], r.image) for r in found)


@pytest.fixture
def copied(shards, tmp_path):
  """A copy of the shards to be damaged, outside of the folder that the fixture shares."""
  return shutil.copytree(shards, tmp_path / "copied")


def test_a_folder_and_its_shards_hold_the_same(folder, shards):
  for split, count in (("train", 23), ("val", 11)):
    files, packed = open_source(folder, split), open_source(shards, split)
    assert len(files) == len(packed) == count
    assert files.class_names == packed.class_names == ("a", "b", "c")
    assert all_of(files) == all_of(packed)


def test_val_and_validation_are_one(folder, shards, tmp_path):
  assert len(open_source(shards, "validation")) == 11
  assert len(open_source(folder, "validation")) == 11
  assert len(open_source(tfds_folder(tmp_path / "tfds"), "val", 2)) == 2


def test_a_folder_written_by_tfds(tmp_path):
  source = open_source(tfds_folder(tmp_path / "tfds"), "train", 2)
  assert source.class_names == ("x", "y")
  assert [source[i].name for i in range(5)] == [f"{i}.JPEG" for i in range(5)]
  assert source[4].label == 0


def test_a_folder_written_by_tfds_in_another_format_first(tmp_path):
  root = tfds_folder(
    tmp_path / "tfds", fileFormat="tfrecord", alternativeFileFormats=["array_record"]
  )
  assert len(open_source(root, "train", 2)) == 5


@pytest.mark.parametrize(
  ("template", "name"),
  [
    ("", "imagenet2012-train.array_record-00001-of-00002"),
    ("{SPLIT}.{FILEFORMAT}-{SHARD_INDEX}", "train.array_record-00001"),
    ("{DATASET}_{NUM_SHARDS}_{SHARD_INDEX}", "imagenet2012_00002_00001"),
  ],
)
def test_a_folder_written_by_tfds_with_other_names_of_files(tmp_path, template, name):
  splits = [{"name": "train", "shardLengths": ["3", "2"], "filepathTemplate": template}]
  root = tfds_folder(tmp_path / "tfds", splits=splits)
  for i in range(2):
    old = root / f"imagenet2012-train.array_record-{i:05d}-of-00002"
    old.rename(root / name.replace("00001", f"{i:05d}"))
  source = open_source(root, "train", 2)
  assert [source[i].name for i in range(5)] == [f"{i}.JPEG" for i in range(5)]


def test_a_damaged_record_of_tfds_costs_only_itself(tmp_path):
  root = tfds_folder(tmp_path / "tfds")
  shard = root / "imagenet2012-train.array_record-00000-of-00002"
  data = bytearray(shard.read_bytes())
  pixels = open_source(root, "train", 2)[0].image[-200:-100]
  data[data.index(pixels)] ^= 1  # zstd leaves what it cannot compress as it is
  shard.write_bytes(data)
  source = open_source(root, "train", 2)
  with pytest.raises(BadRecordError, match=r"00000-of-00002\[0\]: cannot be read"):
    source[0]
  assert [source[i].name for i in range(1, 5)] == [f"{i}.JPEG" for i in range(1, 5)]


def test_a_folder_written_by_tfds_without_names_of_classes(tmp_path):
  source = open_source(tfds_folder(tmp_path / "tfds", labels=()), "train", 2)
  assert source.class_names == ("0", "1")


def test_synthetic_records_are_images_of_every_class():
  source = open_source("", kind="synthetic", synthetic_examples=7)
  assert len(source) == 7
  assert {source[i].label for i in range(7)} == {0, 1, 2}
  assert source[3] == source[3]
  assert source[3].image.startswith(b"\xff\xd8")


@pytest.mark.parametrize("kind", ["array_record", "folder", "synthetic"])
def test_a_source_can_be_sent_to_another_process(kind, folder, shards):
  source = open_source({"array_record": shards, "folder": folder, "synthetic": ""}[kind], kind=kind)
  before = source[5]
  assert pickle.loads(pickle.dumps(source))[5] == before


def test_an_index_out_of_range_is_an_error(shards):
  source = open_source(shards)
  for index in (-1, len(source)):
    with pytest.raises(IndexError):
      source[index]


def test_the_many_shards_of_imagenet_open_at_once(tmp_path):
  names = [records.shard_name("train", i, 1024) for i in range(1024)]
  for name in names:
    (tmp_path / name).write_bytes(b"never read")
  shards = [{"file": name, "examples": 1251, "bytes": 10, "sha256": ""} for name in names]
  manifest = {"format_version": 1, "classes": ["a", "b"], "splits": {"train": {"shards": shards}}}
  (tmp_path / records.MANIFEST).write_text(json.dumps(manifest))
  start = time.process_time()
  source = open_source(tmp_path, num_classes=2)
  assert time.process_time() - start < 1
  assert len(source) == 1024 * 1251


def test_more_shards_than_files_that_may_be_open(shards):
  before = resource.getrlimit(resource.RLIMIT_NOFILE)
  resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
  try:
    array_record.ArrayRecordSource(
      catalog.LocalFolder(str(shards)),
      catalog.Split([catalog.Shard("never opened", 1, 1)] * 500, ["a"], "mend it"),
    )
    assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= min(1000, before[1])
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize(
  ("fields", "says"),
  [
    ({"path": ""}, "config.data.path is empty"),
    ({"path": "/no/such"}, "/no/such, which does not exist"),
    ({"path": "ftp://host/imagenet"}, "ftp:// is not supported; it may be gs://"),
    ({"path": "gs://bucket/imagenet", "kind": "folder"}, "give --config.data.kind=stream"),
    ({"path": __file__}, "which is a file; unpack it if it is an archive"),
    (
      {"path": "", "kind": "lmdb"},
      "config.data.kind is 'lmdb'; there is auto, array_record",
    ),
    ({"path": "", "kind": "synthetic", "synthetic_examples": 0}, "synthetic_examples must be"),
  ],
)
def test_a_bad_path_or_kind_is_named(fields, says):
  with pytest.raises(DataError, match=says):
    open_source(**fields)


@pytest.mark.parametrize("kind", ["auto", "array_record", "folder"])
def test_an_empty_folder_is_named(tmp_path, kind):
  with pytest.raises(DataError, match="which is empty; fill it"):
    open_source(tmp_path, kind=kind)


def test_a_folder_of_something_else_is_named(tmp_path):
  (tmp_path / "notes.txt").write_text("x")
  with pytest.raises(DataError, match=r"is not laid out as .*: no CLASS/.* as notes\.txt"):
    open_source(tmp_path)
  with pytest.raises(DataError, match="if prepare was stopped, run the same command again"):
    open_source(tmp_path, kind="array_record")
  (tmp_path / "a.png").write_text("x")
  with pytest.raises(
    DataError, match=r"images, as a\.png, lie in no folder of a class; put those of"
  ):
    open_source(tmp_path)


def test_the_parent_of_the_data_is_refused_with_the_right_folder(tmp_path):
  tfds_folder(tmp_path / "imagenet2012" / "5.1.0")
  with pytest.raises(DataError, match=r"the data are in .*imagenet2012/5\.1\.0; give that folder"):
    open_source(tmp_path)


def test_a_split_that_is_not_there_is_named(folder, shards, tmp_path):
  for path in (folder, shards):
    with pytest.raises(DataError, match="has no split 'test', only train, val"):
      open_source(path, "test")
  with pytest.raises(DataError, match="has no split 'test', only train, validation"):
    open_source(tfds_folder(tmp_path / "tfds"), "test", 2)


def test_a_split_without_images_is_named(tmp_path):
  (tmp_path / "train" / "a").mkdir(parents=True)
  with pytest.raises(DataError, match="train holds no CLASS/"):
    open_source(tmp_path)


def test_another_number_of_classes_is_named(folder, shards):
  for path in (folder, shards):
    with pytest.raises(
      DataError, match=r"has 3 classes, .* is 1000; give --config.model.num_classes=3"
    ):
      open_source(path, num_classes=1000)


def test_val_with_other_classes_than_train_is_named(tmp_path):
  root = make_folder(tmp_path / "f", {"train": {"a": 1, "b": 1}, "val": {"a": 1}})
  for split in ("train", "val"):
    with pytest.raises(DataError, match="must have the same class folders, but 'b' is in only one"):
      open_source(root, split, 2)


def test_a_missing_shard_is_named(copied):
  (copied / records.shard_name("train", 1, 3)).unlink()
  with pytest.raises(DataError, match=r"train-00001-of-00003\.array_record is missing.*rerun"):
    open_source(copied)


def test_a_shard_of_another_size_is_named(copied):
  with open(copied / records.shard_name("train", 1, 3), "ab") as f:
    f.write(b"x")
  with pytest.raises(
    DataError, match=r"train-00001-of-00003.* bytes, but manifest.json lists.*rerun"
  ):
    open_source(copied)


def edit_manifest(path, change):
  manifest = json.loads((path / records.MANIFEST).read_text())
  change(manifest)
  (path / records.MANIFEST).write_text(json.dumps(manifest))


def test_another_number_of_records_is_named_when_the_shard_is_read(copied):
  def change(manifest):
    manifest["splits"]["train"]["shards"][0]["examples"] += 1

  edit_manifest(copied, change)
  with pytest.raises(
    DataError, match=r"train-00000-of-00003.* holds 8 records instead of 9; rerun"
  ):
    open_source(copied)[0]


def test_a_shard_that_vanishes_later_is_named(copied):
  source = open_source(copied)
  (copied / records.shard_name("train", 0, 3)).unlink()
  with pytest.raises(
    DataError, match=r"train-00000-of-00003.* cannot be opened .No such file.*rerun"
  ):
    source[0]


def test_a_shard_of_the_right_size_that_is_none_is_named(copied):
  shard = copied / records.shard_name("train", 0, 3)
  shard.write_bytes(b"x" * shard.stat().st_size)
  with pytest.raises(DataError, match=r"train-00000-of-00003.* is damaged or no ArrayRecord file"):
    open_source(copied)[0]


def test_a_damaged_record_costs_only_itself(copied):
  shard = copied / records.shard_name("train", 0, 3)
  source = open_source(copied)
  third = source[3].image
  data = bytearray(shard.read_bytes())
  at = data.index(third) + 50
  data[at : at + 20] = bytes(20)
  shard.write_bytes(data)
  source = open_source(copied)
  with pytest.raises(
    BadRecordError, match=r"train-00000-of-00003\.array_record\[3\]: cannot be read"
  ):
    source[3]
  assert source[2].image
  assert source[4].image


@pytest.mark.parametrize("label", [-1, 3])
def test_a_label_out_of_range_is_named(copied, label):
  shard = copied / records.shard_name("val", 0, 1)
  write_shard(shard, [records.Record(b"x", label, "odd.JPEG")])

  def change(manifest):
    manifest["splits"]["val"]["shards"] = [
      {"file": shard.name, "examples": 1, "bytes": shard.stat().st_size, "sha256": ""}
    ]

  edit_manifest(copied, change)
  with pytest.raises(
    BadRecordError, match=rf"array_record\[0\]: has label {label}, but there are 3 classes"
  ):
    open_source(copied, "val")[0]


@pytest.mark.parametrize(
  ("change", "says"),
  [
    (lambda m: m.update(format_version=2), "has format_version 2, but this program reads 1"),
    (lambda m: m.pop("classes"), "manifest.json is incomplete"),
    (lambda m: m["splits"]["train"].pop("shards"), "manifest.json is incomplete"),
    (lambda m: m["splits"]["train"].update(shards=[]), "holds no examples"),
  ],
)
def test_a_manifest_that_is_wrong_is_named(copied, change, says):
  edit_manifest(copied, change)
  with pytest.raises(DataError, match=says):
    open_source(copied)


def test_a_manifest_that_is_no_object_is_named(copied):
  (copied / records.MANIFEST).write_text("[]")
  with pytest.raises(DataError, match="has format_version None"):
    open_source(copied)


def test_what_is_wrong_with_a_tfds_folder_is_named(tmp_path):
  root = tfds_folder(tmp_path / "1", fileFormat="tfrecord")
  with pytest.raises(
    DataError, match=r"written by TFDS as tfrecord; prepare it with .*convert_format"
  ):
    open_source(root, num_classes=2)
  root = tfds_folder(tmp_path / "2")
  (root / "imagenet2012-train.array_record-00001-of-00002").unlink()
  with pytest.raises(DataError, match=r"train.array_record-00001-of-00002 is missing"):
    open_source(root, num_classes=2)
  root = tfds_folder(tmp_path / "3", splits=[{"name": "train"}])
  with pytest.raises(DataError, match=r"is not what TFDS writes.*shardLengths"):
    open_source(root, num_classes=2)
  root = tfds_folder(tmp_path / "4", labels=())
  (root / "features.json").write_text("{}")
  with pytest.raises(DataError, match="describes no feature `label`"):
    open_source(root, num_classes=2)


def test_a_file_that_vanishes_is_a_bad_record(tmp_path):
  root = make_folder(tmp_path / "f", {"train": {"a": 2, "b": 1}})
  source = open_source(root, num_classes=2)
  (root / "train" / "a" / "a_001.JPEG").unlink()
  assert source[0].name == "train/a/a_000.JPEG"
  with pytest.raises(BadRecordError, match=r"a_001\.JPEG: cannot be read \(No such file"):
    source[1]


@pytest.mark.parametrize("gone", ["", "train"])
def test_a_folder_that_vanishes_is_no_fault_of_its_files(tmp_path, gone):
  """As where it is unmounted: not one bad record after the other, which no rerun would mend."""
  root = make_folder(tmp_path / "f", {"train": {"a": 2, "b": 1}})
  source = open_source(root, num_classes=2)
  (root / gone).rename(tmp_path / "elsewhere")
  with pytest.raises(InputLost, match=r"train was removed, renamed or unmounted under this run"):
    source[1]
  (tmp_path / "elsewhere").rename(root / gone)
  assert source[1].name == "train/a/a_001.JPEG"


def test_a_disk_that_fails_under_an_open_shard_is_no_fault_of_its_records(copied, monkeypatch):
  class Reader:
    def read(self, positions):
      raise RuntimeError("Transport endpoint is not connected; pread() failed")

  source, shard = open_source(copied), copied / records.shard_name("train", 0, 3)
  monkeypatch.setattr(source, "_readers", [Reader()] * 3)
  with pytest.raises(BadRecordError):
    source[0]
  shard.unlink()
  with pytest.raises(InputLost, match=r"train-00000-of-00003.* was removed, renamed or unmounted"):
    source[0]


@pytest.mark.parametrize("kind", ["folder", "array_record"])
def test_a_process_without_files_to_open_blames_no_record(kind, folder, copied):
  source = open_source(folder if kind == "folder" else copied)
  before, opened = resource.getrlimit(resource.RLIMIT_NOFILE), []
  resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
  try:
    with contextlib.suppress(OSError):
      while True:
        opened.append(os.open(os.devnull, os.O_RDONLY))
    with pytest.raises(InputLost, match=r"Too many open files.*ulimit -n"):
      source[0]
  finally:
    for number in opened:
      os.close(number)
    resource.setrlimit(resource.RLIMIT_NOFILE, before)
