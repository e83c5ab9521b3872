"""Compare three ways to read images from a bucket that takes 30 ms per request.

    python -m tests.input_pipeline.bucket_bench [--images FOLDER] [--records N] [--delay SECONDS]

A web server in its own process stands for the bucket. Ours and array_record's own reader of gs://
read the same ArrayRecord shards; `datasets` streams the same images as parquet. All decode the same
crops by the same function, so only the reading differs. Ours reads three epochs, because what it
reads ahead of the last batch would weigh too much in one; array_record reads an eighth of an epoch,
because it is slow. Without --images, pictures of 110 kB are generated.
"""

import argparse
import contextlib
import itertools
import os
import pathlib
import subprocess
import sys
import tempfile
import time

import numpy as np
import requests

from configs import base
from input_pipeline import image, loader, records, sources
from input_pipeline.prepare import __main__ as prepare

_BATCH = 64


def make_data(folder: pathlib.Path, images: list[bytes], count: int) -> None:
  """Write shards and a parquet file of `count` records each."""
  import datasets

  examples = [records.Record(images[i % len(images)], i % 10, f"{i}.JPEG") for i in range(count)]
  for label in range(10):
    (folder / "images" / "train" / str(label)).mkdir(parents=True)
  for i, example in enumerate(examples):
    (folder / "images" / "train" / str(example.label) / f"{i:06d}.jpg").write_bytes(example.image)
  assert (
    prepare.main(
      ["--out", str(folder / "served"), "--folder", str(folder / "images"), "--shards", "4"]
    )
    == 0
  )
  rows = {
    "image": [{"bytes": e.image, "path": e.name} for e in examples],
    "label": [e.label for e in examples],
  }
  features = datasets.Features(
    {"image": datasets.Image(decode=False), "label": datasets.Value("int64")}
  )
  datasets.Dataset.from_dict(rows, features).to_parquet(
    folder / "served" / "train.parquet", batch_size=100
  )


def decode(data: bytes, number: int) -> np.ndarray:
  return image.train_view(data, np.random.default_rng(number), 224, (0.08, 1.0), (0.75, 1.33), True)


def ours(url: str, count: int) -> None:
  data = base.get_config().data
  data.update(
    path="gs://bucket", threads=2, workers=0, stream_lanes=4, stream_window=2, stream_ahead_steps=2
  )
  source = sources.open_source(data, "train", 10)
  with contextlib.closing(
    loader.train_batches(source, data, seed=0, global_batch_size=_BATCH)
  ) as batches:
    for _ in range(count // _BATCH):
      next(batches)


def array_record(url: str, count: int) -> None:
  """With Grain's default of 16 threads."""
  from array_record.python import array_record_data_source
  import grain

  names = [f"gs://bucket/{records.shard_name('train', i, 4)}" for i in range(4)]
  source = array_record_data_source.ArrayRecordDataSource(names)

  def view(data):
    return decode(records.decode(data, "").image, 0)

  for _ in itertools.islice(
    grain.MapDataset.source(source).shuffle(0).map(view).to_iter_dataset(), count
  ):
    pass


def hugging_face(url: str, count: int) -> None:
  import datasets

  stream = datasets.load_dataset(
    "parquet", data_files=f"{url}/train.parquet", split="train", streaming=True
  )
  stream = stream.cast_column("image", datasets.Image(decode=False)).shuffle(0, buffer_size=512)
  for number, row in enumerate(itertools.islice(stream, count)):
    decode(row["image"]["bytes"], number)


def main() -> None:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
  )
  parser.add_argument("--images", type=pathlib.Path)
  parser.add_argument("--records", type=int, default=1920)
  parser.add_argument("--delay", type=float, default=0.03)
  parser.add_argument("--run", help=argparse.SUPPRESS)
  parser.add_argument("--url", help=argparse.SUPPRESS)
  args = parser.parse_args()
  if args.run:
    globals()[args.run](args.url, args.records)
    return
  if args.images:
    images = [file.read_bytes() for file in sorted(args.images.rglob("*.JPEG"))]
  else:
    rng = np.random.default_rng(0)
    import simplejpeg

    images = [
      simplejpeg.encode_jpeg(rng.integers(0, 256, (375, 500, 3), np.uint8) // 3, 75)
      for _ in range(50)
    ]
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    make_data(folder, images, args.records)
    server = subprocess.Popen(
      [
        sys.executable,
        "-m",
        "tests.input_pipeline.web",
        str(folder / "served"),
        f"--delay={args.delay}",
      ],
      stdout=subprocess.PIPE,
      text=True,
    )
    url = server.stdout.readline().strip()
    used = sum(len(images[i % len(images)]) for i in range(args.records))
    print(
      f"{args.records} images, {used / 1e6:.0f} MB, {1000 * args.delay:.0f} ms per request, "
      f"{os.cpu_count()} cores"
    )
    print(f"{'':16} images/s   requests   images/request   bytes read/used")
    try:
      for name, count in (
        ("ours", 3 * args.records),
        ("hugging_face", args.records),
        ("array_record", args.records // 8),
      ):
        before, start = requests.get(f"{url}/counts").json(), time.monotonic()
        subprocess.run(
          [
            sys.executable,
            "-m",
            "tests.input_pipeline.bucket_bench",
            f"--run={name}",
            f"--url={url}",
            f"--records={count}",
          ],
          check=True,
          timeout=1200,
          stderr=subprocess.DEVNULL,
          env=os.environ
          | {
            "TENSORSTORE_GCS_HTTP_URL": url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "x",
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": url,
            "JAX_PLATFORMS": "cpu",
          },
        )
        seconds, after = time.monotonic() - start, requests.get(f"{url}/counts").json()
        sent, read = (
          after["requests"] - before.get("requests", 0),
          after["bytes"] - before.get("bytes", 0),
        )
        print(
          f"{name:16} {count / seconds:8.0f}   {sent:8}   {count / sent:14.1f}   "
          f"{read / (used * count / args.records):15.2f}",
          flush=True,
        )
    finally:
      server.kill()


if __name__ == "__main__":
  main()
