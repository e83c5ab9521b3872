"""One record: a serialized tf.train.Example in an ArrayRecord shard, as TFDS writes ImageNet.

The features are `image` (bytes, the untouched file), `label` (int64) and `file_name` (bytes), so
that one reader serves our shards and those of TFDS. The message is declared here, because
TensorFlow is not a dependency.
"""

from collections.abc import Sequence
import json
import os
from typing import Any, NamedTuple

from google.protobuf import descriptor_pb2, descriptor_pool, message, message_factory

from input_pipeline.errors import BadRecordError, DataError

# One record per chunk makes random access cheap, and JPEG does not compress any further.
WRITER_OPTIONS = "group_size:1,uncompressed"
KEYS = ("image", "label")  # features of a record; TFDS may have others
MANIFEST = "manifest.json"
FORMAT_VERSION = 1


class Record(NamedTuple):
  """One example: the bytes of the image file, its class in 0..num_classes-1, and a name to show."""

  image: bytes
  label: int
  name: str


def _example_class() -> Any:
  """Declare the part of tf.train.Example that images need; the rest (float lists) is skipped."""
  field = descriptor_pb2.FieldDescriptorProto
  file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="p", syntax="proto3")

  def declare(
    messages: Any, name: str, fields: Sequence[tuple[str, int, bool, int | str]]
  ) -> descriptor_pb2.DescriptorProto:
    """Add a message of fields (name, number, repeated, scalar type or name of a message)."""
    declared = messages.add(name=name)
    for key, number, repeated, kind in fields:
      added = declared.field.add(name=key, number=number)
      added.label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
      if isinstance(kind, str):
        added.type, added.type_name = field.TYPE_MESSAGE, f".p.{kind}"
      else:
        added.type = kind
    return declared

  top = file.message_type
  declare(top, "BytesList", [("value", 1, True, field.TYPE_BYTES)])
  declare(top, "Int64List", [("value", 1, True, field.TYPE_INT64)])
  lists = [("bytes_list", 1, False, "BytesList"), ("int64_list", 3, False, "Int64List")]
  declare(top, "Feature", lists)
  features = declare(top, "Features", [("feature", 1, True, "Features.FeatureEntry")])
  entries: list[tuple[str, int, bool, int | str]] = [
    ("key", 1, False, field.TYPE_STRING),
    ("value", 2, False, "Feature"),
  ]
  declare(features.nested_type, "FeatureEntry", entries).options.map_entry = True
  declare(top, "Example", [("features", 1, False, "Features")])
  pool = descriptor_pool.DescriptorPool()
  pool.Add(file)
  return message_factory.GetMessageClass(pool.FindMessageTypeByName("p.Example"))


_Example = _example_class()


def encode(record: Record) -> bytes:
  """Return a record as a serialized tf.train.Example; equal records give equal bytes."""
  example = _Example()
  feature = example.features.feature
  feature["image"].bytes_list.value.append(record.image)
  feature["label"].int64_list.value.append(record.label)
  feature["file_name"].bytes_list.value.append(record.name.encode("utf-8", "surrogateescape"))
  return example.SerializeToString(deterministic=True)


def decode(data: bytes, name: str, keys: tuple[str, str] = KEYS) -> Record:
  """Return the record in a serialized tf.train.Example.

  Args:
    data: the serialized message.
    name: of the record if it has no `file_name`, as in many TFDS datasets.
    keys: names of the features that hold the image and the label.

  Raises:
    BadRecordError: `data` is no such message, or has no `image` or no `label`.
  """
  try:
    feature = _Example.FromString(data).features.feature
  except message.DecodeError as e:
    raise BadRecordError(f"no tf.train.Example ({e})") from e
  # Looking up an absent key would insert it, hence the tests with `in`.
  for key in keys:
    if key not in feature:
      raise BadRecordError(f"has no feature {key!r}, only {', '.join(sorted(feature)) or 'none'}")
  image = feature[keys[0]].bytes_list.value
  label = feature[keys[1]].int64_list.value
  if len(image) != 1 or len(label) != 1:
    raise BadRecordError(f"`{keys[0]}` must hold one byte string and `{keys[1]}` one integer")
  if "file_name" in feature and feature["file_name"].bytes_list.value:
    name = feature["file_name"].bytes_list.value[0].decode("utf-8", "surrogateescape")
  return Record(image[0], label[0], name)


def shard_name(split: str, index: int, count: int) -> str:
  """Return the file name of shard `index` of `count`, e.g. train-00000-of-01024.array_record."""
  return f"{split}-{index:05d}-of-{count:05d}.array_record"


def to_json(value: Any) -> bytes:
  """Return JSON as the files of `prepare` have it: indented, ASCII."""
  return (json.dumps(value, indent=1, ensure_ascii=True) + "\n").encode()


def write_json(path: str, value: Any) -> None:
  """Write JSON so that a reader sees the old file or the new one, never a part."""
  temporary = f"{path}.tmp"
  with open(temporary, "wb") as f:
    f.write(to_json(value))
    f.flush()
    os.fsync(f.fileno())
  os.replace(temporary, path)


def read_json(path: str) -> Any:
  """Return the JSON in a file.

  Raises:
    DataError: the file cannot be read or is no JSON.
  """
  try:
    with open(path, encoding="utf-8") as f:
      return json.load(f)
  except (OSError, ValueError) as e:
    raise DataError(f"{path} cannot be read ({e}); make the data again.") from e
