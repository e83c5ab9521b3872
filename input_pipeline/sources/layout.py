"""What the files of a folder or the members of a tar are: splits, classes, images, and the rest.

    [ANY/]SPLIT/CLASS/[FOLDER/]IMAGE    or    [ANY/]CLASS/[FOLDER/]IMAGE, which is the split train

All ways in (`prepare`, training from a folder, `inspect`) get their answer from `arrange`, so they
agree. Every entry ends as an image of a class, or in `left_out` under a reason.
"""

import collections
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
import hashlib
import itertools
import os
from typing import TYPE_CHECKING, NamedTuple, NoReturn
import unicodedata

from input_pipeline.errors import DataError, one_line
from input_pipeline.sources import mistaken, splits

if TYPE_CHECKING:
  from input_pipeline.sources.base import Source

# By the ending, as a folder of millions of files cannot be opened file by file.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp")
_OTHER_IMAGES = (
  *(".tif", ".tiff", ".heic", ".heif", ".avif", ".jp2", ".jxl", ".svg", ".ico", ".psd"),
  *(".ppm", ".pgm", ".pbm", ".dng", ".cr2", ".nef", ".npy"),
)
_LAYOUT = "{train,val}/CLASS/IMAGE or CLASS/IMAGE"
_ENDINGS = "|".join(IMAGE_SUFFIXES)

# Of folders that systems and tools leave behind; names that begin with a dot are left out as well.
_SYSTEM = {
  *("__macosx", "@eadir", "lost+found", "$recycle.bin", "system volume information"),
  *("thumbs.db", "desktop.ini"),
}

# What an entry may be.
FILE, FOLDER = "file", "folder"
# Why an entry is left out: in words, as the subject of "left out 3 ...".
REASONS = {
  "system": "hidden files, or files and folders of a system",
  "no_image": "files that are not CLASS/*.jpg, .jpeg or the like",
  "format": "images of a format that is not decoded, as TIFF and HEIC; convert them to PNG or JPEG",
  "outside": "images that lie in no folder of a class",
  "dangling": "links to nothing",
  "loop": "links to a folder around them",
  "special": "files that are no regular files, as devices and sparse members of a tar",
  "replaced": "members of a tar that a later one of the same name replaces",
  "no_parquet": "files that are not parquet",
  "split": "images of splits that are not made",
}
# Faults that a user may allow, by `--allow` of prepare or `config.data.allow`.
EMPTY_CLASS, DEEPER, ONE_CLASS = "empty_class", "deeper", "one_class"
TEXT = "text"  # of config.data.class_order
UNUSED = "not used: the split "  # a note


class Entry(NamedTuple):
  """A file or folder of a listing.

  Attributes:
    path: relative, with slashes.
    kind: FILE, FOLDER, or a key of REASONS for what cannot be used.
    offset: where the file begins in a tar.
    size: in bytes, of a member of a tar.
  """

  path: str
  kind: str = FILE
  offset: int = 0
  size: int = 0


class Image(NamedTuple):
  """An image of a class: its entry, and its path from the folder of the class on."""

  entry: Entry
  name: str


# The images of a split by class; a folder of a class may have none.
Classes = dict[str, list[Image]]
# The names of the folders around a file.
_Path = tuple[str, ...]
_Images = Mapping[_Path, Sequence[Entry]]


class Contents(NamedTuple):
  """What was found.

  Attributes:
    where: name of the folder or tar, for messages.
    splits: by the names that they have there.
    folders: path of each split, "" or with a slash at its end.
    left_out: paths by reason, a key of REASONS.
    notes: what a user should know, a line each.
  """

  where: str
  splits: dict[str, Classes]
  folders: dict[str, str]
  left_out: dict[str, list[str]]
  notes: list[str]


class _Split(NamedTuple):
  """A split: its folder, and for each class the folders that hold its images."""

  folder: _Path
  classes: dict[str, list[_Path]]


def arrange(entries: Iterable[Entry], where: str, allow: Sequence[str] = ()) -> Contents:
  """Find the splits and classes of a listing.

  Args:
    entries: in any order.
    where: name of the folder or tar, for messages.
    allow: faults that are allowed.

  Raises:
    DataError: there is no image, or where it belongs is not clear.
  """
  images, folders, left_out = _sort_out(entries)
  if label := mistaken.webdataset(_paths(images), left_out):
    raise DataError(
      f"{where} is a WebDataset ({one_line(label)} holds the label of an image), which is not "
      "read; write its images into folders of classes, or convert it to parquet."
    )
  if any(_split_at(folder) is not None for folder in images) or not images:
    found = _by_split(images, folders, where)
  else:
    found = {"train": _by_class(images, folders, where, allow)}
  if not any(split.classes for split in found.values()):
    what = (
      mistaken.remedy(_paths(images), left_out)
      or f"no CLASS/*{_ENDINGS} is there{_said(left_out, '')}"
    )
    raise DataError(f"{where} is not laid out as {_LAYOUT}: {what}.")
  contents = Contents(where, {}, {}, left_out, [])
  placed = set()
  for name, split in sorted(found.items()):
    contents.folders[name] = _slashed(split.folder)
    contents.splits[name] = classes = {}
    for each, inside in sorted(split.classes.items()):
      placed |= set(inside)
      _check_depth(where, each, inside, images, len(split.folder), allow, contents.notes)
      if _nfc(each) in classes:
        raise DataError(
          f"{where}: {name} has two folders {_nfc(each)}, in two Unicode forms; put their images "
          "into one."
        )
      classes[_nfc(each)] = [
        Image(entry, _slashed(folder[len(split.folder) :]) + _name(entry))
        for folder in sorted(inside)
        for entry in sorted(images[folder], key=_name)
      ]
  for folder in sorted(images.keys() - placed):
    left_out.setdefault("outside", []).extend(_slashed(folder) + _name(e) for e in images[folder])
  return contents


def number(
  contents: Contents, names: Sequence[str], allow: Sequence[str] = (), by_text: bool = False
) -> list[str]:
  """Return the classes of some splits in the order of their labels, which is that of all of them.

  Args:
    contents: of a folder or tar.
    names: of splits; the first has all classes.
    allow: faults that are allowed.
    by_text: whether names that are numbers are sorted as text.

  Raises:
    DataError: a split has no image, a class that the first lacks, or lacks one of its classes.
  """
  where = contents.where
  for name in names:
    folder = contents.folders[name]
    if not any(contents.splits[name].values()):
      raise DataError(
        f"{os.path.join(where, folder).rstrip('/')} holds no CLASS/*{_ENDINGS}"
        f"{_said(contents.left_out, folder)}."
      )
  first = names[0]
  known = contents.splits[first].keys()
  for other in names[1:]:
    theirs = contents.splits[other].keys()
    if unknown := sorted(theirs - known):
      hint = mistaken.tiny_imagenet(contents.folders[other], contents.left_out)
      alike = [name for name in known if name.strip().lower() == unknown[0].strip().lower()]
      hint = hint or (f" ({first} has {alike[0]!r})" if alike else "")
      raise DataError(
        f"{where}: {other} has the class {unknown[0]}, which {first} lacks"
        f"{hint}; the images of {other} must lie in folders of the same "
        "classes."
      )
    if EMPTY_CLASS not in allow and (missing := sorted(known - theirs)):
      raise DataError(
        f"{where}: {first} and {other} must have the same class folders, but {missing[0]!r} is in "
        f"only one of them; {_how_to_allow(EMPTY_CLASS)}."
      )
  for name in names:
    for each, images in contents.splits[name].items():
      if not images and EMPTY_CLASS not in allow:
        raise DataError(
          f"{where}: the class {each} of {name} has no image"
          f"{_said(contents.left_out, f'{contents.folders[name]}{each}/')}; add some, remove the "
          f"folder, or {_how_to_allow(EMPTY_CLASS)}."
        )
  return in_order(known, by_text)


def hold_out(contents: Contents, fraction: float, seed: int) -> Contents:
  """Move a share of the images of each class from train to val, where there is no val.

  Which ones is a function of the seed and of the names of class and image alone, so an image stays
  where it is when others are added, but for those next to the limit.

  Args:
    contents: of a folder or tar.
    fraction: of each class, rounded, but at least one image of it and not all; 0 moves nothing.
    seed: of the choice.

  Raises:
    DataError: a class has one image.
  """
  by_meaning = {splits.canonical(name): name for name in contents.splits}
  if not fraction or "val" in by_meaning or "train" not in by_meaning:
    return contents
  name = by_meaning["train"]
  train: Classes = {}
  val: Classes = {}
  for each, images in contents.splits[name].items():
    if len(images) == 1:
      raise DataError(
        f"{contents.where}: the class {each} has one image, of which none can be held out for val; "
        "add some, or remove the folder."
      )
    order = sorted(images, key=lambda image: _draw(seed, each, image.name))
    count = min(max(1, round(fraction * len(images))), len(images) - 1) if images else 0
    held = {image.entry for image in order[:count]}
    val[each] = [image for image in images if image.entry in held]
    train[each] = [image for image in images if image.entry not in held]
  counts = [sum(map(len, classes.values())) for classes in (train, val)]
  note = f"{counts[1]:,} of {sum(counts):,} images are held out of {name} as val"
  return contents._replace(
    splits={**contents.splits, name: train, "val": val},
    folders={**contents.folders, "val": contents.folders[name]},
    notes=[*contents.notes, note],
  )


def _draw(seed: int, each: str, image: str) -> bytes:
  text = f"{seed}/{each}/{_nfc(image)}".encode("utf-8", "surrogateescape")
  return hashlib.sha256(text).digest()


def check_classes(where: str, names: Sequence[str], left_out: Mapping[str, Sequence[str]]) -> None:
  """Raise DataError if there is one class, which every net would always be right about."""
  if len(names) == 1:
    raise DataError(
      f"{where} has one class, {names[0]}, of which there is nothing to learn; "
      f"{_how_to_allow(ONE_CLASS)}{mistaken.table(left_out)}."
    )


def in_order(names: Iterable[str], by_text: bool = False) -> list[str]:
  """Return the names of classes as they are numbered: sorted, as numbers if all are numbers."""
  names = list(names)
  if not by_text and all(name.isascii() and name.isdigit() for name in names):
    return sorted(names, key=lambda name: (int(name), name))
  return sorted(names)


def words(allow: str) -> tuple[str, ...]:
  """Return the faults that `config.data.allow` or `--allow` names."""
  return tuple(word.strip() for word in allow.split(",") if word.strip())


def is_image(name: str) -> bool:
  """Whether a file is an image by the ending of its name."""
  return _ending(name) in IMAGE_SUFFIXES


def is_system(name: str) -> bool:
  """Whether a file or folder is hidden, or one that systems leave behind."""
  return name.startswith(".") or name.lower() in _SYSTEM


def summary(opened: Collection["Source"]) -> list[str]:
  """Return what there is to know about sources: notes, and what was left out, a line each."""
  notes = collections.Counter(note for source in opened for note in source.notes)
  left_out: dict[str, Sequence[str]] = {}
  for source in opened:
    left_out |= source.left_out
  # What is not used by all of them is used by one.
  lines = [n for n, count in notes.items() if not n.startswith(UNUSED) or count == len(opened)]
  return [*map(one_line, lines), *in_words(left_out)]


def reason_of(name: str, kind: str) -> str:
  """Return why a file or folder of this name is left out, a key of REASONS; "" if it is not."""
  if is_system(name):
    return "system"
  if kind not in (FILE, FOLDER):
    return kind
  if kind == FOLDER or is_image(name):
    return ""
  return "format" if _ending(name) in _OTHER_IMAGES else "no_image"


def in_words(left_out: Mapping[str, Sequence[str]]) -> list[str]:
  """Return a line for each reason: how many, why, and an example."""
  return [
    f"left out {len(paths):,} {REASONS[reason]}: {one_line(min(paths))}" + " ..." * (len(paths) > 1)
    for reason, paths in sorted(left_out.items())
  ]


def _sort_out(
  entries: Iterable[Entry],
) -> tuple[dict[_Path, list[Entry]], set[_Path], dict[str, list[str]]]:
  """Return the images by folder, the folders, and what is neither, by reason."""
  images: dict[_Path, list[Entry]] = {}
  folders: set[_Path] = set()
  left_out: dict[str, list[str]] = {}
  known: dict[str, tuple[_Path, bool]] = {}
  for entry in entries:
    around, _, name = entry.path.rstrip("/").rpartition("/")
    if around not in known:  # once for each folder, not for each of a million files
      folder = tuple(part for part in around.split("/") if part not in ("", "."))
      known[around] = folder, any(map(is_system, folder))
    folder, system = known[around]
    if name in ("", "."):  # the top of a tar
      continue
    reason = "system" if system else reason_of(name, entry.kind)
    if not reason:
      if entry.kind == FOLDER:
        folders.add((*folder, name))
      else:
        images.setdefault(folder, []).append(entry)
      continue
    left_out.setdefault(reason, []).append(_slashed(folder) + name)
    if reason != "system":  # a class that has lost its images is still a class
      folders.update(folder[:depth] for depth in range(1, len(folder) + 1))
  return images, folders, left_out


def _split_at(folder: _Path) -> int | None:
  """Return which part of the path of an image is its split; the last that has a class below it."""
  found = [i for i, part in enumerate(folder) if splits.is_split(part)]
  return max((i for i in found if i < len(folder) - 1), default=max(found, default=None))


def _by_split(images: _Images, folders: set[_Path], where: str) -> dict[str, _Split]:
  """Group the folders of SPLIT/CLASS/IMAGE; others beside those of splits are splits too."""
  inside = {folder: at for folder in images if (at := _split_at(folder)) is not None}
  of_splits = {folder[: at + 1] for folder, at in inside.items()}
  roots = {folder[:-1] for folder in of_splits}
  around = {folder[:depth] for folder in of_splits for depth in range(len(folder))}
  folders = folders - around  # what holds a split is neither a split nor a class
  of_splits |= {
    folder
    for folder in folders
    if splits.is_split(folder[-1]) and (folder[:-1] in roots or not images)
  }
  found: dict[str, _Split] = {}
  meaning: dict[str, _Path] = {}
  for folder in sorted(of_splits):
    twin = meaning.setdefault(splits.canonical(folder[-1]), folder)
    if twin != folder and twin in images and folder in images:
      raise DataError(
        f"{where} has the splits inside the classes, {'/'.join(twin)} and {'/'.join(folder)}; they "
        f"must lie around them: move {'/'.join(twin)} to "
        f"{'/'.join((*twin[:-2], *twin[:-3:-1]))}, and so on."
      )
    if twin != folder:
      raise DataError(
        f"{where} has two folders for the split {splits.canonical(folder[-1])}, {'/'.join(twin)} "
        f"and {'/'.join(folder)}; rename or move one of them."
      )
    found[folder[-1]] = _Split(folder, {})
  root = min(roots, key=len, default=())
  for folder in images:
    at = inside.get(folder)
    if at is None:
      beside = folder[len(root) :] if folder[: len(root)] == root else ()
      if not beside:  # above the splits
        continue
      if len(beside) == 1 or len(roots) > 1:
        _refuse_mixture(where, images, folder, next(iter(inside)))
      at = len(root)
      found.setdefault(folder[at], _Split(folder[: at + 1], {}))
    if len(folder) > at + 1:
      found[folder[at]].classes.setdefault(folder[at + 1], []).append(folder)
  for split in found.values():
    for folder in folders - of_splits:
      if folder[:-1] == split.folder:
        split.classes.setdefault(folder[-1], [])
  return found


def _by_class(images: _Images, folders: set[_Path], where: str, allow: Sequence[str]) -> _Split:
  """Group the folders of [ANY/]CLASS/[FOLDER/]IMAGE."""
  around = sorted(folder for folder in images if folder)
  root = _common(around[0], around[-1]) if around else ()
  if root and root in images:
    if len(around) > 1 and DEEPER not in allow:
      _refuse_mixture(where, images, *sorted(around, key=len)[:2])
    root = root[:-1]
  deeper = {folder[len(root) + 1 :]: folder for folder in around}
  if () not in deeper and len(deeper) > 1 and DEEPER not in allow:
    one, other = (deeper[key] for key in sorted(deeper)[:2])
    raise DataError(
      f"{where} is not laid out as {_LAYOUT} throughout: {one[len(root)]} may be a class or a "
      f"split, and so may {'/'.join(one)} and {'/'.join(other)}; name the splits train and val, or "
      "move the images of each class into one folder."
    )
  classes: dict[str, list[_Path]] = {
    folder[-1]: [] for folder in folders if folder[:-1] == root and around
  }
  for folder in around:
    classes.setdefault(folder[len(root)], []).append(folder)
  return _Split(root, classes)


def _common(one: _Path, other: _Path) -> _Path:
  """Return the folders that two paths begin with, and with them all that are sorted between."""
  pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other))
  return tuple(part for part, _ in pairs)


def _refuse_mixture(where: str, images: _Images, one: _Path, other: _Path) -> NoReturn:
  shown = [_slashed(folder) + _name(images[folder][0]) for folder in (one, other)]
  question = ""
  if splits.is_split(other[-1]):
    question = f"; if {other[-1]} is a class, put all classes into a folder train"
  raise DataError(
    f"{where} is not laid out as {_LAYOUT} throughout: compare {shown[0]} with {shown[1]}"
    f"{question}."
  )


def _paths(images: _Images) -> Iterator[str]:
  return (entry.path for entries in images.values() for entry in entries)


def _check_depth(
  where: str,
  name: str,
  inside: Sequence[_Path],
  images: _Images,
  above: int,
  allow: Sequence[str],
  notes: list[str],
) -> None:
  """Refuse a class with images in several folders, of which some may be classes themselves."""
  if len(inside) > 1 and DEEPER not in allow:
    one, other = (_slashed(folder) + _name(images[folder][0]) for folder in sorted(inside)[:2])
    raise DataError(
      f"{where} is not laid out as {_LAYOUT} throughout: compare {one} with {other}; if both are "
      f"of the class {name}, {_how_to_allow(DEEPER)}."
    )
  if inside and len(inside[0]) > above + 1:
    notes.append(f"the images of the class {name} lie in {'/'.join(inside[0])}")


def _said(left_out: Mapping[str, Sequence[str]], folder: str) -> str:
  """Return in words what was left out of a folder."""
  said = []
  for reason, paths in sorted(left_out.items()):
    here = [path for path in paths if _nfc(path).startswith(_nfc(folder))]
    if here:
      said.append(f"{len(here):,} {REASONS[reason].partition(';')[0]}, as {one_line(here[0])}")
  return f" (left out: {'; '.join(said)})" if said else ""


def _how_to_allow(fault: str) -> str:
  return f"allow it with --config.data.allow={fault} (--allow={fault} of prepare)"


def _name(entry: Entry) -> str:
  return entry.path.rpartition("/")[2]


def _ending(name: str) -> str:
  return os.path.splitext(name)[1].lower()


def _slashed(folder: _Path) -> str:
  return "".join(f"{part}/" for part in folder)


def _nfc(name: str) -> str:
  """Return a name in the Unicode form in which names are compared; a Mac writes another."""
  return unicodedata.normalize("NFC", name)
