"""Files as torch.save writes them, made without torch, whole or with parts of their own."""

from collections.abc import Mapping
import io
import struct
import zipfile

import numpy as np

MAGIC = b"\x80\x02\x8a\x0al\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19."
_STORAGES = {"<f8": "Double", "<f4": "Float", "<f2": "Half", "<i8": "Long", "<i4": "Int"}


def text(words: str) -> bytes:
  """The opcode of a string."""
  raw = words.encode()
  return b"X" + struct.pack("<I", len(raw)) + raw


def number(value: int) -> bytes:
  """The opcode of an integer."""
  return b"\x8a\x08" + struct.pack("<q", value)


def numbers(values) -> bytes:
  return b"(" + b"".join(map(number, values)) + b"t"


def tensor(key: str, array: np.ndarray, shape=None, offset: int = 0) -> bytes:
  """The opcodes of a tensor whose storage is `key`."""
  storage = _STORAGES[array.dtype.str]
  shape = array.shape if shape is None else shape
  strides = [int(np.prod(shape[axis + 1 :])) for axis in range(len(shape))]
  return (
    b"ctorch._utils\n_rebuild_tensor_v2\n("
    + (b"(" + text("storage") + b"ctorch\n" + f"{storage}Storage\n".encode() + text(key))
    + (text("cpu") + number(array.size) + b"tQ" + number(offset))
    + (numbers(shape) + numbers(strides) + b"\x89ccollections\nOrderedDict\n)RtR")
  )


def state_dict(tensors: Mapping[str, np.ndarray], extra: bytes = b"") -> bytes:
  """The pickle of a state dict; `extra` is opcodes of further keys and values."""
  items = b"".join(
    text(name) + tensor(str(number), array) for number, (name, array) in enumerate(tensors.items())
  )
  return b"\x80\x02}(" + items + extra + b"u."


def zipped(tensors: Mapping[str, np.ndarray], pickled: bytes | None = None, **entries) -> bytes:
  """An archive of torch.save, with further entries."""
  file = io.BytesIO()
  with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
    archive.writestr("archive/data.pkl", state_dict(tensors) if pickled is None else pickled)
    archive.writestr("archive/byteorder", b"little")
    for number, array in enumerate(tensors.values()):
      archive.writestr(f"archive/data/{number}", array.tobytes())
    for name, content in entries.items():
      archive.writestr(name, content)
  return file.getvalue()


def legacy(tensors: Mapping[str, np.ndarray], pickled: bytes | None = None) -> bytes:
  """A file in the format before archives."""
  system = b"\x80\x02}(" + text("little_endian") + b"\x88u."
  keys = b"\x80\x02](" + b"".join(text(str(number)) for number in range(len(tensors))) + b"e."
  data = b"".join(struct.pack("<q", array.size) + array.tobytes() for array in tensors.values())
  version = b"\x80\x02M\xe9\x03."
  return MAGIC + version + system + (pickled or state_dict(tensors)) + keys + data
