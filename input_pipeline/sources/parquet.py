"""What parquet files mean: which columns are the images and the labels, and what the labels are.

One numbering holds for all files of a data set: each file names its classes itself, perhaps in
another order than the next one, so labels are compared by name.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from input_pipeline.errors import DataError, one_line
from input_pipeline.sources import layout

if TYPE_CHECKING:
  import datasets

# From the label in a file to that of the data set; None where both are the same.
Table = Mapping[Any, int] | None


class UnlabelledError(DataError):
  """All labels of a split are -1, which stands for none."""


class Columns(NamedTuple):
  """The columns of the images and of the labels, and notes on what was chosen."""

  image: str
  label: str
  notes: tuple[str, ...] = ()


def features_of(footer: Any) -> "datasets.Features":
  """Return the features of a file by its footer."""
  import datasets

  return datasets.Features.from_arrow_schema(footer.schema.to_arrow_schema())


def choose(path: str, features: "datasets.Features", image: str = "", label: str = "") -> Columns:
  """Find the columns.

  Args:
    path: what the user gave, for messages.
    features: of the data set.
    image: `config.data.image_column`; "" takes the only candidate, or the one named `image`.
    label: `config.data.label_column`, likewise.

  Raises:
    DataError: there is no such column, or several.
  """
  import datasets

  binary = (
    {"bytes": datasets.Value("binary"), "path": datasets.Value("string")},
    datasets.Value("binary"),
    datasets.Value("large_binary"),
  )
  images = [n for n, f in features.items() if isinstance(f, datasets.Image)]
  images = images or [n for n, f in features.items() if f in binary]
  labels = [n for n, f in features.items() if isinstance(f, datasets.ClassLabel)]
  labels = labels or [n for n, f in features.items() if _is_value(f, "int")]
  if not labels and _is_value(features.get("label"), "string", "bool"):
    labels = ["label"]
  usable = [n for n, f in features.items() if _is_value(f, "int", "string", "bool")]
  chosen, notes, wrong = [], [], []
  for usual, asked, found, allowed in (
    ("image", image, images, [n for n in features if n in images or features[n] in binary]),
    ("label", label, labels, [*labels, *usable]),
  ):
    if asked and asked not in features:
      raise DataError(
        f"{path} has no column {asked}, only {', '.join(features)}; set config.data.{usual}_column."
      )
    if asked and asked not in allowed:
      raise DataError(
        f"{path}: the column {asked} cannot hold {usual}s, it is {_type(features[asked])}."
      )
    name = asked or (usual if usual in found else "".join(found) if len(found) == 1 else "")
    if not name:
      wrong.append(_missing(usual, found, features))
    elif len(found) > 1 and not asked:
      others = " and ".join(n for n in found if n != name)
      notes.append(f"the {usual}s are the column {name}, not {others}")
    chosen.append(name)
  if wrong:
    raise DataError(
      f"{path} must have one column of images, and one of integer labels or one named `label`; "
      f"it has {', '.join(features)}: {' and '.join(wrong)}."
    )
  return Columns(chosen[0], chosen[1], tuple(notes))


def class_names(
  path: str,
  column: str,
  files: Sequence[tuple[str, Any]],
  features: "datasets.Features | None",
  values: Iterable[Any],
  num_classes: int | None,
) -> tuple[str, ...]:
  """Return the names of the classes of a data set, in the order of their labels.

  Args:
    path: what the user gave, for messages.
    column: of the labels.
    files: name and footer of each file of the split that has all classes.
    features: those that the data set declares, if it does.
    values: of the column in these files, read only if it holds strings.
    num_classes: number of classes where the labels are integers without names.

  Raises:
    DataError: there are none, or they are not known.
  """
  feature = (features or features_of(files[0][1]))[column]
  names = getattr(feature, "names", None)
  if names:
    return tuple(names)
  if _is_value(feature, "string"):
    words = {value for value in values if value is not None}
    if not words:
      raise DataError(f"{path}: all labels of the column {column} are null.")
    return tuple(layout.in_order(words))
  if _is_value(feature, "bool"):
    return ("False", "True")
  if num_classes is None:
    ranges = [found for _, footer in files if (found := label_range(footer, column))]
    seen = ""
    if ranges:
      low, high = min(r[0] for r in ranges), max(r[1] for r in ranges)
      seen = f", though the labels are {low} to {high}"
    raise DataError(
      f"{path}: the column {column!r} has no names of classes, so their number is unknown{seen}; "
      "give config.model.num_classes, or --classes of prepare."
    )
  return tuple(map(str, range(num_classes)))


def table(url: str, column: str, footer: Any, names: tuple[str, ...], declared: Any) -> Table:
  """Return how the labels of a file are to be numbered.

  Args:
    url: the file, for messages.
    column: of the labels.
    footer: of the file.
    names: of the classes of the data set, by label.
    declared: the feature that the data set declares for the column, or None.

  Raises:
    DataError: the file has a class that is unknown, or does not name its classes.
  """
  feature = features_of(footer).get(column)
  if feature is None:
    raise DataError(f"{url} has no column {column}, as other files of the data set have.")
  if _is_value(feature, "string"):
    return {name: label for label, name in enumerate(names)}
  own = getattr(feature, "names", None)
  if own is None or tuple(own) == names:
    numbered = names == tuple(map(str, range(len(names))))
    if own is None and declared is None and _is_value(feature, "int") and not numbered:
      raise DataError(
        f"{url} does not name the classes of its column {column}, as other files of the data set "
        "do; write it again with them."
      )
    return None
  by_name = {name: label for label, name in enumerate(names)}
  if len(by_name) != len(names):
    raise DataError(f"{url} numbers its classes otherwise than other files, and two have one name.")
  if unknown := [name for name in own if name not in by_name]:
    raise DataError(
      f"{url} has the class {one_line(unknown[0])}, which other files of the data set lack."
    )
  return {label: by_name[name] for label, name in enumerate(own)}


def is_named(feature: Any) -> bool:
  """Whether a feature has the names of all classes."""
  return bool(getattr(feature, "names", None))


def is_renumbering(translation: Mapping[Any, int]) -> bool:
  """Whether a table maps numbers to others, and not names to numbers."""
  return any(isinstance(label, int) for label in translation)


def has_integers(footer: Any, column: str) -> bool:
  """Whether a column of a file is of integers, by its footer."""
  import pyarrow

  return bool(pyarrow.types.is_integer(footer.schema.to_arrow_schema().field(column).type))


def label_range(footer: Any, column: str) -> tuple[int, int, int] | None:
  """Return the least and the largest label of a file and the number of nulls, by its statistics."""
  low, high, nulls = [], [], 0
  for group in range(footer.num_row_groups):
    row_group = footer.row_group(group)
    for i in range(row_group.num_columns):
      chunk = row_group.column(i)
      if chunk.path_in_schema != column:
        continue
      statistics = chunk.statistics
      if statistics is None or not statistics.has_null_count:
        return None
      nulls += statistics.null_count
      if statistics.null_count < row_group.num_rows:
        if not statistics.has_min_max:
          return None
        low.append(statistics.min)
        high.append(statistics.max)
  return (min(low), max(high), nulls) if low else None


def only_paths(footer: Any, column: str) -> bool:
  """Whether no row of a file holds the bytes of its image, by its statistics."""
  rows = nulls = 0
  for group in range(footer.num_row_groups):
    row_group = footer.row_group(group)
    for i in range(row_group.num_columns):
      chunk = row_group.column(i)
      if chunk.path_in_schema == f"{column}.bytes" and chunk.statistics is not None:
        rows += row_group.num_rows
        nulls += chunk.statistics.null_count or 0
  return rows > 0 and nulls == rows


def check_range(
  url: str, found: tuple[int, int, int], translation: Table, num_classes: int
) -> None:
  """Refuse labels that no class has.

  Args:
    url: the file, for messages.
    found: least label, largest label, number of nulls.
    translation: of these labels.
    num_classes: labels must be below it.

  Raises:
    UnlabelledError: all are -1.
    DataError: some are out of range or null.
  """
  low, high, nulls = found
  if low == high == -1:
    raise UnlabelledError(
      f"{url}: all labels are -1, which stands for none; choose a split with labels."
    )
  if nulls:
    raise DataError(
      f"{url}: the label of {nulls:,} rows is null; leave these rows out of the file."
    )
  limit = len(translation) if translation is not None else num_classes
  for label in (low, high):
    if not 0 <= label < limit:
      hint = "choose a split with labels"
      if label >= 0:
        hint = "give config.model.num_classes (--classes of prepare)"
        if low == 1 and high == limit:
          hint = "they must be counted from 0, so subtract 1 from each"
      raise DataError(f"{url}: a label is {label}, but there are {limit} classes; {hint}.")


def _missing(what: str, found: Sequence[str], features: "datasets.Features") -> str:
  if found:
    return f"choose {' or '.join(found)} with config.data.{what}_column"
  unfit = features.get(what)
  if unfit is None:
    return f"none of them can hold {what}s"
  return f"{what} is {_type(unfit)}, which cannot be {what}s"


def _is_value(feature: Any, *words: str) -> bool:
  import datasets

  return isinstance(feature, datasets.Value) and any(word in feature.dtype for word in words)


def _type(feature: Any) -> str:
  import datasets

  if isinstance(feature, datasets.Value):
    return feature.dtype
  if isinstance(feature, datasets.List | datasets.LargeList | list):
    return "a list, several to an image"
  return type(feature).__name__
