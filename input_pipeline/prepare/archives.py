"""Inputs of `prepare`: the images of a tar or a folder, read in place."""

from collections.abc import Callable, Iterator, Mapping, Sequence
import dataclasses
import hashlib
import os
from typing import Any, NamedTuple, Protocol

import numpy as np

from input_pipeline.errors import DataError
from input_pipeline.prepare import tars
from input_pipeline.records import Record
from input_pipeline.remote import has_scheme
from input_pipeline.sources import layout, local, splits


class Member(NamedTuple):
  """One image file: `size` bytes at `offset` of the file `path`, or `data` without a file.

  The name is unique within a split: that of the file where possible, else CLASS/FILE.
  """

  path: str
  offset: int
  size: int
  label: int
  name: str
  data: bytes = b""

  def read(self) -> bytes:
    """Return the bytes of the image file; raise DataError if it cannot be read or has shrunk."""
    if not self.path:
      return self.data
    try:
      with open(self.path, "rb", buffering=0) as f:
        data = os.pread(f.fileno(), self.size, self.offset)
    except OSError as e:
      raise DataError(f"{self.path} cannot be read: {e.strerror}.") from e
    if len(data) != self.size:
      raise DataError(
        f"{self.path} changed while it was read ({self.name} is shorter now); start again."
      )
    return data


class Images(Protocol):
  """Images of a shard, in order. Can be pickled."""

  def __len__(self) -> int:
    """Return the number of images."""

  def __iter__(self) -> Iterator[Record]:
    """Read one after the other; raise DataError if one cannot be read."""


@dataclasses.dataclass(frozen=True)
class Members:
  """Image files that were listed."""

  members: Sequence[Member]

  def __len__(self) -> int:
    return len(self.members)

  def __iter__(self) -> Iterator[Record]:
    for member in self.members:
      yield Record(member.read(), member.label, member.name)


class Inputs(NamedTuple):
  """All images by split, in a fixed order.

  Attributes:
    origin: what they were made of, for the manifest.
    classes: names, by label.
    splits: the images of train, val and test, as far as there are any.
    left_out: all other files, by reason; see `layout.REASONS`.
    notes: what a user should know, a line each.
  """

  origin: dict[str, Any]
  classes: list[str]
  splits: dict[str, list[Member]]
  left_out: Mapping[str, Sequence[str]]
  notes: Sequence[str] = ()

  def count(self, split: str) -> int:
    """Return the number of images of a split."""
    return len(self.splits[split])

  def size(self, split: str) -> int:
    """Return the bytes of all images of a split."""
    return sum(member.size for member in self.splits[split])

  def most_shards(self, split: str) -> tuple[int, str]:
    """Return the largest number of shards of a split, and the unit that limits it."""
    return self.count(split), "images"

  def deal(self, split: str, shards: int, seed: int) -> list[Images]:
    """Shuffle the images of a split by the seed; return those of each shard."""
    members = self.splits[split]
    order = np.random.default_rng([seed, split == "train"]).permutation(len(members))
    return [Members([members[i] for i in part]) for part in np.array_split(order, shards)]

  def fingerprint(self) -> str:
    """Return a hash that changes if an image is added, renamed, relabelled or resized."""
    digest = hashlib.sha256()
    for split, members in self.splits.items():
      for m in members:
        digest.update(
          f"{split}/{self.classes[m.label]}/{m.name}/{m.size}\n".encode("utf-8", "surrogateescape")
        )
    return digest.hexdigest()


class HeldOut(NamedTuple):
  """What is held out of train as val, where there is none; see `layout.hold_out`."""

  fraction: float = 0.0
  seed: int = 0

  def of(self, contents: layout.Contents, asked: Mapping[str, str]) -> layout.Contents:
    """Hold it out, and say where that does nothing because there is a val, or none is made.

    Args:
      contents: of a folder or tar.
      asked: see `splits.choose`.
    """
    held, named = contents, asked.get("val")
    if named is None or (named and named not in contents.splits):
      held = layout.hold_out(contents, *self)
    if self.fraction and held is contents:
      note = "nothing is held out, as --val-fraction asks: there is a val of its own, or no train"
      return held._replace(notes=[*held.notes, note])
    return held


_NOTHING = HeldOut()


def from_folder(
  folder: str,
  asked: Mapping[str, str],
  allow: Sequence[str] = (),
  held_out: HeldOut = _NOTHING,
) -> Inputs:
  """List the images of a folder; `sources/layout.py` decides what is a split and a class.

  Args:
    folder: local.
    asked: see `splits.choose`.
    allow: faults that are allowed.
    held_out: what is held out as val.

  Raises:
    DataError: it is no folder, or what belongs where in it is not clear.
  """
  if not os.path.isdir(folder):
    what = "is not a folder"
    if os.path.isfile(folder):
      what += ": give a tar as --tar, and unpack other archives"
    elif has_scheme(folder):
      what += ": give parquet as --from, and copy images to a disk first"
    raise DataError(f"--folder {folder} {what}.")

  def member(split: str, image: layout.Image, label: int) -> Member:
    del split
    path = os.path.join(folder, image.entry.path)
    try:
      return Member(path, 0, os.path.getsize(path), label, image.name)
    except OSError as e:
      raise DataError(f"{path} cannot be read: {e.strerror}.") from e

  contents = layout.arrange(local.walk(folder), folder, allow)
  contents = held_out.of(contents, asked)
  chosen, left = splits.choose(list(contents.splits), asked, folder)
  origin = {"kind": "folder", "name": os.path.basename(os.path.abspath(folder))}
  return inputs_of(contents, chosen, left, member, origin, allow)


def from_tar(
  path: str,
  asked: Mapping[str, str],
  allow: Sequence[str] = (),
  held_out: HeldOut = _NOTHING,
) -> Inputs:
  """List the images of an uncompressed tar, which is laid out like a folder.

  Args:
    path: local.
    asked: see `splits.choose`.
    allow: faults that are allowed.
    held_out: what is held out as val.

  Raises:
    DataError: it is compressed, damaged, or what belongs where in it is not clear.
  """

  def member(split: str, image: layout.Image, label: int) -> Member:
    del split
    return Member(path, image.entry.offset, image.entry.size, label, image.name)

  contents = layout.arrange(tars.list_tar(path, allow=allow), path, allow)
  contents = held_out.of(contents, asked)
  chosen, left = splits.choose(list(contents.splits), asked, path)
  origin = {"kind": "tar", "name": os.path.basename(path)}
  return inputs_of(contents, chosen, left, member, origin, allow)


def inputs_of(
  contents: layout.Contents,
  chosen: Mapping[str, str],
  left: Sequence[str],
  member: Callable[[str, layout.Image, int], Member],
  origin: dict[str, Any],
  allow: Sequence[str],
) -> Inputs:
  """Number the classes of the chosen splits, and list the images of each.

  Args:
    contents: of a folder or of archives.
    chosen: names there of the splits to make.
    left: names there of the splits that are not made.
    member: returns an image of a split with its label.
    origin: see Inputs.
    allow: faults that are allowed.

  Raises:
    DataError: the splits do not have the same classes.
  """
  classes = layout.number(contents, list(chosen.values()), allow)
  labels = {name: label for label, name in enumerate(classes)}
  made = {}
  for split, name in chosen.items():
    members = [
      member(split, image, labels[each])
      for each, images in contents.splits[name].items()
      for image in images
    ]
    # The order in a tar or folder is arbitrary, and the shards must not depend on it.
    made[split] = sorted(members, key=lambda m: (m.label, m.name, m.offset))
  left_out = {reason: sorted(paths) for reason, paths in sorted(contents.left_out.items())}
  unmade = [
    image.entry.path
    for name in left
    for images in contents.splits[name].values()
    for image in images
  ]
  if unmade:
    left_out["split"] = sorted(unmade)
  renamed = [f"the split {name} becomes {split}" for split, name in chosen.items() if name != split]
  return Inputs(origin, classes, made, left_out, [*renamed, *contents.notes])


def from_digits(seed: int) -> Inputs:
  """Make images of scikit-learn's 1,797 handwritten digits: 1,437 for train, 360 for val.

  They are upscaled from 8x8 to 32x32 and encoded as RGB JPEG of quality 95.

  Args:
    seed: of the stratified split.

  Raises:
    DataError: scikit-learn is not installed.
  """
  try:
    from sklearn import datasets, model_selection  # an extra, used only here
  except ImportError as e:
    raise DataError("--digits needs scikit-learn: pip install resnet-pod[smoke].") from e
  import cv2
  import simplejpeg

  digits = datasets.load_digits()
  chosen, _ = model_selection.train_test_split(
    np.arange(len(digits.target)), test_size=360, stratify=digits.target, random_state=seed % 2**32
  )
  train = set(chosen.tolist())
  classes = [str(digit) for digit in range(10)]
  made: dict[str, list[Member]] = {"train": [], "val": []}
  for i, (pixels, label) in enumerate(zip(digits.images, digits.target)):
    grey = cv2.resize(
      (pixels * (255 / 16)).astype(np.uint8), (32, 32), interpolation=cv2.INTER_CUBIC
    )
    data = simplejpeg.encode_jpeg(
      np.repeat(grey[:, :, None], 3, axis=2), quality=95, colorsubsampling="444"
    )
    name = f"digit_{i:04d}_{label}.jpeg"
    made["train" if i in train else "val"].append(Member("", 0, len(data), int(label), name, data))
  for members in made.values():
    members.sort(key=lambda m: (m.label, m.name))
  return Inputs({"kind": "digits", "name": "scikit-learn load_digits"}, classes, made, {})
