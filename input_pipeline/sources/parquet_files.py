"""Which parquet files a data set has, of the hub or of a folder, and of which split each is."""

from collections.abc import Mapping, Sequence
import logging
import os
import re
from typing import TYPE_CHECKING, Any, NamedTuple

from input_pipeline.errors import DataError, InputLost
from input_pipeline.remote import fsspec as remote
from input_pipeline.remote import has_scheme
from input_pipeline.sources import layout
from input_pipeline.sources.base import HF_PREFIX
from input_pipeline.sources.splits import SYNONYMS, canonical

if TYPE_CHECKING:
  import datasets

MISSING_FILE = "missing_file"  # a fault that may be allowed
_DEPTH = 4  # of folders below the one that is given
_NAMES = {"train": "train", "val": "validation", "test": "test"}  # of splits, as on the hub
_OTHER = "other"
_NAME = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<config>[\w.-]+))?(@(?P<revision>[\w./-]+))?")
_NUMBERED = re.compile(
  r"(?P<name>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})(-[0-9a-f]{16})?\.parquet"
)
_COMMIT = re.compile(r"@([0-9a-f]{40})/")


class DataSet(NamedTuple):
  """A data set of parquet.

  Attributes:
    path: what the user gave.
    splits: URLs or paths of the files by the names that the splits have there.
    features: those that the data set declares, or None: each file has its own.
    revision: of the hub, or "".
    left_out: names of other files by reason; see `layout.REASONS`.
    notes: what a user should know, a line each.
  """

  path: str
  splits: dict[str, list[str]]
  features: "datasets.Features | None" = None
  revision: str = ""
  left_out: Mapping[str, Sequence[str]] = {}
  notes: tuple[str, ...] = ()


def find_splits(path: str, allow: Sequence[str] = ()) -> DataSet:
  """Return the parquet files of each split.

  Args:
    path: [hf:]NAME[:CONFIG][@REVISION] on the hub, or a folder: local, gs://, https:// (where the
      server lists it).
    allow: faults that are allowed.

  Raises:
    DataError: there is no such data set, this token may not read it, it is not parquet, files of a
      numbered series are missing, or of which split a file is is not clear.
    InputLost: the hub or a server is silent.
  """
  datasets = _import_datasets()
  where = path.removeprefix(HF_PREFIX)
  local = os.path.expanduser(where)
  try:
    if is_folder(where):
      found = _in_folder(path, where.rstrip("/") if has_scheme(where) else local)
    else:
      name = _NAME.fullmatch(where)
      if where.startswith(("/", ".", "~")) or not name:
        raise DataError(
          f"{path}: {where or 'nothing'} is neither a folder nor NAME[:CONFIG][@REVISION] on the "
          "hub."
        )
      builder = datasets.load_dataset_builder(
        name["name"], name["config"], revision=name["revision"]
      )
      files = {str(n): [str(f) for f in fs] for n, fs in (builder.config.data_files or {}).items()}
      commits = {c[1] for fs in files.values() for f in fs if (c := _COMMIT.search(f))}
      found = DataSet(path, files, builder.info.features, ", ".join(sorted(commits)))
  except DataError:
    raise
  except Exception as e:  # of `datasets`, its hub library, fsspec and their HTTP clients
    passes = remote.is_failure(e) and remote.may_pass(e) and "OfflineMode" not in repr(e)
    kind = InputLost if passes else DataError
    raise kind(f"{path} cannot be opened: {remote.said(e)}; {_advice(e)}.") from e
  for split, of_split in found.splits.items():
    for file in of_split:
      if not file.endswith(".parquet"):
        raise DataError(
          f"{path} holds {os.path.basename(file)}, but only parquet is read; many data sets of the "
          f"hub have a copy in parquet: give {HF_PREFIX}NAME@refs/convert/parquet."
        )
    if MISSING_FILE not in allow:
      _refuse_gaps(path, split, of_split)
  return found


def is_folder(path: str) -> bool:
  """Whether a path, with or without its prefix, is a folder and no data set of the hub."""
  where = path.removeprefix(HF_PREFIX)
  return has_scheme(where) or os.path.isdir(os.path.expanduser(where))


def _refuse_gaps(path: str, split: str, files: Sequence[str]) -> None:
  """Raise DataError if a series of files, NAME-00000-of-00009 and so on, is not whole."""
  series: dict[tuple[str, int], set[int]] = {}
  for file in files:
    if numbered := _NUMBERED.fullmatch(file):
      key = numbered["name"], int(numbered["count"])
      series.setdefault(key, set()).add(int(numbered["index"]))
  for (name, count), indices in series.items():
    if missing := sorted(set(range(count)) - indices):
      first = f"{os.path.basename(name)}-{missing[0]:05d}-of-{count:05d}.parquet"
      raise DataError(
        f"{path}: {len(missing)} of the {count} files of {split} are missing, such as {first}; "
        f"fetch them, or allow it with --config.data.allow={MISSING_FILE} (--allow={MISSING_FILE} "
        "of prepare)."
      )


def _in_folder(path: str, folder: str) -> DataSet:
  """Return the parquet files below a folder by split, by their names as `datasets` does it."""
  fs, root = remote.filesystem(folder)
  # One walk for all names and sizes: `datasets` walks once for each of dozens of patterns.
  found = remote.retried(folder, lambda: sorted(fs.find(root, maxdepth=_DEPTH)))
  files, left_out = [], dict[str, list[str]]()
  for name in found:
    below = name.removeprefix(root).strip("/")
    if any(layout.is_system(part) for part in below.split("/")):
      left_out.setdefault("system", []).append(below)
    elif below.endswith(".parquet"):
      files.append(name)
    else:
      left_out.setdefault("no_parquet", []).append(below)
  if not files:
    raise DataError(
      f"{path} holds no parquet files"
      + " that the server lists" * has_scheme(folder)
      + f"; a folder of images or shards is given without {HF_PREFIX}, to prepare as --folder."
    )
  splits: dict[str, list[str]] = {}
  sets: dict[str, dict[str, str]] = {}
  for file in files:
    below = file.removeprefix(root)
    split = split_of(below)
    splits.setdefault(split, []).append(fs.unstrip_protocol(file) if has_scheme(folder) else file)
    sets.setdefault(split, {}).setdefault(_folders_around(below), below)
  for split, by_folder in sets.items():
    if len(by_folder) > 1:
      one, other = sorted(by_folder.values())[:2]
      raise DataError(
        f"{path} holds several data sets: {one} and {other} are both of the split {split}; give "
        "one of their folders, or put them into one."
      )
  meaning: dict[str, str] = {}
  for name in splits:
    twin = meaning.setdefault(canonical(name), name)
    if twin != name:
      raise DataError(
        f"{path} has the splits {twin} and {name}, which mean the same; rename the files of one."
      )
  if list(splits) == [_OTHER]:
    splits = {"train": splits[_OTHER]}
  return DataSet(path, splits, left_out=left_out)


def split_of(name: str) -> str:
  """Return the split in the path of a file: SPLIT-00000-of-00009.parquet, or .../train/...

  Raises:
    DataError: a name holds the words of several splits.
  """
  if numbered := re.fullmatch(r"(?:.*/)?([\w.]+)-\d{5}-of-\d{5}(-[0-9a-f]{16})?\.parquet", name):
    return numbered[1]
  for part in reversed(name.split("/")):
    found = _splits_in(part)
    if len(found) > 1:
      raise DataError(
        f"the name of {name} holds the words of several splits, {' and '.join(found)}; rename it "
        "to SPLIT-00000-of-00001.parquet."
      )
    if found:
      return found[0]
  return _OTHER


def _splits_in(part: str) -> list[str]:
  words = set(re.split(r"[-._ 0-9]+", part.lower()))
  return [_NAMES[split] for split, synonyms in SYNONYMS.items() if words & set(synonyms)]


def _folders_around(name: str) -> str:
  """Return the folders of a file above the one that names its split."""
  parts = name.strip("/").split("/")
  named = [i for i, part in enumerate(parts[:-1]) if _splits_in(part)]
  if named and not _splits_in(parts[-1]):
    return "/".join(parts[: named[-1]])
  return "/".join(part for part in parts[:-1] if not _splits_in(part))


def _import_datasets() -> Any:
  try:
    import datasets
  except ImportError as e:
    raise DataError(f"{HF_PREFIX} needs the library datasets ({e}): pip install -e '.[hf]'.") from e
  datasets.disable_progress_bars()
  for name in ("httpx", "httpx2"):  # a line for each request
    logging.getLogger(name).setLevel(logging.WARNING)
  return datasets


def _advice(error: Exception) -> str:
  text = f"{type(error).__name__} {error}"
  if any(word in text for word in ("gated", "Gated", "401", "403", "NotFound", "doesn't exist")):
    return (
      "check the name, accept its terms on the hub, and give a token in the environment as HF_TOKEN"
    )
  return "check the name and the network"
