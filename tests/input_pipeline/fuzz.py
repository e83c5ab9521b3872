"""Feed damaged records to the real input path, in its own process, and print the results.

    python -m tests.input_pipeline.fuzz 10000 0 FOLDER [IMAGES]

evaluates on 10,000 damaged records, drawn from seed 0; then trains and evaluates on shards in
FOLDER of 20,000 records, every other one damaged, by random access and as a stream. IMAGES is a
folder of more files to be damaged. Prints one line of JSON; anything but a clean exit is a failure.
"""

import contextlib
import ctypes
import faulthandler
import gc
import io
import json
import os
import pathlib
import re
import resource
import sys

from absl import logging
from array_record.python import array_record_module
import numpy as np
from PIL import Image
import psutil

from configs import base
from input_pipeline import image, loader, records, sources
from input_pipeline.errors import BadRecordError
from tests.input_pipeline.conftest import encoded, picture, rotated

_CLASSES = 10
_BATCH = 16
_HEADER = 700  # bytes: where damage does more than change pixels
_SHARDS = 4


def corpus(folder: str | None) -> list[bytes]:
  """Return intact files of every kind that is read, with those of a folder."""
  smooth = picture(0, 120, 160)
  noise = np.random.default_rng(0).integers(-40, 40, smooth.shape)
  pixels = np.clip(smooth + noise, 0, 255).astype(np.uint8)
  deep = io.BytesIO()
  Image.fromarray(pixels[:, :, 0].astype(np.uint16) * 257).save(deep, "PNG")
  profile = encoded(pixels, icc_profile=b"profile" * 100, comment=b"comment")
  files = [
    encoded(pixels),
    encoded(pixels, subsampling=0),
    encoded(pixels, mode="L"),
    encoded(pixels, progressive=True),
    encoded(pixels, restart_marker_rows=1),
    encoded(pixels, mode="CMYK"),
    rotated(pixels),
    profile,
    encoded(pixels, "PNG"),
    encoded(pixels, "PNG", "P"),
    encoded(pixels, "PNG", "RGBA"),
    deep.getvalue(),
    encoded(pixels, "GIF"),
    encoded(pixels, "BMP"),
  ]
  if folder:
    paths = sorted(p for p in pathlib.Path(folder).rglob("*") if p.is_file())
    files += [path.read_bytes() for path in paths]
  return files


def damaged(data: bytes, rng: np.random.Generator) -> bytes:
  """Return `data` with flipped bits, a cut end, a lost, doubled or wrong piece, or garbage."""
  out = bytearray(data)
  how = rng.integers(8)
  at, length = int(rng.integers(len(out))), int(rng.integers(1, 300))
  if how < 2:  # bits, anywhere or in the header
    for _ in range(rng.integers(1, 12)):
      out[rng.integers(min(len(out), _HEADER) if how else len(out))] ^= 1 << int(rng.integers(8))
  elif how == 2:
    del out[at:]
  elif how == 3:
    del out[at : at + length]
  elif how == 4:
    out[at:at] = out[at : at + length]
  elif how == 5:
    out[at : at + length] = rng.bytes(length)
  elif how == 6:
    out = bytearray(rng.bytes(rng.integers(5000)))
  else:
    out = bytearray(rng.choice([0, 10, 1000])) + out[: rng.choice([0, 3, at])]
  return bytes(out)


def damaged_record(files: list[bytes], rng: np.random.Generator) -> bytes:
  """Return a serialized record whose image, or which itself, is damaged."""
  data = files[rng.integers(len(files))]
  label = int(rng.integers(_CLASSES))
  if rng.random() < 0.6:
    return records.encode(records.Record(damaged(data, rng), label, "damaged.JPEG"))
  return damaged(records.encode(records.Record(data, label, "damaged\n.JPEG")), rng)


class Damaged(sources.Source):
  """A source of damaged records and nothing else; counts those that are not even records."""

  class_names = tuple(str(i) for i in range(_CLASSES))
  num_classes = _CLASSES

  def __init__(self, files: list[bytes], count: int, seed: int):
    self.no_records = 0
    self._files, self._count, self._seed = files, count, seed

  def __len__(self) -> int:
    return self._count

  def __getitem__(self, index: int) -> records.Record:
    rng = np.random.default_rng([self._seed, index])
    try:
      return records.decode(damaged_record(self._files, rng), f"record {index}")
    except BadRecordError:
      self.no_records += 1
      raise


def write_shards(folder: str, files: list[bytes], count: int, seed: int) -> list[bool]:
  """Write records, every other one damaged and a few on the disk; return which are bad."""
  bad = []
  shards = []
  for number, indices in enumerate(np.array_split(np.arange(count), _SHARDS)):
    name = records.shard_name("train", number, _SHARDS)
    path = os.path.join(folder, name)
    writer = array_record_module.ArrayRecordWriter(path, records.WRITER_OPTIONS)
    hit = []
    for i in indices.tolist():
      rng = np.random.default_rng([seed, i])
      if i % 2:
        serialized = damaged_record(files, rng)
        try:
          record = records.decode(serialized, "?")
          image.decode(record.image)
          bad.append(not 0 <= record.label < _CLASSES)
        except BadRecordError:
          bad.append(True)
      else:
        # Noise: no two of these have a piece in common.
        noise = encoded(rng.integers(0, 256, (24, 32, 3), np.uint8))
        good = records.Record(noise, i % _CLASSES, f"{i}.JPEG")
        serialized = records.encode(good)
        bad.append(i % 50 == 0)
        if bad[-1]:
          hit.append(good.image)
      writer.write(serialized)
    writer.close()
    data = bytearray(pathlib.Path(path).read_bytes())
    for file in hit:
      # A piece of the pixels; headers are the same in all files, and the format cuts some pieces.
      pieces = (data.find(file[k : k + 32]) for k in range(_HEADER, len(file) - 32, 32))
      data[next(at for at in pieces if at >= 0)] ^= 1
    pathlib.Path(path).write_bytes(data)
    shards.append({"file": name, "examples": len(indices), "bytes": len(data), "sha256": ""})
  manifest = {
    "format_version": records.FORMAT_VERSION,
    "classes": [str(i) for i in range(_CLASSES)],
    "splits": {"train": {"shards": shards}},
  }
  records.write_json(os.path.join(folder, records.MANIFEST), manifest)
  return bad


def memory_in_use() -> int:
  """Return the bytes of this process, without those that are free but not yet given back."""
  gc.collect()
  if sys.platform == "linux":
    ctypes.CDLL(None).malloc_trim(0)
  return psutil.Process().memory_info().rss


def peak_memory() -> int:
  """Return the most memory that this program has had, in MiB.

  What getrusage has on Linux is that of the process that started it as well.
  """
  status = pathlib.Path("/proc/self/status")
  if status.exists():
    return int(re.findall(r"VmHWM:\s*(\d+) kB", status.read_text())[0]) >> 10
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def read_all(
  batches: loader.BatchIterator, steps: int, growth: list[int]
) -> list[tuple[bool, bool]]:
  """Return which rows were bad and which are grey; append the growth of memory, in MiB."""
  flags = []
  with contextlib.closing(batches):
    for step in range(steps):
      if step == steps // 5:
        before = memory_in_use()
      batch = next(batches)
      plain = (batch["image"] == 128).all(axis=(1, 2, 3))
      flags += zip(batch["bad"].tolist(), plain.tolist(), strict=True)
  growth.append(memory_in_use() - before >> 20)
  assert sum(bad for bad, _ in flags) == batches.bad_records
  return flags


def main(count: int, seed: int, folder: str, images: str | None = None) -> dict[str, int]:
  """Read them all; return the counts and the memory in MiB."""
  faulthandler.enable()
  logging.set_verbosity(logging.ERROR)  # not the warning for each bad record
  files, growth = corpus(images), []
  data = base.get_config().data
  data.update(path=folder, max_bad_fraction=1.0, stream_lanes=4)
  steps = count // _BATCH
  assert steps * _BATCH == count

  source = Damaged(files, count, seed)
  flags = read_all(loader.eval_batches(source, data, batch_size=_BATCH), steps, growth)
  assert all(plain for bad, plain in flags if bad)
  result = {
    "no record": source.no_records,
    "no image": sum(bad for bad, _ in flags) - source.no_records,
    "image": sum(not bad for bad, _ in flags),
  }

  bad = write_shards(folder, files, 2 * count, seed + 1)
  for data.kind in ("array_record", "stream"):
    source = sources.open_source(data, "train", _CLASSES)
    batches = loader.train_batches(source, data, seed=0, global_batch_size=_BATCH)
    flags = read_all(batches, 2 * steps, growth)
    assert sum(was_bad for was_bad, _ in flags) == sum(bad)  # one epoch
    assert sum(plain for _, plain in flags) < count / 50  # replaced by an image, not left grey
    batches = loader.eval_batches(source, data, batch_size=_BATCH)
    flags = read_all(batches, 2 * steps, growth)
    assert [was_bad for was_bad, _ in flags] == bad
  result["replaced"] = sum(bad)
  result["growth"] = max(growth)
  result["peak"] = peak_memory()
  return result


if __name__ == "__main__":
  print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])))
