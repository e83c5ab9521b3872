"""The kinds of sources: `config.data.kind` -> examples by step.

source = open_source(config.data, config.data.train_split, config.model.num_classes)
source[7]  # Record(image=b"...", label=3, name="n01440764_18.JPEG")
"""

import inspect

import ml_collections

from configs import names
from input_pipeline.errors import DataError
from input_pipeline.remote import has_scheme
from input_pipeline.sources import layout, slices
from input_pipeline.sources.base import HF_PREFIX, Source

__all__ = [
  "KINDS",
  "ORDERS",
  "Source",
  "check_kind",
  "check_number",
  "open_source",
  "order_of",
  "source_class",
]

# Imported when it is used. A config may also name one from elsewhere, as "package.module:Name".
KINDS = {
  "array_record": "input_pipeline.sources.array_record:ArrayRecordSource",
  "stream": "input_pipeline.sources.stream:StreamSource",
  "folder": "input_pipeline.sources.folder:FolderSource",
  "hf": "input_pipeline.sources.hf:HfSource",
  "synthetic": "input_pipeline.sources.synthetic:SyntheticSource",
}

# The orders that sources have, in words: "the examples of this run are ...".
ORDERS = {
  "shuffle": "shuffled as a whole, as those of kind array_record and folder are",
  "lanes": "shuffled in lanes, as those of kind stream are",
  "windows": "shuffled in windows, as those of kind hf are",
}

_AUTO = "auto"
_FIELD = "config.data.kind"


def open_source(
  data: ml_collections.ConfigDict, split: str, num_classes: int | None, any_number: bool = False
) -> Source:
  """Open one split of the data of a config.

  Args:
    data: `config.data`; `path` and `kind` are read, and the fields of this kind.
    split: name of the split, or a part of it as in train[:99%] (see `slices`); `val` and
      `validation` are synonyms.
    num_classes: `config.model.num_classes`; None takes what there is, unless data are synthetic.
    any_number: whether the number of classes may be another, where the caller compares names.

  Raises:
    DataError: the path, the split or the number of classes do not fit what is there.
  """
  part = slices.parse(split)
  kind = _by_path(data.kind, data.path)
  if kind == _AUTO:
    from input_pipeline.sources import local

    kind = local.guess_kind(data.path)
  source = _find(kind).open(data, part.name, num_classes)
  if num_classes is not None and not any_number:
    check_number(source, data, num_classes)
  if not any_number and kind != "synthetic" and layout.ONE_CLASS not in layout.words(data.allow):
    layout.check_classes(data.path, source.class_names, source.left_out)
  if part.whole:
    return source
  begin, end = part.bounds(len(source))
  subset = source.subset(slices.choose(len(source), begin, end))
  subset.digest = f"{source.digest}[{begin}:{end}]" if source.digest else ""
  subset.revision, subset.renumbered = source.revision, source.renumbered
  subset.left_out, subset.notes = source.left_out, source.notes
  return subset


def check_number(source: Source, data: ml_collections.ConfigDict, num_classes: int) -> None:
  """Raise DataError if a source has another number of classes than the model."""
  if source.num_classes != num_classes:
    raise DataError(
      f"{data.path or data.kind} has {source.num_classes} classes, but config.model.num_classes is "
      f"{num_classes}; give --config.model.num_classes={source.num_classes}."
    )


def check_kind(kind: str) -> None:
  """Raise ValueError, one sentence, if there is no such `config.data.kind`."""
  names.find({_AUTO: None, **KINDS}, kind, _FIELD)


def source_class(kind: str, path: str) -> type[Source]:
  """Return the class that `config.data.kind` and `config.data.path` stand for.

  For auto and a local path, which is not read, that is the one of array_record: a folder of images
  has the same order.

  Raises:
    DataError: there is no such kind.
  """
  kind = _by_path(kind, path)
  return _find("array_record" if kind == _AUTO else kind)


def order_of(kind: str, path: str) -> str:
  """Return the name of the order of training examples, in general a key of ORDERS.

  Nothing is stored with a run: the order of an old one follows from its config.

  Args:
    kind: `config.data.kind`.
    path: `config.data.path`, which is not read.

  Raises:
    DataError: there is no such kind.
  """
  return source_class(kind, path).order


def _by_path(kind: str, path: str) -> str:
  """Return the kind that auto stands for, or still auto for a local path."""
  if kind == _AUTO and path.startswith(HF_PREFIX):
    return "hf"
  if kind == _AUTO and has_scheme(path):
    return "stream"
  return kind


def _find(kind: str) -> type[Source]:
  try:
    check_kind(kind)
    found = names.find(KINDS, kind, _FIELD)
  except ValueError as e:
    raise DataError(str(e)) from e
  if not (inspect.isclass(found) and issubclass(found, Source)):
    raise DataError(f"{_FIELD} is {kind!r}, which is no subclass of {Source.__module__}.Source.")
  return found
