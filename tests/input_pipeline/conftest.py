"""Small images and folders of them, made on the spot."""

import hashlib
import io
import json
import os
import pathlib

from array_record.python import array_record_module
import ml_collections
import numpy as np
from PIL import Image
import pytest

from configs import base
from input_pipeline import records, sources
from input_pipeline.prepare import __main__ as prepare

_SHARED = pathlib.Path(__file__).parents[3] / "shared" / "data"


def picture(seed: int, height: int = 40, width: int = 50) -> np.ndarray:
  """Return uint8 [height, width, 3]: smooth, so that JPEG keeps it, another for each seed."""
  rng = np.random.default_rng(seed)
  coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
  return np.asarray(coarse.resize((width, height), Image.Resampling.BILINEAR))


def encoded(pixels: np.ndarray, kind: str = "JPEG", mode: str = "RGB", **options) -> bytes:
  """Return the file that Pillow makes of uint8 [height, width, 3]."""
  file = io.BytesIO()
  Image.fromarray(pixels).convert(mode).save(file, kind, **options)
  return file.getvalue()


def rotated(pixels: np.ndarray) -> bytes:
  """Return a JPEG whose EXIF asks for a rotation by 90 degrees."""
  exif = Image.Exif()
  exif[0x0112] = 6
  return encoded(pixels, exif=exif)


def make_folder(root: pathlib.Path, counts: dict[str, dict[str, int]]) -> pathlib.Path:
  """Make ROOT/SPLIT/CLASS/{i}.JPEG for {split: {class: count}}; no two images are equal."""
  seed = 0
  for split, classes in counts.items():
    for name, count in classes.items():
      (root / split / name).mkdir(parents=True)
      for i in range(count):
        (root / split / name / f"{name}_{i:03d}.JPEG").write_bytes(encoded(picture(seed)))
        seed += 1
  return root


def write_shard(
  path: pathlib.Path, examples: list[records.Record], options: str = records.WRITER_OPTIONS
) -> None:
  """Write records to an ArrayRecord file."""
  writer = array_record_module.ArrayRecordWriter(str(path), options)
  for example in examples:
    writer.write(records.encode(example))
  writer.close()


def tfds_folder(root, labels=("x", "y"), **info):
  """Make what TFDS writes for a dataset of 5 images in 2 shards, and one of 2 for validation.

  Names, JSON and the options of the writer, with which records are compressed, are those that
  tensorflow-datasets 4.9.10 was seen to write for a builder of the features of imagenet2012.
  """
  root.mkdir(parents=True)
  shards = {"train": [3, 2], "validation": [2]}
  seed = 0
  for split, lengths in shards.items():
    for i, length in enumerate(lengths):
      name = f"imagenet2012-{split}.array_record-{i:05d}-of-{len(lengths):05d}"
      images = [
        records.Record(encoded(picture(s)), s % 2, f"{s}.JPEG") for s in range(seed, seed + length)
      ]
      write_shard(root / name, images, "group_size:1")
      seed += length
  splits = [
    {
      "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
      "name": split,
      "numBytes": "1234",
      "shardLengths": [str(n) for n in lengths],
    }
    for split, lengths in shards.items()
  ]
  info = {
    "fileFormat": "array_record",
    "moduleName": "tensorflow_datasets.datasets.imagenet2012.imagenet2012_dataset_builder",
    "name": "imagenet2012",
    "splits": splits,
    "supervisedKeys": {"tuple": {"items": [{"featureKey": "image"}, {"featureKey": "label"}]}},
    "version": "5.1.0",
  } | info
  (root / "dataset_info.json").write_text(json.dumps(info))
  kinds = "tensorflow_datasets.core.features"
  image = {"dtype": "uint8", "encodingFormat": "jpeg", "shape": {"dimensions": ["-1", "-1", "3"]}}
  features = {
    "file_name": {"pythonClassName": f"{kinds}.text_feature.Text", "text": {}},
    "image": {"image": image, "pythonClassName": f"{kinds}.image_feature.Image"},
    "label": {
      "classLabel": {"numClasses": "2"},
      "pythonClassName": f"{kinds}.class_label_feature.ClassLabel",
    },
  }
  (root / "features.json").write_text(json.dumps({"featuresDict": {"features": features}}))
  if labels:
    (root / "label.labels.txt").write_text("".join(f"{name}\n" for name in labels))
  return root


def run_prepare(*argv) -> int:
  """Run prepare in this process, by default with one worker; return its exit code."""
  argv = [str(a) for a in argv]
  return prepare.main(argv if "--workers" in argv else [*argv, "--workers", "1"])


def data_config(path, **fields) -> ml_collections.ConfigDict:
  """Return config.data for small images."""
  data = base.get_config().data
  sizes = {"image_size": 16, "eval_image_size": 16, "eval_resize": 20}
  data.update({"path": str(path), "workers": 0, "threads": 2, **sizes, **fields})
  return data


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
  """Two splits of three classes: 23 and 11 images."""
  counts = {"train": {"a": 8, "b": 8, "c": 7}, "val": {"a": 4, "b": 4, "c": 3}}
  return make_folder(tmp_path_factory.mktemp("folder"), counts)


@pytest.fixture(scope="session")
def shards(folder, tmp_path_factory):
  """The same as ArrayRecord: three shards of train, one of val."""
  out = tmp_path_factory.mktemp("shards") / "out"
  assert run_prepare("--out", out, "--folder", folder, "--shards", 3) == 0
  return out


@pytest.fixture(scope="session")
def originals():
  """The folder of 200 odd originals of ImageNet, which are not part of the repository."""
  path = pathlib.Path(os.environ.get("IMAGENET_SAMPLE", _SHARED / "imagenet-sample"))
  if not path.is_dir():
    pytest.skip(f"no ImageNet originals in {path}; set IMAGENET_SAMPLE")
  return path


def manifest_of(out):
  return json.loads((out / records.MANIFEST).read_text())


def contents(out, split="train"):
  """Return the records of a split by name."""
  classes = manifest_of(out)["classes"]
  source = sources.open_source(data_config(out, allow="one_class"), split, len(classes))
  found = [source[i] for i in range(len(source))]
  assert len({r.name for r in found}) == len(found)
  return {r.name: r for r in found}


def hashes(out):
  """Return the hash of each visible file of an output folder."""
  files = [f for f in out.iterdir() if f.is_file()]
  assert not [f for f in files if f.name.endswith(".tmp")]
  return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def failure(capsys, *argv):
  """Return the one sentence with which prepare fails."""
  capsys.readouterr()
  assert run_prepare(*argv) == 1
  lines = capsys.readouterr().err.strip().splitlines()
  assert len(lines) == 1
  assert lines[0].startswith("prepare: ")
  return lines[0]
