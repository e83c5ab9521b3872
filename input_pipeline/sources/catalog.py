"""Descriptions of folders of shards: the manifest of `prepare`, or the files of TFDS."""

from collections.abc import Mapping, Sequence
import contextlib
import hashlib
import json
import os
from typing import Any, NamedTuple, Protocol

from input_pipeline import records
from input_pipeline.errors import DataError
from input_pipeline.sources import splits

TFDS_INFO = "dataset_info.json"
_TFDS_TEMPLATE = (
  "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"  # where it does not write down the names
)

_PREPARE = "rerun `python -m input_pipeline.prepare` as before, it keeps the good shards"
_TFDS_PREPARE = "prepare the data with TFDS again"


class Folder(Protocol):
  """A folder of shards, on a disk (LocalFolder) or elsewhere (tensorstore.Bucket)."""

  def path_of(self, name: str) -> str:
    """Return the full name of a file, for messages."""

  def read_small(self, name: str) -> bytes | None:
    """Return the whole of a file, or None if there is none."""

  def sizes(self) -> dict[str, int | None] | None:
    """Return the files with their bytes, None for unknown ones; None if they cannot be listed."""


class LocalFolder:
  """A folder on a disk or a mounted file system."""

  def __init__(self, path: str):
    self.path = path

  def path_of(self, name: str) -> str:
    """See Folder."""
    return os.path.join(self.path, name)

  def read_small(self, name: str) -> bytes | None:
    """See Folder; raise DataError for a file that exists and cannot be read."""
    try:
      with open(self.path_of(name), "rb") as f:
        return f.read()
    except FileNotFoundError:
      return None
    except OSError as e:
      raise DataError(f"{self.path_of(name)} cannot be read ({e.strerror}).") from e

  def sizes(self) -> dict[str, int | None]:
    """See Folder."""
    with os.scandir(self.path) as entries:
      return {e.name: e.stat().st_size for e in entries if e.is_file()}


class Shard(NamedTuple):
  """A file of records: name, number of records, and bytes and hash if they are known."""

  name: str
  count: int  # type: ignore[assignment]  # hides tuple.count
  size: int | None
  sha256: str | None = None


class Split(NamedTuple):
  """A split of a data set.

  Attributes:
    shards: in order, none of them empty.
    class_names: one per label.
    mend: what to do about a damaged shard, for messages.
    class_counts: number of records of each class, if known.
    digest: see `Source.digest`.
    keys: names of the features of a record that hold the image and the label.
    notes: see `Source.notes`.
  """

  shards: list[Shard]
  class_names: list[str]
  mend: str
  class_counts: list[int] | None = None
  digest: str = ""
  keys: tuple[str, str] = records.KEYS
  notes: Sequence[str] = ()


def read(
  folder: Folder,
  split: str,
  columns: tuple[str, str] = ("", ""),
  num_classes: int | None = None,
) -> Split:
  """Read the description of a split.

  Args:
    folder: where it is.
    split: its name, or a synonym.
    columns: `config.data.image_column` and `label_column`; "" takes the only ones that there are.
    num_classes: taken where the feature of the label is not described.

  Raises:
    DataError: there is none, it is incomplete, or a shard is missing or has another size.
  """
  manifest = _read_json(folder, records.MANIFEST)
  if manifest is not None:
    split, found = _from_manifest(folder, manifest, split)
  else:
    info = _read_json(folder, TFDS_INFO)
    if info is None:
      raise DataError(
        f"{folder.path_of('')} holds neither {records.MANIFEST} nor {TFDS_INFO}, without which "
        "shards cannot be used; if prepare was stopped, run the same command again."
      )
    split, found = _from_tfds(folder, info, split, columns, num_classes)
  sizes = folder.sizes()
  listed_in = TFDS_INFO if manifest is None else records.MANIFEST
  for name, _, size, _ in found.shards:
    if sizes is None:  # no listing
      break
    if name not in sizes:
      raise DataError(f"{folder.path_of(name)} is missing, but {listed_in} lists it; {found.mend}.")
    actual = sizes[name]
    if size is not None and actual is not None and actual != size:
      raise DataError(
        f"{folder.path_of(name)} has {actual:,} bytes, but {listed_in} lists {size:,}; "
        f"{found.mend}."
      )
  shards = [shard for shard in found.shards if shard.count]
  if not shards:
    raise DataError(f"split {split!r} of {folder.path_of('')} holds no examples.")
  if not found.class_names:
    raise DataError(f"{folder.path_of('')} lists no classes; {found.mend}.")
  return found._replace(shards=shards, digest=_digest(shards))


def _digest(shards: Sequence[Shard]) -> str:
  """Return a hash of the contents of shards where it is known, else of their names and lengths."""
  if all(shard.sha256 for shard in shards):
    return "shards " + _hash([[shard.sha256, shard.count] for shard in shards])
  return "tfds " + _hash([[shard.name, shard.count] for shard in shards])


def _hash(value: object) -> str:
  return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:32]


def _from_manifest(folder: Folder, manifest: Any, split: str) -> tuple[str, Split]:
  file = folder.path_of(records.MANIFEST)
  version = manifest.get("format_version") if isinstance(manifest, dict) else None
  if version != records.FORMAT_VERSION:
    raise DataError(
      f"{file} has format_version {version}, but this program reads {records.FORMAT_VERSION}; "
      "make the shards again with `python -m input_pipeline.prepare`."
    )
  try:
    described = manifest["splits"]
    split = splits.find(split, list(described), folder.path_of(""))
    found = described[split]
    shards = [Shard(s["file"], s["examples"], s["bytes"], s.get("sha256")) for s in found["shards"]]
    classes, counts = manifest["classes"], found.get("class_counts")
  except (AttributeError, KeyError, TypeError) as e:
    raise DataError(f"{file} is incomplete ({type(e).__name__}: {e}); {_PREPARE}.") from e
  if trouble := _contradiction(shards, classes, counts):
    raise DataError(f"{file} is damaged, {trouble} of {split}; {_PREPARE}.")
  return split, Split(shards, classes, _PREPARE, counts)


def _contradiction(shards: Sequence[Shard], classes: Any, counts: Any) -> str:
  """Return what is wrong with the values in a manifest; "" if nothing is."""
  names = [shard.name for shard in shards]
  numbers = [number for shard in shards for number in (shard.count, shard.size)]
  if not all(isinstance(name, str) for name in names) or not _are_counts(numbers):
    return "it does not list names and numbers of records and bytes for all shards"
  if not all(isinstance(shard.sha256, str | None) for shard in shards):
    return "a checksum is no text in the list"
  if len(set(names)) < len(names):
    return "it lists a shard twice"
  if not isinstance(classes, list) or not all(isinstance(name, str) for name in classes):
    return "its classes are no list of names in the description"
  if counts is None:
    return ""
  if not isinstance(counts, list) or not _are_counts(counts) or len(counts) != len(classes):
    return "it does not count the records of each class"
  return ""


def _are_counts(values: Sequence[Any]) -> bool:
  return all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values)


def _from_tfds(
  folder: Folder, info: Any, split: str, columns: tuple[str, str], num_classes: int | None
) -> tuple[str, Split]:
  try:
    # `tfds convert_format` adds array_record to the format that was there first.
    formats = [info.get("fileFormat", "tfrecord"), *info.get("alternativeFileFormats", ())]
    if "array_record" not in formats:
      raise DataError(
        f"{folder.path_of('')} was written by TFDS as {' and '.join(formats)}; prepare it with "
        "file_format=array_record, or add that with `tfds convert_format`."
      )
    described = {s["name"]: s for s in info["splits"]}
    split = splits.find(split, list(described), folder.path_of(""))
    counts = [int(n) for n in described[split]["shardLengths"]]
    template = described[split].get("filepathTemplate") or _TFDS_TEMPLATE
    shards = [
      Shard(
        template.format(
          DATASET=info["name"],
          SPLIT=split,
          FILEFORMAT="array_record",
          SHARD_X_OF_Y=f"{i:05d}-of-{len(counts):05d}",
          SHARD_INDEX=f"{i:05d}",
          NUM_SHARDS=f"{len(counts):05d}",
        ),
        count,
        None,
      )
      for i, count in enumerate(counts)
    ]
  except (KeyError, TypeError, ValueError, AttributeError) as e:
    raise DataError(
      f"{folder.path_of(TFDS_INFO)} is not what TFDS writes ({type(e).__name__}: {e}); "
      f"{_TFDS_PREPARE}."
    ) from e
  features = _tfds_features(folder)
  image, label, notes = _tfds_keys(folder, features, columns)
  # A feature that a user names need not be described.
  classes = _tfds_classes(folder, features, label, num_classes if columns[1] else None)
  return split, Split(shards, classes, _TFDS_PREPARE, keys=(image, label), notes=notes)


def _tfds_features(folder: Folder) -> dict[str, Any]:
  """Return the features of a record by name; none if they are not described."""
  described = _read_json(folder, "features.json")
  try:
    return dict(described["featuresDict"]["features"])
  except (KeyError, TypeError, ValueError):
    return {}


def _tfds_keys(
  folder: Folder, features: Mapping[str, Any], columns: tuple[str, str]
) -> tuple[str, str, list[str]]:
  """Return the features of the image and of the label, and notes where these were chosen."""
  chosen, notes = [], []
  for usual, kind, asked, field in (
    ("image", "Image", columns[0], "image_column"),
    ("label", "ClassLabel", columns[1], "label_column"),
  ):
    found = [
      name
      for name, feature in features.items()
      if isinstance(feature, dict) and str(feature.get("pythonClassName", "")).endswith(f".{kind}")
    ]
    name = asked or (usual if usual in found or not found else found[0])
    if not asked and usual not in found and len(found) > 1:
      raise DataError(
        f"{folder.path_of('features.json')} describes {' and '.join(sorted(found))}; choose one "
        f"with --config.data.{field}."
      )
    if name != usual:
      notes.append(f"the {usual} of a record is its feature {name}")
    chosen.append(name)
  return chosen[0], chosen[1], notes


def _tfds_classes(
  folder: Folder, features: Mapping[str, Any], label: str, num_classes: int | None
) -> list[str]:
  """Return the names of the classes in the order of the labels; numbers if TFDS has no names."""
  number = num_classes if label not in features else None
  with contextlib.suppress(KeyError, TypeError, ValueError):
    number = int(features[label]["classLabel"]["numClasses"])
  file = f"{label}.labels.txt"
  written = folder.read_small(file)
  if written is not None:
    # One name a line, which may be empty; the last line ends like the others, or not.
    try:
      text = written.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as e:
      raise DataError(f"{folder.path_of(file)} is no text ({e}); {_TFDS_PREPARE}.") from e
    names = [line.strip(" \t\r") for line in text.split("\n")]
    while names and not names[-1] and (number is None or len(names) > number):
      names.pop()
    if number is not None and len(names) != number and label in features:
      raise DataError(
        f"{folder.path_of(file)} has {len(names)} lines, but features.json describes {number} "
        f"classes; {_TFDS_PREPARE}."
      )
    return names
  if number is None:
    raise DataError(
      f"{folder.path_of('features.json')} describes no feature `{label}` with a number of classes; "
      "only datasets of labelled images can be used; --config.data.label_column names another."
    )
  return [str(i) for i in range(number)]


def _read_json(folder: Folder, name: str) -> Any:
  """Return the JSON in a file, None if there is none; raise DataError if it is no JSON."""
  data = folder.read_small(name)
  if data is None:
    return None
  try:
    return json.loads(data)
  except ValueError as e:
    if data.lstrip().startswith(b"<"):
      raise DataError(
        f"{folder.path_of(name)} is a web page; its server may ask for a login, or not "
        "have the file."
      ) from e
    raise DataError(f"{folder.path_of(name)} cannot be read ({e}); make the data again.") from e
