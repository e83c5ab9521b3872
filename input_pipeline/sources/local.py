"""Local folders: whether a path is one, and what kind of data it holds."""

import os

from input_pipeline import records
from input_pipeline.errors import DataError
from input_pipeline.remote import has_scheme
from input_pipeline.sources import catalog

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")


def checked_folder(path: str) -> str:
  """Return `config.data.path`, expanded, if it is a local folder that holds something.

  Raises:
    DataError: it is not.
  """
  if not path:
    raise DataError(
      "config.data.path is empty; give --config.data.path=FOLDER, "
      "or --config.data.kind=synthetic to run without data."
    )
  if has_scheme(path):
    raise DataError(
      f"config.data.path is {path}, but this config.data.kind reads only local folders; give "
      "--config.data.kind=stream."
    )
  path = os.path.expanduser(path)
  if not os.path.exists(path):
    raise DataError(f"config.data.path is {path}, which does not exist.")
  if not os.path.isdir(path):
    raise DataError(
      f"config.data.path is {path}, which is a file; make shards of it with "
      "`python -m input_pipeline.prepare` and give their folder."
    )
  try:
    if not os.listdir(path):
      raise DataError(
        f"config.data.path is {path}, which is empty; fill it with input_pipeline.prepare."
      )
  except PermissionError as e:
    raise DataError(f"config.data.path is {path}, which cannot be read ({e.strerror}).") from e
  return path


def guess_kind(path: str) -> str:
  """Return array_record or folder by what a local folder holds.

  Raises:
    DataError: it is no folder, or holds neither.
  """
  path = checked_folder(path)
  found = os.listdir(path)
  if (
    records.MANIFEST in found
    or catalog.TFDS_INFO in found
    or any(".array_record" in name for name in found)
  ):
    return "array_record"
  # TFDS nests DATASET/VERSION, and the parent is an easy mistake.
  for parent, folders, files in os.walk(path):
    if records.MANIFEST in files or catalog.TFDS_INFO in files:
      raise DataError(
        f"config.data.path is {path}, but the data are in {parent}; give that folder."
      )
    if os.path.relpath(parent, path).count(os.sep) >= 1:
      folders.clear()
    folders[:] = sorted(folders)[:20]
  if any(list_classes(os.path.join(path, name)) for name in list_classes(path)):
    return "folder"
  raise DataError(
    f"{path} holds neither {records.MANIFEST} nor {catalog.TFDS_INFO} with ArrayRecord shards, nor "
    "SPLIT/CLASS/*.jpg; make shards with `python -m input_pipeline.prepare`."
  )


def list_classes(folder: str) -> list[str]:
  """Return the names of the folders in a folder, sorted, without hidden ones."""
  with os.scandir(folder) as entries:
    return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def list_images(folder: str) -> list[str]:
  """Return the names of the image files in a folder, by their suffix, sorted."""
  with os.scandir(folder) as entries:
    return sorted(
      e.name
      for e in entries
      if e.name.lower().endswith(IMAGE_SUFFIXES) and not e.name.startswith(".")
    )
