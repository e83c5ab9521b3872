"""The official archives of ILSVRC2012: a tar of tars, a flat tar, and the list of its labels."""

from collections.abc import Callable, Iterable, Sequence
import io
import itertools
import os
import re
import tarfile
from typing import Any

from configs.names import natural
from input_pipeline.errors import DataError
from input_pipeline.prepare import tars
from input_pipeline.prepare.archives import Inputs, Member, inputs_of
from input_pipeline.sources import layout
from input_pipeline.sources.layout import Entry

# Runs the tasks of a scan: `map`, or the one of a pool.
Map = Callable[..., Iterable[Any]]

_TAR = ".tar"


def from_imagenet(
  train: str | None,
  val: str | None,
  devkit: str | None,
  val_labels: str | None,
  run: Map = map,
  allow: Sequence[str] = (),
) -> Inputs:
  """List the images of the official archives of ILSVRC2012.

  Args:
    train: ILSVRC2012_img_train.tar, a tar of one tar per class, or None.
    val: ILSVRC2012_img_val.tar, a flat tar, or None.
    devkit: ILSVRC2012_devkit_t12.tar.gz, with the classes of `val`; or
    val_labels: a text file with the synset of each image of `val`, one per line, in the order of
      their names, or with the name of the image before it.
    run: runs the scans of the tars inside `train`.
    allow: faults that are allowed.

  Raises:
    DataError: an archive is damaged, or the labels do not match it.
  """
  # Before the archives, whose scan takes long.
  synsets, words = _devkit(devkit) if devkit and val else (None, {})
  contents = layout.Contents(train or val or "", {}, {}, {}, [])
  files: dict[str, str] = {}
  if train:
    contents.splits["train"] = _train(train, run, allow, contents.left_out)
    files["train"] = train
  if val:
    contents.splits["val"] = _val(val, devkit or val_labels, synsets, allow, contents)
    files["val"] = val
  contents.folders.update(dict.fromkeys(contents.splits, ""))

  def member(split: str, image: layout.Image, label: int) -> Member:
    return Member(files[split], image.entry.offset, image.entry.size, label, image.name)

  chosen = {split: split for split in contents.splits}
  origin: dict[str, Any] = {"kind": "imagenet", "name": "ILSVRC2012"}
  if words:
    origin["words"] = dict(sorted(words.items()))
  return inputs_of(contents, chosen, [], member, origin, allow)


def _train(
  path: str, run: Map, allow: Sequence[str], left_out: dict[str, list[str]]
) -> layout.Classes:
  """Return the images of a tar of tars by class; add to what is left out."""
  inner: dict[str, Entry] = {}
  for entry in tars.list_tar(path, allow=allow):
    name = os.path.basename(entry.path)
    if layout.is_system(name):
      left_out.setdefault("system", []).append(entry.path)
    elif entry.kind == layout.FOLDER:
      continue
    elif entry.kind == "replaced" or name.removesuffix(_TAR) in inner:
      raise DataError(
        f"--imagenet-train {path} holds {name} twice, as the official archive does not; fetch it "
        "again."
      )
    elif entry.kind == layout.FILE and name.endswith(_TAR):
      inner[name.removesuffix(_TAR)] = entry
    else:
      kind = entry.kind if entry.kind != layout.FILE else "no_image"
      left_out.setdefault(kind, []).append(entry.path)
  if not inner:
    raise DataError(
      f"--imagenet-train {path} holds no tars of classes; is it ILSVRC2012_img_train.tar?"
    )
  entries = inner.values()
  scans = run(
    tars.list_tar,
    [path] * len(inner),
    [e.offset for e in entries],
    [e.size for e in entries],
    [e.path for e in entries],
    [tuple(allow)] * len(inner),
  )
  classes: layout.Classes = {}
  for synset, entry, members in zip(inner, entries, scans):
    found = _images(members, f"{entry.path}/", left_out)
    if not found and layout.EMPTY_CLASS not in allow:
      raise DataError(
        f"--imagenet-train {path}: {entry.path} holds no image; fetch it again, or leave the class "
        f"without images with --allow={layout.EMPTY_CLASS}."
      )
    classes[synset] = found
  return classes


def _val(
  path: str,
  labels: str | None,
  synsets: Sequence[str] | None,
  allow: Sequence[str],
  contents: layout.Contents,
) -> layout.Classes:
  """Return the images of a flat tar by class; add to what is left out.

  Args:
    path: of the tar.
    labels: the devkit, or a text file of labels.
    synsets: those of the images in the devkit; None if `labels` is a text file.
    allow: faults that are allowed.
    contents: has the training classes, which come first; gets what is left out.
  """
  images = _images(tars.list_tar(path, allow=allow), "", contents.left_out)
  images.sort(key=lambda image: image.name)
  names = [image.name for image in images]
  twice = next((a for a, b in itertools.pairwise(names) if a == b), None)
  if twice is not None:
    raise DataError(f"{path} holds two images {twice} in different folders; keep one.")
  known = contents.splits.get("train", {})
  by_name = None
  if synsets is None:
    synsets, by_name = _listed_labels(labels, known)
  if by_name is None:
    if len(synsets) != len(images):
      raise DataError(
        f"{path} holds {len(images)} images, but {labels} labels {len(synsets)}; "
        "use files that belong together."
      )
    if names != sorted(names, key=natural):
      raise DataError(
        f"{path}: the order of the images is not clear, as their numbers have no leading zeros; "
        "give --val-labels with the name of the image before each class."
      )
  else:
    stems = {os.path.splitext(name)[0]: synset for name, synset in by_name.items()}
    for name in names:
      if os.path.splitext(name)[0] not in stems:
        raise DataError(f"{path} holds {name}, which {labels} does not list.")
    if len(stems) != len(names):
      raise DataError(
        f"{path} holds {len(names)} images, but {labels} lists {len(stems)}; use files that "
        "belong together."
      )
    synsets = [stems[os.path.splitext(name)[0]] for name in names]
  classes: layout.Classes = {synset: [] for synset in known}
  found = set(synsets)
  for image, synset in zip(images, synsets):
    folder = os.path.basename(os.path.dirname(image.entry.path))
    if folder in found and folder != synset:
      raise DataError(
        f"{path}: {image.entry.path} lies in the folder of {folder}, but {labels} "
        f"labels it {synset}; use files that belong together, or give the folders by --tar."
      )
    classes.setdefault(synset, []).append(image)
  return classes


def _images(
  members: Sequence[Entry], prefix: str, left_out: dict[str, list[str]]
) -> list[layout.Image]:
  """Return the images of a tar in which folders do not matter; add to what is left out."""
  found = []
  for entry in members:
    name = os.path.basename(entry.path)
    if entry.kind == layout.FOLDER:
      continue
    reason = layout.reason_of(name, entry.kind)
    if reason:
      left_out.setdefault(reason, []).append(prefix + entry.path)
    else:
      found.append(layout.Image(entry, name))
  return found


def _listed_labels(
  path: str | None, known: layout.Classes
) -> tuple[Sequence[str], dict[str, str] | None]:
  """Return the classes in a text file, one a line; by the name of the image, if that is there."""
  if not path:
    raise DataError(
      "--imagenet-val needs --devkit or --val-labels, because the images carry no class."
    )
  try:
    with open(path, encoding="utf-8-sig") as f:  # a byte order mark is no part of the first class
      lines = [re.split(r"[,\s]+", line.strip()) for line in f if line.strip()]
  except (OSError, UnicodeDecodeError) as e:
    raise DataError(f"--val-labels {path} cannot be read: {e}.") from e
  if odd := next((line for line in lines if len(line) != len(lines[0]) or len(line) > 2), None):
    raise DataError(
      f"--val-labels {path} has the line {' '.join(odd)!r}; every line must be CLASS, or IMAGE and "
      "CLASS."
    )
  synsets = [line[-1] for line in lines]
  if synsets and all(s.isdigit() for s in synsets) and not set(synsets) <= known.keys():
    raise DataError(
      f"--val-labels {path} holds numbers; those of the development kit are in another order than "
      "the classes, so give the kit itself with --devkit."
    )
  if not lines or len(lines[0]) == 1:
    return synsets, None
  names = [os.path.basename(line[0]) for line in lines]
  by_name = dict(zip(names, synsets))
  if len(by_name) != len(names):
    raise DataError(f"--val-labels {path} lists an image twice; keep one of its lines.")
  return synsets, by_name


def _devkit(path: str) -> tuple[list[str], dict[str, str]]:
  """Return what the archive of the development kit holds.

  Returns:
    The synset of each validation image, in the order of their names; the words of each synset, as
    "tench, Tinca tinca", empty if the kit has none.
  """
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
  table = scipy.io.loadmat(io.BytesIO(meta), squeeze_me=True)["synsets"]
  names = {int(i): str(wnid) for i, wnid in zip(table["ILSVRC2012_ID"], table["WNID"])}
  try:
    synsets = [names[int(i)] for i in truth.split()]
  except KeyError as e:
    raise DataError(
      f"--devkit {path}: the ground truth has the class {e}, which meta.mat lacks."
    ) from e
  if "words" not in (table.dtype.names or ()):
    return synsets, {}
  return synsets, {str(wnid): str(words) for wnid, words in zip(table["WNID"], table["words"])}
