"""Inputs of `prepare`: the images of a tar, a folder or ImageNet's archives, read in place."""

import collections
from collections.abc import Callable, Iterable, Iterator, Sequence
import dataclasses
import hashlib
import io
import os
import tarfile
from typing import Any, NamedTuple, Protocol

import numpy as np

from input_pipeline.errors import DataError
from input_pipeline.records import Record
from input_pipeline.sources import local

_SPLITS = {"train": "train", "val": "val", "validation": "val"}
_BLOCK = 512  # bytes, of a tar
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}


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
    splits: the images of train and val.
    ignored: number of files that are no images of a class.
  """

  origin: dict[str, Any]
  classes: list[str]
  splits: dict[str, list[Member]]
  ignored: int

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


# Runs the tasks of a scan: `map`, or the one of a pool.
Map = Callable[..., Iterable[Any]]


def from_folder(folder: str) -> Inputs:
  """List FOLDER/{train,val}/CLASS/IMAGE or FOLDER/CLASS/IMAGE, which becomes the split train.

  Raises:
    DataError: it is not such a folder.
  """
  if not os.path.isdir(folder):
    raise DataError(f"--folder {folder} is not a folder.")
  present = [name for name in local.list_classes(folder) if name in _SPLITS]
  roots = [(_SPLITS[name], os.path.join(folder, name)) for name in present] or [("train", folder)]
  found, ignored = [], 0
  for split, root in roots:
    for name in local.list_classes(root):
      images = local.list_images(os.path.join(root, name))
      ignored += len(os.listdir(os.path.join(root, name))) - len(images)
      for image in images:
        path = os.path.join(root, name, image)
        found.append((split, name, Member(path, 0, os.path.getsize(path), 0, f"{name}/{image}")))
  return _label(
    found, {"kind": "folder", "name": os.path.basename(os.path.abspath(folder))}, ignored, folder
  )


def from_tar(path: str) -> Inputs:
  """List the images of an uncompressed tar of [ANY/]{train,val}/CLASS/IMAGE or [ANY/]CLASS/IMAGE.

  Raises:
    DataError: it is compressed, damaged, or has another layout.
  """
  found: list[tuple[str | None, str, Member]] = []
  ignored, depths = 0, dict[int, str]()
  for name, offset, size in scan_tar(path):
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if len(parts) < 2 or not _is_image(parts[-1]):
      ignored += 1
      continue
    depths.setdefault(len(parts), name)
    split = _SPLITS.get(parts[-3]) if len(parts) > 2 else None
    found.append((split, parts[-2], Member(path, offset, size, 0, "/".join(parts[-2:]))))
  splits = {split for split, _, _ in found}
  if len(depths) > 1 or (None in splits and len(splits) > 1):
    raise DataError(
      f"{path} is not laid out as {{train,val}}/CLASS/IMAGE or CLASS/IMAGE throughout: compare "
      f"{' with '.join(sorted(depths.values())) or 'its folders'}."
    )
  labelled = ((split or "train", name, member) for split, name, member in found)
  return _label(labelled, {"kind": "tar", "name": os.path.basename(path)}, ignored, path)


def from_imagenet(
  train: str | None, val: str | None, devkit: str | None, val_labels: str | None, run: Map = map
) -> Inputs:
  """List the images of the official archives of ILSVRC2012.

  Args:
    train: ILSVRC2012_img_train.tar, a tar of one tar per class, or None.
    val: ILSVRC2012_img_val.tar, a flat tar, or None.
    devkit: ILSVRC2012_devkit_t12.tar.gz, with the classes of `val`; or
    val_labels: a text file with the synset of each image of `val`, one per line, in the order of
      their names.
    run: runs the scans of the tars inside `train`.

  Raises:
    DataError: an archive is damaged, or the labels do not match it.
  """
  found, ignored = [], 0
  if train:
    inner = []
    for name, offset, size in scan_tar(train):
      if name.endswith(".tar"):
        inner.append((os.path.basename(name)[: -len(".tar")], offset, size))
      else:
        ignored += 1
    if not inner:
      raise DataError(
        f"--imagenet-train {train} holds no tars of classes; is it ILSVRC2012_img_train.tar?"
      )
    scans = run(
      _scan_inner, [train] * len(inner), [o for _, o, _ in inner], [s for _, _, s in inner]
    )
    for (synset, _, _), members in zip(inner, scans):
      for name, offset, size in members:
        found.append(("train", synset, Member(train, offset, size, 0, os.path.basename(name))))
  if val:
    images = sorted(
      (os.path.basename(name), offset, size)
      for name, offset, size in scan_tar(val)
      if _is_image(name)
    )
    synsets = _devkit_labels(devkit) if devkit else _listed_labels(val_labels)
    if len(synsets) != len(images):
      raise DataError(
        f"{val} holds {len(images)} images, but {devkit or val_labels} labels {len(synsets)}; "
        "use files that belong together."
      )
    for (name, offset, size), synset in zip(images, synsets):
      found.append(("val", synset, Member(val, offset, size, 0, name)))
  return _label(found, {"kind": "imagenet", "name": "ILSVRC2012"}, ignored, train or val or "")


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
  found = []
  for i, (pixels, label) in enumerate(zip(digits.images, digits.target)):
    grey = cv2.resize(
      (pixels * (255 / 16)).astype(np.uint8), (32, 32), interpolation=cv2.INTER_CUBIC
    )
    data = simplejpeg.encode_jpeg(
      np.repeat(grey[:, :, None], 3, axis=2), quality=95, colorsubsampling="444"
    )
    name = f"digit_{i:04d}_{label}.jpeg"
    found.append(
      ("train" if i in train else "val", str(label), Member("", 0, len(data), 0, name, data))
    )
  return _label(found, {"kind": "digits", "name": "scikit-learn load_digits"}, 0, "--digits")


def scan_tar(path: str, offset: int = 0, size: int | None = None) -> Iterator[tuple[str, int, int]]:
  """Read the headers of a tar, which may be a part of a file, and seek over the rest.

  Args:
    path: the file.
    offset: where the tar begins, in bytes.
    size: its length in bytes; by default up to the end of the file.

  Yields:
    (name, offset in the file, size) of each regular file in it.

  Raises:
    DataError: it cannot be read, is compressed, damaged or truncated.
  """
  try:
    with open(path, "rb") as f:
      end = offset + size if size is not None else os.fstat(f.fileno()).st_size
      magic = f.read(8)
      for prefix, name in _COMPRESSED.items():
        if magic.startswith(prefix):
          raise DataError(
            f"{path} is compressed with {name}, so its images cannot be read one by one; "
            "decompress it first."
          )
      f.seek(offset)
      with tarfile.open(fileobj=f, mode="r:") as tar:
        while (member := tar.next()) is not None:
          tar.members.clear()  # type: ignore[attr-defined]  # else 2 GB of them for ImageNet
          if member.issparse():
            raise DataError(
              f"{path} stores {member.name} as a sparse file; pack it again without --sparse."
            )
          if not member.isreg():
            continue
          if member.offset_data + member.size > end:
            raise DataError(f"{path} ends in the middle of {member.name}; fetch it again.")
          yield member.name, member.offset_data, member.size
        # tarfile takes a damaged header, and a file truncated between two members, for the end.
        f.seek(tar.offset)
        block = f.read(min(_BLOCK, max(0, end - tar.offset)))
        if any(block):
          raise DataError(f"{path} is damaged at byte {tar.offset:,}; fetch it again.")
        if not block:
          raise DataError(
            f"{path} lacks the mark at the end of a tar, so it is truncated; fetch it again."
          )
  except OSError as e:
    raise DataError(f"{path} cannot be read: {e.strerror}.") from e
  except tarfile.TarError as e:
    raise DataError(f"{path} is not an intact tar ({e}); fetch it again.") from e


def _scan_inner(path: str, offset: int, size: int) -> list[tuple[str, int, int]]:
  """Return the images of a tar inside a tar as a list, which can be pickled."""
  return [found for found in scan_tar(path, offset, size) if _is_image(found[0])]


def _is_image(name: str) -> bool:
  base = os.path.basename(name)
  return base.lower().endswith(local.IMAGE_SUFFIXES) and not base.startswith(".")


def _label(
  found: Iterable[tuple[str, str, Member]], origin: dict[str, Any], ignored: int, where: str
) -> Inputs:
  """Number the classes in sorted order, and group (split, class, member) by split.

  Raises:
    DataError: there are no images, or val has a class that train lacks.
  """
  found = list(found)
  if not found:
    raise DataError(f"{where} holds no CLASS/*.jpg, .jpeg or .png.")
  names: dict[str, set[str]] = collections.defaultdict(set)
  for split, name, _ in found:
    names[split].add(name)
  classes = sorted(names["train"] or names["val"])
  unknown = sorted(names["val"] - set(classes))
  if unknown:
    raise DataError(f"{where}: val has the class {unknown[0]}, which train lacks.")
  labels = {name: i for i, name in enumerate(classes)}
  splits: dict[str, list[Member]] = {s: [] for s in ("train", "val") if names[s]}
  for split, name, member in found:
    splits[split].append(member._replace(label=labels[name]))
  for members in splits.values():
    # The order in a tar or folder is arbitrary, and the shards must not depend on it.
    members.sort(key=lambda m: (m.label, m.name, m.offset))
  return Inputs(origin, classes, splits, ignored)


def _listed_labels(path: str | None) -> list[str]:
  if not path:
    raise DataError(
      "--imagenet-val needs --devkit or --val-labels, because the images carry no class."
    )
  try:
    with open(path, encoding="utf-8") as f:
      return f.read().split()
  except (OSError, UnicodeDecodeError) as e:
    raise DataError(f"--val-labels {path} cannot be read: {e}.") from e


def _devkit_labels(path: str) -> list[str]:
  """Return the synset of each validation image, in the order of their names, from the devkit."""
  import scipy.io  # a dependency of jax, used only here

  wanted = ("data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt")
  read: dict[str, bytes] = {}
  try:
    with tarfile.open(path, mode="r:*") as tar:
      for member in tar:
        for suffix in wanted:
          if member.name.endswith(suffix) and (file := tar.extractfile(member)):
            read[suffix] = file.read()
  except (OSError, EOFError, tarfile.TarError) as e:
    raise DataError(f"--devkit {path} cannot be read ({e}); fetch it again.") from e
  for suffix in wanted:
    if suffix not in read:
      raise DataError(f"--devkit {path} holds no {suffix}; is it ILSVRC2012_devkit_t12.tar.gz?")
  meta, truth = (read[suffix] for suffix in wanted)
  synsets = scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
  names = {int(i): str(wnid) for i, wnid in zip(synsets["ILSVRC2012_ID"], synsets["WNID"])}
  try:
    return [names[int(i)] for i in truth.split()]
  except KeyError as e:
    raise DataError(
      f"--devkit {path}: the ground truth has the class {e}, which meta.mat lacks."
    ) from e
