"""The members of a tar, read by their headers and without unpacking anything."""

from collections.abc import Iterator, Sequence
import os
import posixpath
import tarfile
from typing import BinaryIO

from input_pipeline.errors import DataError
from input_pipeline.sources import layout
from input_pipeline.sources.layout import Entry

BEHIND_END = "behind_end"  # a fault that may be allowed
_BLOCK = 512  # bytes, of a tar
_PIECE = 1 << 20  # bytes that are looked at behind the end of a tar at a time
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# What unpacks each.
_UNPACK = {"gzip": "gunzip", "bzip2": "bunzip2", "xz": "unxz", "zstd": "unzstd"}
_MOST_LINKS = 8  # of a chain of links


def list_tar(
  path: str, offset: int = 0, size: int | None = None, inside: str = "", allow: Sequence[str] = ()
) -> list[Entry]:
  """Return all members of a tar.

  Links are those members that they lead to. Of members of one name, which `tar -r` and `tar -u`
  add, the last counts, as it does for one who unpacks the tar.

  Args:
    path: the file.
    offset: where the tar begins, in bytes.
    size: its length in bytes; by default up to the end of the file.
    inside: its name, if it is a member of a tar itself.
    allow: faults that are allowed.

  Raises:
    DataError: it cannot be read, is compressed, damaged or truncated.
  """
  members: dict[str, Entry] = {}
  links: dict[str, str] = {}
  replaced = []
  for member in _headers(path, offset, size, inside, allow):
    name = posixpath.normpath(member.name).lstrip("/")
    kind = layout.FILE
    if member.isdir():
      kind = layout.FOLDER
    elif member.issym() or member.islnk():
      folder = posixpath.dirname(name) if member.issym() else ""
      links[name] = posixpath.normpath(posixpath.join(folder, member.linkname))
      kind = "dangling"  # unless it leads to another member
    elif not member.isreg():
      kind = "special"
    if name in members and kind != layout.FOLDER:
      replaced.append(members[name]._replace(kind="replaced"))
      if kind != "dangling":
        links.pop(name, None)
    members[name] = Entry(name, kind, member.offset_data, member.size)
  for name in links:
    target, steps = links[name], 0
    while target in links and steps < _MOST_LINKS:
      target, steps = links[target], steps + 1
    if target in members and members[target].kind == layout.FILE:
      members[name] = members[target]._replace(path=name)
  return [*members.values(), *replaced]


def _headers(
  path: str, offset: int, size: int | None, inside: str, allow: Sequence[str]
) -> Iterator[tarfile.TarInfo]:
  """Yield the headers of a tar, and seek over the rest."""
  where = f"{inside} in {path}" if inside else path
  try:
    with open(path, "rb") as f:
      end = offset + size if size is not None else os.fstat(f.fileno()).st_size
      if end == offset:
        raise DataError(f"{where} is empty, zero bytes; fetch it again.")
      f.seek(offset)
      magic = f.read(8)
      for prefix, name in _COMPRESSED.items():
        if magic.startswith(prefix):
          raise DataError(
            f"{where} is compressed with {name}, so its images cannot be read one by one; "
            f"{_UNPACK[name]} it first."
          )
      if magic.startswith(b"PK\x03\x04"):
        raise DataError(f"{where} is a zip archive; unzip it, and give the folder as --folder.")
      f.seek(offset)
      with tarfile.open(fileobj=f, mode="r:") as tar:
        while (member := tar.next()) is not None:
          tar.members.clear()  # type: ignore[attr-defined]  # else 2 GB of them for ImageNet
          if member.issparse():
            raise DataError(
              f"{where} stores {member.name} as a sparse file; pack it again without --sparse."
            )
          if member.isreg() and member.offset_data + member.size > end:
            raise DataError(f"{where} ends in the middle of {member.name}; fetch it again.")
          yield member
        # tarfile takes a damaged header, and a file truncated between two members, for the end.
        f.seek(tar.offset)
        block = f.read(min(_BLOCK, max(0, end - tar.offset)))
        if any(block):
          raise DataError(f"{where} is damaged at byte {tar.offset:,}; fetch it again.")
        if not block:
          raise DataError(
            f"{where} lacks the mark at the end of a tar, so it is truncated; fetch it again."
          )
        behind = _first_byte(f, end)
        if behind is not None and BEHIND_END not in allow:
          raise DataError(
            f"{where} holds more behind its end, from byte {behind:,} on, as after `cat a.tar "
            "b.tar`; unpack it with tar --ignore-zeros and pack it again, or leave that part out "
            f"with --allow={BEHIND_END}."
          )
  except IsADirectoryError as e:
    raise DataError(f"{path} is a folder and no tar; give it as --folder.") from e
  except OSError as e:
    raise DataError(f"{path} cannot be read: {e.strerror}.") from e
  except tarfile.TarError as e:
    raise DataError(f"{where} is not an intact tar ({e}); fetch it again.") from e


def _first_byte(file: BinaryIO, end: int) -> int | None:
  """Return where the first byte is that is not zero, from where a file is read on."""
  while piece := file.read(min(_PIECE, max(0, end - file.tell()))):
    rest = piece.lstrip(b"\0")
    if rest:
      return file.tell() - len(rest)
  return None
