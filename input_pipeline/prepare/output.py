"""Where `prepare` writes: a local folder, or one in a bucket, to which whole files are sent."""

import abc
import base64
from collections.abc import Callable, Iterator
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from typing import Any, TypeVar

from input_pipeline import records
from input_pipeline.errors import DataError
from input_pipeline.remote import fsspec as remote
from input_pipeline.remote import has_scheme

T = TypeVar("T")

_BUCKET = "gs://"


class Output(abc.ABC):
  """A folder in which a file appears as a whole or not at all.

  Attributes:
    scratch: local folder in which files are written first.
  """

  scratch: str

  @abc.abstractmethod
  def names(self) -> list[str]:
    """Return the names of the files in the folder; those in its subfolders may be left out."""

  @abc.abstractmethod
  def read_json(self, name: str) -> Any | None:
    """Return the JSON in a file, or None if there is no such file."""

  @abc.abstractmethod
  def write_json(self, name: str, value: Any) -> None:
    """Write a file of JSON."""

  @abc.abstractmethod
  def remove(self, name: str) -> None:
    """Remove a file, or a folder with all its files, if it exists."""

  @abc.abstractmethod
  def put(self, path: str, name: str, entry: dict[str, Any]) -> None:
    """Move the file `path` of the scratch folder to `name`; add to `entry` what `holds` needs.

    Args:
      path: of the file, which is gone afterwards.
      name: of the target, which is replaced.
      entry: with `bytes` and `sha256` of the file.

    Raises:
      DataError: it did not arrive intact.
    """

  @abc.abstractmethod
  def holds(self, name: str, entry: dict[str, Any]) -> bool:
    """Whether the file `name` exists and is the one described by `entry`."""

  @contextlib.contextmanager
  def locked(self) -> Iterator[None]:
    """Lock the scratch folder against other processes of this machine.

    Raises:
      DataError: another process has it.
    """
    os.makedirs(self.scratch, exist_ok=True)
    folder = os.open(self.scratch, os.O_RDONLY)
    try:
      fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as e:
      os.close(folder)
      raise DataError(f"another prepare is writing to {self}; wait for it or stop it.") from e
    try:
      yield
    finally:
      os.close(folder)


class Folder(Output):
  """A local folder: files are written under another name and renamed."""

  def __init__(self, path: str):
    self.scratch = self._path = path

  def __str__(self) -> str:
    return self._path

  def _at(self, name: str) -> str:
    return os.path.join(self._path, name)

  def names(self) -> list[str]:
    return os.listdir(self._path)

  def read_json(self, name: str) -> Any | None:
    return records.read_json(self._at(name)) if os.path.exists(self._at(name)) else None

  def write_json(self, name: str, value: Any) -> None:
    os.makedirs(os.path.dirname(self._at(name)), exist_ok=True)
    records.write_json(self._at(name), value)

  def remove(self, name: str) -> None:
    if os.path.isdir(self._at(name)):
      shutil.rmtree(self._at(name))
    elif os.path.exists(self._at(name)):
      os.remove(self._at(name))

  def put(self, path: str, name: str, entry: dict[str, Any]) -> None:
    with open(path, "rb") as f:
      os.fsync(f.fileno())
    os.replace(path, self._at(name))

  def holds(self, name: str, entry: dict[str, Any]) -> bool:
    if not os.path.exists(self._at(name)) or os.path.getsize(self._at(name)) != entry["bytes"]:
      return False
    with open(self._at(name), "rb") as f:
      return hashlib.file_digest(f, "sha256").hexdigest() == entry["sha256"]


class Bucket(Output):
  """A folder in a bucket of Google Cloud Storage, which has size and MD5 of each object."""

  def __init__(self, url: str):
    self._url = url.rstrip("/")
    name = hashlib.sha256(self._url.encode()).hexdigest()[:12]
    self.scratch = os.path.join(tempfile.gettempdir(), f"prepare-{name}")
    self._fs, self._path = remote.filesystem(self._url)

  def __str__(self) -> str:
    return self._url

  def _at(self, name: str) -> str:
    return f"{self._path}/{name}"

  def _do(self, name: str, call: Callable[[], T]) -> T:
    """Return the result of `call`, which uses the file `name`, retried if the network fails."""
    try:
      return remote.retried(f"{self._url}/{name}".rstrip("/"), call)
    except DataError as e:
      if isinstance(e.__cause__, FileNotFoundError):  # of a write
        raise DataError(
          f"there is no bucket {self._path.split('/')[0]}, for --out {self._url}."
        ) from e
      raise

  def names(self) -> list[str]:
    def listed() -> list[str]:
      try:
        return [os.path.basename(path) for path in self._fs.ls(self._path, detail=False)]
      except FileNotFoundError:  # no file yet, or no bucket, in which case the first write fails
        return []

    return self._do("", listed)

  def read_json(self, name: str) -> Any | None:
    def read() -> bytes | None:
      try:
        return self._fs.cat_file(self._at(name))
      except FileNotFoundError:
        return None

    content = self._do(name, read)
    try:
      return None if content is None else json.loads(content)
    except ValueError as e:
      raise DataError(f"{self._url}/{name} is no JSON ({e}); make the data again.") from e

  def write_json(self, name: str, value: Any) -> None:
    content = records.to_json(value)
    self._do(name, lambda: self._fs.pipe_file(self._at(name), content))

  def remove(self, name: str) -> None:
    def remove() -> None:
      with contextlib.suppress(FileNotFoundError):
        self._fs.rm(self._at(name), recursive=True)

    self._do(name, remove)

  def put(self, path: str, name: str, entry: dict[str, Any]) -> None:
    with open(path, "rb") as f:
      entry["md5"] = hashlib.file_digest(f, "md5").hexdigest()
    self._do(name, lambda: self._fs.put_file(path, self._at(name)))
    if not self.holds(name, entry):
      raise DataError(f"{self._url}/{name} did not arrive intact; run the same command again.")
    os.remove(path)

  def holds(self, name: str, entry: dict[str, Any]) -> bool:
    def info() -> dict[str, Any] | None:
      try:
        return self._fs.info(self._at(name))
      except FileNotFoundError:
        return None

    found = self._do(name, info)
    md5 = base64.b64encode(bytes.fromhex(entry.get("md5", ""))).decode()
    return found is not None and (found["size"], found.get("md5Hash")) == (entry["bytes"], md5)


def open_output(path: str) -> Output:
  """Return the folder of `--out`; raise DataError for an unknown scheme."""
  if path.startswith(_BUCKET):
    return Bucket(path)
  if has_scheme(path):
    raise DataError(f"--out {path} is neither a folder nor {_BUCKET}BUCKET/FOLDER.")
  return Folder(path)
