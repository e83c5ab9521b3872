"""Local folders: whether a path is one, what kind of data it holds, and all that is below it."""

from collections.abc import Iterator
import os

from input_pipeline import records
from input_pipeline.errors import DataError
from input_pipeline.remote import has_scheme
from input_pipeline.sources import catalog, layout


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
  if _may_have_classes(path):
    return "folder"
  if other := next((name for name in sorted(found) if name.endswith((".parquet", ".tar"))), None):
    if other.endswith(".parquet"):
      raise DataError(f"{path} holds parquet; give --config.data.path=hf:{path}.")
    raise DataError(
      f"{path} holds {other}; make shards of it with `python -m input_pipeline.prepare`."
    )
  if image := next(filter(layout.is_image, sorted(found)), None):
    raise DataError(
      f"{path} holds {image}, an image without a class; put the images of each class into a folder "
      "of its own, as CLASS/*.jpg."
    )
  raise DataError(
    f"{path} holds neither {records.MANIFEST} nor {catalog.TFDS_INFO} with ArrayRecord shards, nor "
    "SPLIT/CLASS/*.jpg; make shards with `python -m input_pipeline.prepare`."
  )


def _may_have_classes(path: str) -> bool:
  """Whether a folder holds folders in its folders, or images in them."""
  for name in os.listdir(path):
    inside = os.path.join(path, name)
    if os.path.isdir(inside) and not layout.is_system(name):
      with os.scandir(inside) as entries:
        if any(layout.is_image(e.name) or e.is_dir() for e in entries):
          return True
  return False


def walk(folder: str) -> Iterator[layout.Entry]:
  """Yield all that is below a folder, with links followed, but not what is in system folders.

  Raises:
    DataError: a folder cannot be listed.
  """
  yield from _walk(folder, "", ())


def _walk(root: str, folder: str, around: tuple[tuple[int, int], ...]) -> Iterator[layout.Entry]:
  path = os.path.join(root, folder)
  try:
    status = os.stat(path)
    with os.scandir(path) as found:
      entries = sorted(found, key=lambda e: e.name)
  except OSError as e:
    raise DataError(f"{path} cannot be listed ({e.strerror}); make it readable or move it.") from e
  inode = (status.st_dev, status.st_ino)
  if inode in around:
    yield layout.Entry(folder.rstrip("/"), "loop")
    return
  for entry in entries:
    name = folder + entry.name
    try:
      if entry.is_dir():
        yield layout.Entry(name, layout.FOLDER)
        if not layout.is_system(entry.name):
          yield from _walk(root, f"{name}/", (*around, inode))
      elif entry.is_file():
        yield layout.Entry(name)
      else:  # a link to nothing is no file either
        yield layout.Entry(name, "dangling" if entry.is_symlink() else "special")
    except OSError:  # of links that go round in a circle
      yield layout.Entry(name, "dangling")
