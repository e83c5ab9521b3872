"""The record format, the manifest's files, and what the modules may import."""

import subprocess
import sys

import pytest

from input_pipeline import records
from input_pipeline.errors import BadRecordError, DataError


@pytest.mark.parametrize("image", [b"", b"x", bytes(range(256)) * 1000])
@pytest.mark.parametrize("label", [0, 999, 2**40])
def test_a_record_comes_back(image, label):
  record = records.Record(image, label, "n01440764_ü.JPEG")
  assert records.decode(records.encode(record), "?") == record


def test_equal_records_give_equal_bytes():
  record = records.Record(b"abc", 1, "x.JPEG")
  assert records.encode(record) == records.encode(record)


def test_a_name_that_is_not_utf8_comes_back():
  name = b"caf\xe9.JPEG".decode("utf-8", "surrogateescape")
  assert records.decode(records.encode(records.Record(b"", 0, name)), "?").name == name


def test_the_bytes_are_those_of_tensorflow():
  # Written out by hand from the format: features { feature { key value } }, in any order of keys.
  def field(number, data):
    return bytes([number << 3 | 2, len(data)]) + data

  def feature(key, value):
    return field(1, field(1, key) + field(2, value))

  image = feature(b"image", field(1, field(1, b"JPEG")))
  label = feature(b"label", field(3, field(1, b"\x07")))
  unpacked = feature(b"label", field(3, b"\x08\x07"))
  name = feature(b"file_name", field(1, field(1, b"n.JPEG")))
  other = feature(b"bbox", field(2, field(1, b"\0\0\x80\x3f")))  # a float list, which is skipped
  for label_bytes in (label, unpacked):
    data = field(1, image + other + label_bytes + name)
    assert records.decode(data, "?") == records.Record(b"JPEG", 7, "n.JPEG")
  assert records.decode(field(1, image + label), "shard[3]").name == "shard[3]"


@pytest.mark.parametrize(
  ("data", "says"), [(b"", "no feature 'image'"), (b"\xff\xff\xff", "no tf.train.Example")]
)
def test_other_bytes_are_a_bad_record(data, says):
  with pytest.raises(BadRecordError, match=says):
    records.decode(data, "?")


def test_shards_are_named_as_documented():
  assert records.shard_name("train", 0, 1024) == "train-00000-of-01024.array_record"


def test_json_that_is_torn_is_named(tmp_path):
  path = tmp_path / "manifest.json"
  records.write_json(str(path), {"a": 1})
  assert records.read_json(str(path)) == {"a": 1}
  path.write_text('{"a": ')
  with pytest.raises(DataError, match=r"manifest\.json cannot be read"):
    records.read_json(str(path))


def test_no_module_imports_tensorflow_torch_or_the_trainer():
  program = (
    "import importlib, pkgutil, sys, input_pipeline\n"
    "for m in pkgutil.walk_packages(input_pipeline.__path__, 'input_pipeline.'):\n"
    "  importlib.import_module(m.name)\n"
    "assert 'input_pipeline.sources.hf_stream' in sys.modules\n"
    "print([m for m in ('tensorflow', 'torch', 'trainer', 'sklearn') if m in sys.modules])"
  )
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "[]"


def test_making_shards_needs_no_jax():
  program = "import sys, input_pipeline.prepare.__main__; print('jax' in sys.modules)"
  done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
  assert done.stdout.strip() == "False"
