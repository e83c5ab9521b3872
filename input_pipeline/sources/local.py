"""Local folders: whether a path is one, what kind of data it holds, and all that is below it."""

from collections.abc import Iterator
import errno
import os

from input_pipeline import records
from input_pipeline.errors import DataError, InputLost
from input_pipeline.remote import has_scheme
from input_pipeline.sources import catalog, layout
from input_pipeline.sources.base import HF_PREFIX


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
    raise DataError(f"config.data.path is {path}, which is a file; {_of_a_file(path)}.")
  try:
    if not os.listdir(path):
      raise DataError(
        f"config.data.path is {path}, which is empty; fill it with input_pipeline.prepare."
      )
  except PermissionError as e:
    raise DataError(f"config.data.path is {path}, which cannot be read ({e.strerror}).") from e
  return path


def check_there(path: str) -> None:
  """Raise InputLost if what was there at the start is not; a record of it is not to blame."""
  try:
    os.stat(path)
  except OSError as e:
    raise InputLost(
      f"{path} was removed, renamed or unmounted under this run ({e.strerror}); put it back."
    ) from e


def check_this_process(path: str, error: OSError) -> None:
  """Raise InputLost if a file cannot be opened for want of something that this process lacks."""
  remedies = {
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "this machine has too many open files",
    errno.ENOMEM: "this machine is out of memory",
  }
  if error.errno in remedies:
    raise InputLost(
      f"{path} cannot be opened ({error.strerror}); {remedies[error.errno]}."
    ) from error


def _of_a_file(path: str) -> str:
  name = os.path.basename(path)
  if name in (records.MANIFEST, catalog.TFDS_INFO) or ".array_record" in name:
    return f"give its folder, {os.path.dirname(path) or '.'}"
  if name.endswith(".parquet"):
    return f"give its folder behind {HF_PREFIX}"
  if name.endswith(".tar"):
    return "make shards of it with `python -m input_pipeline.prepare --tar`, and give their folder"
  return "unpack it if it is an archive, and give the folder"


def guess_kind(path: str) -> str:
  """Return array_record or folder by what a local folder holds.

  Raises:
    DataError: it is no folder, or holds parquet, or the data are in a folder of it.
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
  if any(name.endswith(".parquet") for name in found) and not any(map(layout.is_image, found)):
    raise DataError(f"{path} holds parquet; give --config.data.path={HF_PREFIX}{path}.")
  return "folder"  # or what `layout.arrange` says of it


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
