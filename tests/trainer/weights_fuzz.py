"""Damaged files of weights: python -m tests.trainer.weights_fuzz [NUMBER] [SEED]

Each is refused in one sentence, or is the same weights to the last bit (a flip in a time stamp). A
file of torch before zip archives has no checksum, so there a flip in a value is another value.
"""

import collections
import io
import json
import os
import pathlib
import resource
import struct
import sys
import tempfile
import zipfile

import numpy as np

from tests.trainer import tiny, torch_files
from trainer.weights import net as net_lib
from trainer.weights import read, safetensors
from trainer.weights.errors import WeightsError
from trainer.weights.foreign import theirs

KINDS = ("safetensors", "zip", "legacy")


class Fuzz:
  """Files made of one small net, and what becomes of them."""

  def __init__(self, folder, seed=0):
    self.folder = pathlib.Path(folder)
    self.rng = np.random.default_rng(seed)
    self.net = net_lib.build(tiny.get_config())
    self.leaves = net_lib.random_leaves(self.net)
    names = {leaf: self.net.torch_name(leaf) for leaf in self.leaves}
    self.tensors = {
      name: np.ascontiguousarray(theirs(leaf, name, self.leaves[leaf]))
      for leaf, name in names.items()
    }
    self.sentinel = self.folder / "code-was-run"

  def file(self, kind, tensors=None, pickled=None):
    tensors = self.tensors if tensors is None else tensors
    if kind == "safetensors":
      words = {read.DIGEST: read.digest(tensors)}
      return b"".join(safetensors.encode(tensors, words))
    return (torch_files.zipped if kind == "zip" else torch_files.legacy)(tensors, pickled)

  # Each returns (bytes, whether values may differ without notice).

  def cut(self, kind):
    data = self.file(kind)
    return data[: self.rng.integers(0, len(data))], False

  def flip(self, kind):
    data = bytearray(self.file(kind))
    # Half of them where the structure is.
    end = len(data) if self.rng.random() < 0.5 else 4000
    ends = range(end) if self.rng.random() < 0.5 else range(len(data) - end, len(data))
    for at in self.rng.choice(ends, self.rng.integers(1, 9)):
      data[at] ^= 1 << self.rng.integers(8)
    return bytes(data), kind == "legacy"

  def overwrite(self, kind):
    data = bytearray(self.file(kind))
    at, length = self.rng.integers(0, len(data)), self.rng.integers(1, 200)
    data[at : at + length] = self.rng.bytes(length)
    return bytes(data), kind == "legacy"

  def noise(self, kind):
    start = {"safetensors": b"", "zip": b"PK\x03\x04", "legacy": b"\x80\x02"}[kind]
    return start + self.rng.bytes(self.rng.integers(0, 3000)), False

  def shape(self, kind):
    tensors, name = dict(self.tensors), self._name()
    old = tensors[name]
    tensors[name] = self.rng.normal(
      size=[size + self.rng.integers(0, 3) for size in old.shape]
    ).astype(np.float32)
    if tensors[name].shape == old.shape:
      tensors[name] = np.zeros((*old.shape, 2), np.float32)
    return self.file(kind, tensors), False

  def values(self, kind):
    tensors, name = dict(self.tensors), self._name()
    bad = self.rng.choice([np.nan, np.inf, -np.inf])
    tensors[name] = tensors[name].copy()
    tensors[name].flat[self.rng.integers(tensors[name].size)] = bad
    return self.file(kind, tensors), False

  def types(self, kind):
    tensors, name = dict(self.tensors), self._name()
    tensors[name] = tensors[name].astype(self.rng.choice([np.int64, np.int32]))
    return self.file(kind, tensors), False

  def too_large(self, kind):
    tensors, name = dict(self.tensors), self._name()
    tensors[name] = np.full(tensors[name].shape, 1e300)
    return self.file(kind, tensors), False

  def extra(self, kind):
    name = self.rng.choice(["layer9.0.conv1.weight", "module.fc.weight", "x", "../../etc/passwd"])
    return self.file(kind, self.tensors | {str(name): np.zeros(3, np.float32)}), False

  def lacking(self, kind):
    tensors = dict(self.tensors)
    for _ in range(self.rng.integers(1, len(tensors))):
      tensors.popitem()
    return self.file(kind, tensors), False

  def code(self, kind):
    """A pickle that would make the sentinel."""
    command = f"touch {self.sentinel}"
    call = torch_files.text(command) + b"\x85R"
    line = torch_files.text(f"open({str(self.sentinel)!r}, 'w')") + b"\x85R"
    attack = [
      b"cos\nsystem\n" + call,
      b"cposix\nsystem\n" + call,
      b"cbuiltins\neval\n" + line,
      b"c__builtin__\nexec\n" + line,
      b"(" + torch_files.text(command) + b"ios\nsystem\n",
      b"(cos\nsystem\n" + torch_files.text(command) + b"o",
      torch_files.text("os") + torch_files.text("system") + b"\x93" + call,
      b"csubprocess\ngetoutput\n" + call,
      b"ctorch\nload\n" + call,
      b"ctorch._utils\n_rebuild_tensor_v2\ncos\nsystem\n" + call + b"R",
      b"cos\nsystem\n" + torch_files.text(command) + b"\x85\x81",
      b"\x82\x01" + call,
    ][self.rng.integers(12)]
    name = torch_files.text("attack")
    pickled = [
      torch_files.state_dict(self.tensors, name + attack),
      b"\x80\x02" + attack + b".",
      b"\x80\x02" + attack + b"0" + torch_files.state_dict(self.tensors)[2:],
    ][self.rng.integers(3)]
    if self.rng.random() < 0.2:
      return pickled, False
    return self.file("zip" if kind == "safetensors" else kind, pickled=pickled), False

  def hungry_pickle(self, kind):
    """A pickle that asks for memory, or never ends."""
    attack = [
      b"}r\xff\xff\xff\x7f",
      b"\x8d" + struct.pack("<Q", 1 << 60) + b"x",
      b"\x96" + struct.pack("<Q", 1 << 40) + b"x",
      b"\x8b\xff\xff\xff\x7f",
      b"]" + b"2a" * 50,
      b"(" * 5000,
      b"}" + b"\x85" * 5000,
      b"I" + b"9" * 10000 + b"\n",
      b"]q\x00" + b"h\x00h\x00\x86q\x00" * 60,
      b"Xt\x00\x00\x00",
    ][self.rng.integers(10)]
    whole = torch_files.state_dict(self.tensors)
    place = b"\x80\x02" + attack + whole[2:] if self.rng.random() < 0.5 else b"\x80\x02" + attack
    return self.file("zip" if kind == "safetensors" else kind, pickled=place), True

  def lying_tensor(self, kind):
    """A tensor of a size or at a place that its storage does not have."""
    name, array = next(iter(self.tensors.items()))
    shape = [(1 << 40,), (1 << 31, 1 << 31), (-1,), (array.size + 1,), array.shape]
    choice = self.rng.integers(5)
    lie = torch_files.tensor("0", array, shape[choice], offset=1 << 40 if choice == 4 else 0)
    pickled = torch_files.state_dict(self.tensors, torch_files.text(name) + lie)
    return self.file("zip" if kind == "safetensors" else kind, pickled=pickled), False

  def bomb(self, kind):
    """An archive that grows when it is read, or whose entries overlap."""
    del kind
    file, zeros = io.BytesIO(), bytes(1 << self.rng.integers(10, 24))
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
      archive.writestr("archive/data.pkl", torch_files.state_dict(self.tensors))
      archive.writestr("archive/data/0", zeros)
    data = bytearray(file.getvalue())
    if self.rng.random() < 0.5:
      data = bytearray(self.file("zip"))
      at = data.find(b"PK\x01\x02")  # the first entry of the directory: sizes are at 20 and 24
      data[at + 20 : at + 28] = struct.pack("<II", 0xFFFFFFF0, 0xFFFFFFF0)
    return bytes(data), False

  def path(self, kind):
    """An entry that lies outside of the archive."""
    del kind
    name = ["../evil", "/etc/evil", "archive/../../evil", "..\\evil", "C:\\evil"]
    return torch_files.zipped(self.tensors, None, **{name[self.rng.integers(5)]: b"x"}), False

  def header(self, kind):
    """A header of safetensors that lies."""
    del kind
    whole = self.file("safetensors")
    length = int.from_bytes(whole[:8], "little")
    table, body = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    name = self._name()
    entry = table[name]
    choice = self.rng.integers(14)
    if choice == 0:
      return struct.pack("<Q", 1 << 62) + whole[8:], False
    if choice == 1:
      text = b"[" * 100_000
      return struct.pack("<Q", len(text)) + text, False
    if choice == 2:
      text = whole[8 : 8 + length].rstrip()[:-1] + b',"' + name.encode() + b'":{}}'
      return struct.pack("<Q", len(text)) + text + body, False
    if choice == 3:
      entry["shape"] = [1 << 62, 1 << 62]
    elif choice == 4:
      entry["data_offsets"] = [0, 1 << 62]
    elif choice == 5:
      entry["data_offsets"] = [-4, 0]
    elif choice == 6:
      entry["dtype"] = ["F8_E4M3", 7, None, "pickle"][self.rng.integers(4)]
    elif choice == 7:
      entry["shape"] = ["a", {}, None, [True], [1.5], [[1]]][self.rng.integers(6)]
    elif choice == 8:
      table[name] = [1, None, [], "x"][self.rng.integers(4)]
    elif choice == 9:
      table["__metadata__"] = [1, [], {"classes": 7}][self.rng.integers(3)]
    elif choice == 10:
      table["__metadata__"] = {"classes": ["[1]", "{", "[" * 9999, "7"][self.rng.integers(4)]}
    elif choice == 11:
      table["__metadata__"] = {"config": ["[1]", '{"a": {"b": 1}}', "x"][self.rng.integers(3)]}
    elif choice == 12:
      table["__metadata__"] = {"step": "many"}
    else:
      other = next(other for other in self.tensors if other != name)
      table[other]["data_offsets"] = entry["data_offsets"]
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text + body, False

  def _name(self):
    return list(self.tensors)[self.rng.integers(len(self.tensors))]

  def run(self, number):
    """Make and read files; return how many of each kind were refused or are whole all the same."""
    damages = [
      *[self.cut, self.flip, self.flip, self.flip, self.overwrite, self.noise, self.shape],
      *[self.values, self.types, self.too_large, self.extra, self.lacking, self.code],
      *[self.hungry_pickle, self.lying_tensor, self.bomb, self.path, self.header],
    ]
    outcomes = collections.Counter()
    path = self.folder / "weights.bin"
    for count in range(number):
      damage = damages[count % len(damages)]
      kind = KINDS[(count // len(damages)) % 3]
      data, quiet = damage(kind)
      path.write_bytes(data)
      what = f"file {count}: {damage.__name__} of {kind}"
      try:
        found, _ = read.read_weights(str(path), self.net)
      except WeightsError as error:
        words = str(error)
        assert words.endswith(".") and "\n" not in words and len(words) < 1000, (what, words)
        outcomes[f"{damage.__name__}: refused"] += 1
      else:
        same = all(np.array_equal(found[leaf], self.leaves[leaf]) for leaf in self.leaves)
        assert same or quiet, f"{what} was read as other weights"
        outcomes[f"{damage.__name__}: {'whole' if same else 'other values, no checksum'}"] += 1
      assert not self.sentinel.exists(), f"{what} has run code"
    return outcomes


def main():
  number = int(sys.argv[1]) if len(sys.argv) > 1 else 2000
  seed = int(sys.argv[2]) if len(sys.argv) > 2 else 0
  with tempfile.TemporaryDirectory() as folder:
    fuzz = Fuzz(folder, seed)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcomes = fuzz.run(number)
  for name, count in sorted(outcomes.items()):
    print(f"{count:5} {name}")
  grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
  refused = sum(count for name, count in outcomes.items() if name.endswith("refused"))
  print(f"{number} files, {refused} refused; memory grew by {grown:.0f} MiB; no code was run")


if __name__ == "__main__":
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  main()
