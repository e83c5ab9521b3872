"""One shard of `prepare`: read its images, inspect each, write all or nothing."""

import collections
from collections.abc import Callable
import hashlib
import io
import os
from typing import Any, NamedTuple

from array_record.python import array_record_module
import numpy as np
from PIL import Image
import simplejpeg

from input_pipeline import image, records
from input_pipeline.errors import BadRecordError, DataError
from input_pipeline.prepare import output as outputs
from input_pipeline.prepare.archives import Images

JOURNAL = ".journal"  # folder in the output: one file per finished shard, and the plan
UNDECODABLE = "undecodable"
# What may be odd about an image, and what is done about it.
KINDS = {
  "greyscale": "kept, read as RGB",
  "cmyk": "kept, converted to RGB when it is read",
  "not_what_its_name_says": "kept, for example a PNG named .JPEG",
  "exif_rotated": "kept, the rotation is ignored",
  "damaged_but_decodable": "kept, one decoder fails and another reads all of it",
  UNDECODABLE: "LEFT OUT",
}
_EXIF_ORIENTATION = 0x0112
_QUALITY = 95  # of --max-size, without chroma subsampling
_JPEG = ("JPEG", "MPO")  # the latter has a second picture appended, as phones write it
_FORMATS = {
  **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif"), _JPEG),
  ".png": ("PNG",),
  ".gif": ("GIF",),
  ".bmp": ("BMP",),
  ".webp": ("WEBP",),
}


class Task(NamedTuple):
  """One shard to make: OUT/FILE of `images`, shrunk to `max_size` pixels (0: unchanged)."""

  out: str
  file: str
  images: Images
  max_size: int


def make_shard(task: Task, report: Callable[[int], None]) -> tuple[dict[str, Any], bool]:
  """Make one shard, unless it exists and is intact.

  Args:
    task: what to make.
    report: called with the number of images done since the last call.

  Returns:
    Its journal: file, examples, bytes, sha256, class_counts ({label: count}), reencoded
    (count), problems ({kind: [names]}), reasons ({name: why it is undecodable}), lost_classes
    (labels of these); and whether the shard existed already.

  Raises:
    DataError: the images cannot be read or the disk cannot be written.
  """
  output = outputs.open_output(task.out)
  journal = f"{JOURNAL}/{task.file}.json"
  done = output.read_json(journal)
  if done is not None and output.holds(task.file, done):
    report(len(task.images))
    return done, True
  temporary = os.path.join(output.scratch, f".{task.file}.{os.getpid()}.tmp")
  try:
    entry = _write(temporary, task, report)
    with open(temporary, "rb") as f:
      entry["bytes"] = os.fstat(f.fileno()).st_size
      entry["sha256"] = hashlib.file_digest(f, "sha256").hexdigest()
    output.put(temporary, task.file, entry)
    output.write_json(journal, entry)
    return entry, False
  except (OSError, RuntimeError) as e:  # array_record raises the latter for errors of the system
    raise DataError(
      f"{os.path.join(task.out, task.file)} cannot be written ({e}); fix that and run the same "
      "command again, finished shards are kept."
    ) from e


def _write(path: str, task: Task, report: Callable[[int], None]) -> dict[str, Any]:
  """Write the records; return the journal without bytes and sha256."""
  counts: collections.Counter[int] = collections.Counter()
  problems: dict[str, list[str]] = collections.defaultdict(list)
  reasons: dict[str, str] = {}
  lost: set[int] = set()
  reencoded = 0
  writer = array_record_module.ArrayRecordWriter(path, records.WRITER_OPTIONS)
  try:
    for data, label, name in task.images:
      rgb, kinds, reason = inspect(data, name)
      for kind in kinds:
        problems[kind].append(name)
      if rgb is None:
        reasons[name] = reason
        lost.add(label)
      else:
        if task.max_size and min(rgb.shape[:2]) > task.max_size:
          data = shrink(rgb, task.max_size)
          reencoded += 1
        writer.write(records.encode(records.Record(data, label, name)))
        counts[label] += 1
      report(1)
  finally:
    writer.close()
  return {
    "file": task.file,
    "examples": counts.total(),
    "class_counts": {str(k): counts[k] for k in sorted(counts)},
    "reencoded": reencoded,
    "problems": dict(problems),
    "reasons": reasons,
    "lost_classes": [str(label) for label in sorted(lost)],
  }


def inspect(data: bytes, name: str) -> tuple[np.ndarray | None, list[str], str]:
  """Decode an image and find what is odd about it.

  Args:
    data: the file.
    name: its name.

  Returns:
    uint8 RGB [height, width, 3], or None if it is undecodable; which of KINDS it is; and why it is
    undecodable, if so.
  """
  kinds = []
  rgb = image.decode_plain_jpeg(data)
  plain = rgb is not None
  if not plain:
    try:
      rgb = image.decode_with_pillow(data)
    except BadRecordError as e:
      return None, [UNDECODABLE], str(e)
  try:
    with Image.open(io.BytesIO(data)) as opened:  # reads the header only
      found, mode, rotation = opened.format, opened.mode, opened.getexif().get(_EXIF_ORIENTATION, 1)
  except MemoryError:
    raise
  except Exception:  # as in image.py: the pixels are fine, but Pillow fails at the rest
    return rgb, ["damaged_but_decodable"], ""
  expected = _FORMATS.get(os.path.splitext(name)[1].lower(), (found,))
  if found not in expected:
    kinds.append("not_what_its_name_says")
  elif not plain and found in _JPEG and mode != "CMYK":
    kinds.append("damaged_but_decodable")
  if mode in ("1", "L", "LA", "I", "I;16"):
    kinds.append("greyscale")
  elif mode == "CMYK":
    kinds.append("cmyk")
  if rotation in range(2, 9):
    kinds.append("exif_rotated")
  return rgb, kinds, ""


def shrink(rgb: np.ndarray, max_size: int) -> bytes:
  """Shrink uint8 [height, width, 3] to a shorter side of `max_size`; return a JPEG."""
  height, width = rgb.shape[:2]
  scale = max_size / min(height, width)
  size = (max(1, round(width * scale)), max(1, round(height * scale)))
  small = np.asarray(Image.fromarray(rgb).resize(size, Image.Resampling.BICUBIC))
  return simplejpeg.encode_jpeg(small, quality=_QUALITY, colorspace="RGB", colorsubsampling="444")
