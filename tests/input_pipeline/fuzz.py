"""Feeds damaged records to the real path, in a process of its own, and prints what became of them.

    python -m tests.input_pipeline.fuzz 10000 0 FOLDER [IMAGES]

reads 10,000 damaged records, drawn from seed 0, one by one; then batches of the loader from shards
of as many records in FOLDER, of which every other one is damaged. IMAGES is a folder of files to be
damaged besides those made here. Prints one line of JSON. Anything but a clean end is a failure.
"""

import contextlib
import faulthandler
import io
import json
import os
import pathlib
import resource
import sys

from PIL import Image
from absl import logging
from array_record.python import array_record_module
from input_pipeline import image
from input_pipeline import loader
from input_pipeline import records
from input_pipeline import sources
from input_pipeline.errors import BadRecordError
import numpy as np
import psutil

from tests.input_pipeline.conftest import data_config
from tests.input_pipeline.conftest import encoded
from tests.input_pipeline.conftest import picture
from tests.input_pipeline.conftest import rotated

_CLASSES = 10
_BATCH = 16
_HEADER = 700  # bytes: where damage does more than change pixels
_SHARDS = 4


def corpus(folder: str | None) -> list[bytes]:
  """Returns intact files of every kind that is read, with those of a folder."""
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
  """Returns `data` with flipped bits, a lost, doubled or overwritten piece, a cut end, or garbage."""
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
  """Returns a serialized record whose image, or which itself, is damaged."""
  data = files[rng.integers(len(files))]
  label = int(rng.integers(_CLASSES))
  if rng.random() < 0.6:
    return records.encode(records.Record(damaged(data, rng), label, "damaged.JPEG"))
  return damaged(records.encode(records.Record(data, label, "damaged\n.JPEG")), rng)


def read(serialized: bytes, rng: np.random.Generator) -> str:
  """Takes one record all the way to pixels; returns where it ended: example, image or pixels."""
  try:
    record = records.decode(serialized, "?")
  except BadRecordError:
    return "example"
  try:
    rgb = image.decode(record.image)
  except BadRecordError:
    return "image"
  view = image.train_view(rgb, rng, 224, (0.08, 1.0), (3 / 4, 4 / 3), flip=True)
  crop = image.eval_crop(rgb, 256, 224)
  assert view.shape == crop.shape == (224, 224, 3)
  assert view.dtype == crop.dtype == np.uint8
  return "pixels"


def write_shards(folder: str, files: list[bytes], count: int, seed: int) -> list[bool]:
  """Writes `count` records of which every other one is damaged, a few on the disk; returns which are bad."""
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
        noise = encoded(rng.integers(0, 256, (24, 32, 3), np.uint8))  # no two have a piece in common
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


def read_batches(folder: str, bad: list[bool]) -> int:
  """Reads one epoch of training and an evaluation; returns how many rows were replaced, the same."""
  data = data_config(folder, max_bad_fraction=1.0)
  source = sources.open_source(data, "train", _CLASSES)
  steps = len(bad) // _BATCH
  assert steps * _BATCH == len(bad)
  batches = loader.train_batches(source, data, seed=0, global_batch_size=_BATCH)
  with contextlib.closing(batches):
    replaced = sum(int(next(batches)["bad"].sum()) for _ in range(steps))
  assert replaced == batches.bad_records == sum(bad), (replaced, batches.bad_records, sum(bad))
  with contextlib.closing(loader.eval_batches(source, data, batch_size=_BATCH)) as batches:
    found = list(batches)
  flags, images = (np.concatenate([b[key] for b in found]) for key in ("bad", "image"))
  assert flags.tolist() == bad
  assert (images[flags] == 128).all()
  assert (images[~flags].std(axis=(1, 2, 3)) > 0).mean() > 0.9
  return replaced


def main(count: int, seed: int, folder: str, images: str | None = None) -> dict[str, int]:
  """Does both; returns the counts and the memory in MiB."""
  faulthandler.enable()
  logging.set_verbosity(logging.ERROR)  # not the warning for each bad record
  files = corpus(images)
  process = psutil.Process()
  result = {"example": 0, "image": 0, "pixels": 0}
  for i in range(count):
    if i == count // 5:
      before = process.memory_info().rss
    rng = np.random.default_rng([seed, i])
    result[read(damaged_record(files, rng), rng)] += 1
  result["growth"] = process.memory_info().rss - before >> 20
  bad = write_shards(folder, files, count, seed + 1)
  result["replaced"] = read_batches(folder, bad)
  result["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
  return result


if __name__ == "__main__":
  print(json.dumps(main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])))
