"""What data that are no folders of classes probably are, and what makes such folders of them."""

from collections.abc import Iterable, Mapping, Sequence
import os
import re

from input_pipeline.errors import one_line

_ANNOTATIONS = "val_annotations.txt"  # of Tiny ImageNet: image, class and box, a line each
_TABLES = (".csv", ".tsv", ".json", ".jsonl", ".txt", ".xml")
_ARCHIVES = (".tar", ".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".zip", ".7z", ".rar")
# What other tools write, by a part of the name of a file; none of it is read.
_FOREIGN = {
  r"\.tfrecords?(-|$)|(train|validation|val)-\d{5}-of-\d{5}$": "TFRecord",
  r"\.beton$": "a data set of FFCV",
  r"\.mds(\.|$)": "a data set of MosaicML Streaming",
  r"(^|/)(data|lock)\.mdb$|\.lmdb$": "LMDB",
  r"\.(h5|hdf5)$": "HDF5",
  r"\.npz$|\.npy$": "arrays of numpy",
  r"-ubyte(\.gz)?$": "MNIST's format",
  r"(^|/)(data_batch_\d|test_batch|batches\.meta)$": "CIFAR's pickles",
  r"\.rec$": "RecordIO of MXNet",
}


def remedy(images: Iterable[str], left_out: Mapping[str, Sequence[str]]) -> str:
  """Return what is wrong with a listing in which no class is, and what to do; "" if nothing shows.

  Args:
    images: paths of images, none in a folder of a class.
    left_out: paths of other files by reason; see `layout.REASONS`.
  """
  others = sorted(left_out.get("no_image", ()))
  if first := min(images, default=""):
    return (
      f"its images, as {one_line(first)}, lie in no folder of a class; put those of each class "
      f"into a folder of its own, as CLASS/{one_line(os.path.basename(first))}{table(left_out)}"
    )
  for pattern, what in _FOREIGN.items():
    if found := [
      path for path in others + list(left_out.get("format", ())) if re.search(pattern, path)
    ]:
      return (
        f"it holds {what}, as {one_line(min(found))}, which is not read; write the images as files "
        "into folders of classes, or as parquet"
      )
  if found := [path for path in others if path.lower().endswith(".parquet")]:
    return f"it holds parquet, as {one_line(found[0])}; give the folder with hf: in front"
  if found := [path for path in others if path.lower().endswith(_ARCHIVES)]:
    return (
      f"it holds archives, as {one_line(found[0])}; unpack them, each class into a folder of its "
      "own, or give one tar of such folders as --tar of prepare"
    )
  return ""


def table(left_out: Mapping[str, Sequence[str]]) -> str:
  """Return what to do with a file that may hold the classes, as the end of a sentence, or ""."""
  found = [p for p in left_out.get("no_image", ()) if os.path.splitext(p)[1].lower() in _TABLES]
  if not found:
    return ""
  first = min(found, key=lambda p: (_TABLES.index(os.path.splitext(p)[1].lower()), p))
  return (
    f". If {one_line(first)} holds the classes: no such file is read, but input_pipeline/README.md "
    "makes folders of one"
  )


def webdataset(images: Iterable[str], left_out: Mapping[str, Sequence[str]]) -> str:
  """Return the label of an image that a WebDataset has as a file of its own; "" if it is none."""
  labels = [path for path in left_out.get("no_image", ()) if path.endswith(".cls")]
  stems = {_stem(path) for path in images} if labels else set()
  return next((path for path in labels if _stem(path) in stems), "")


def tiny_imagenet(folder: str, left_out: Mapping[str, Sequence[str]]) -> str:
  """Return how to make folders of the classes of a split where a file has them, or "".

  Args:
    folder: of the split, with a slash at its end.
    left_out: as above.
  """
  path = f"{folder}{_ANNOTATIONS}"
  if path not in left_out.get("no_image", ()):
    return ""
  return (
    f", because {path} has its classes, as in Tiny ImageNet; in the folder of that file this makes "
    'folders of them: while read -r image class box; do mkdir -p "$class" && mv "images/$image" '
    f'"$class/"; done < {_ANNOTATIONS} && rmdir images'
  )


def _stem(path: str) -> str:
  return path.rpartition("/")[2].partition(".")[0]
