"""Parquet on the hub, on a web server and in a bucket, and shards made of it; local servers."""

import json
import os
import signal
import subprocess
import sys
import time
from urllib import parse

import pytest
import requests

from input_pipeline import records
from input_pipeline.remote import fsspec as remote
from tests.input_pipeline import fake_hub
from tests.input_pipeline.conftest import contents, failure, hashes, manifest_of, run_prepare
from tests.input_pipeline.test_hf import (
  assert_same,
  parquet,  # noqa: F401 a fixture
  train,
  write_parquet,
)
from tests.trainer.bucket_server import serving
from tests.trainer.shared import free_port

pytest.importorskip("datasets", reason="the extra [hf] is not installed")

TOKEN = "hf_opensesameopensesame"
ROW_GROUPS = 13
# For each data set and token in argv prints the labels of two epochs, or why there are none.
READ = """
import os, sys
from absl import logging
from input_pipeline import errors, loader, sources
from tests.input_pipeline import test_hf
logging.set_verbosity(logging.INFO)
for path, token in zip(sys.argv[1::2], sys.argv[2::2]):
  os.environ["HF_TOKEN"] = token
  try:
    data = test_hf.config(path, stream_lanes=1)
    source = sources.open_source(data, "train", 61)
    batches = loader.train_batches(source, data, seed=0, global_batch_size=61)
    print("labels", sorted(test_hf.labels([next(batches), next(batches)])))
    batches.close()
  except errors.DataError as e:
    print("refused", e)
"""
LABELS = f"labels {sorted(2 * list(range(61)))}"


@pytest.fixture(scope="module")
def hub(parquet, tmp_path_factory):  # noqa: F811
  """Start the fake hub; return its folder and its address."""
  root = tmp_path_factory.mktemp("hub")
  write_parquet(root / "owner" / "pictures")
  url = f"http://127.0.0.1:{free_port()}"
  process = subprocess.Popen(
    [sys.executable, fake_hub.__file__, url.split(":")[2], root, TOKEN, root / "log"]
  )
  while True:
    try:
      requests.get(f"{url}/files/", timeout=10)
      break
    except requests.ConnectionError:
      assert process.poll() is None
      time.sleep(0.05)
  yield root, url
  process.kill()
  process.wait()


def read_in_process(tmp_path, environment, *paths_and_tokens):
  result = subprocess.run(
    [sys.executable, "-c", READ, *paths_and_tokens],
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    env=os.environ
    | {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1"}
    | environment,
  )
  assert result.returncode == 0, result.stdout
  assert TOKEN not in result.stdout and "sesame" not in result.stdout, result.stdout
  return result.stdout


def ranges(root):
  return [
    line
    for line in (root / "log").read_text().splitlines()
    if "/signed/" in line and "bytes=" in line
  ]


def test_the_hub(hub, tmp_path):
  root, url = hub
  (root / "log").write_text("")
  (root / "fail").write_text("1")
  log = read_in_process(
    tmp_path,
    {"HF_ENDPOINT": url},
    *("hf:owner/pictures", "hf_wrongwrongwrong"),
    *("hf:owner/nothing", TOKEN),
    *("hf:owner/pictures", TOKEN),
  )
  assert LABELS in log
  assert "HTTP Request" not in log and "wrongwrong" not in log
  refused = [line for line in log.splitlines() if line.startswith("refused")]
  assert len(refused) == 2
  for name, line in zip(("pictures", "nothing"), refused):
    assert f"hf:owner/{name} cannot be opened" in line and "HF_TOKEN" in line
  assert (root / "fail").read_text() == "0"
  asked = ranges(root)
  assert len(set(asked)) == 4 + ROW_GROUPS  # the footers, and a request for each row group
  assert len(asked) <= 1 + 4 + 6 * ROW_GROUPS  # one failed; up to four epochs are read ahead


def test_a_web_server_gives_the_batches_of_the_disk(hub, parquet):  # noqa: F811
  root, url = hub
  (root / "fail").write_text("3")
  assert_same(train(f"hf:{url}/files/owner/pictures", 12)[0], train(parquet, 12)[0])
  assert (root / "fail").read_text() == "0"


def test_what_a_message_may_hold(monkeypatch):
  monkeypatch.setenv("HF_TOKEN", "notastandardtoken")
  error = OSError(
    "GET https://cdn/x.parquet?Signature=abc&Key=d with notastandardtoken or hf_abcdef failed."
    "\nmore"
  )
  assert remote.said(error) == "OSError: GET https://cdn/x.parquet with *** or *** failed"


def test_shards_of_a_stream(parquet, tmp_path, capsys):  # noqa: F811
  flags = ("--from", f"hf:{parquet}", "--shards", 3)
  assert run_prepare("--out", tmp_path / "one", *flags) == 0
  made = contents(tmp_path / "one")
  assert {r.label for r in made.values()} == set(range(61))
  assert all(name == f"train_{r.label:03d}.JPEG" for name, r in made.items())
  assert list(made) != sorted(made)
  assert len(contents(tmp_path / "one", "val")) == 26
  manifest = manifest_of(tmp_path / "one")
  assert manifest["classes"][:2] == ["class 0", "class 1"]
  assert manifest["source"] == {"kind": "hf", "name": str(parquet)}
  assert run_prepare("--out", tmp_path / "two", *flags, "--workers", 2) == 0
  assert hashes(tmp_path / "two") == hashes(tmp_path / "one")
  assert run_prepare("--out", tmp_path / "two", *flags) == 0
  assert "kept 4 finished shards" in capsys.readouterr().out
  assert "13 row groups of train" in failure(
    capsys, "--out", tmp_path / "x", "--from", f"hf:{parquet}", "--shards", 14
  )
  assert "parquet begins with hf:, as hf:" in failure(
    capsys, "--out", tmp_path / "x", "--from", parquet
  )
  assert "no split 'test'" in failure(
    capsys, "--out", tmp_path / "x", *flags, "--val-split", "test"
  )


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
  with serving(tmp_path_factory.mktemp("bucket")) as server:
    yield server


def objects(server, prefix):
  """Return the content of the objects of the bucket by name."""
  url = server.environment["STORAGE_EMULATOR_HOST"]
  items = (
    requests.get(f"{url}/storage/v1/b/bucket/o", {"prefix": prefix}, timeout=10)
    .json()
    .get("items", [])
  )
  return {
    item["name"].removeprefix(prefix): requests.get(
      f"{url}/download/storage/v1/b/bucket/o/{parse.quote(item['name'], '')}?alt=media", timeout=10
    ).content
    for item in items
  }


def into_bucket(server, scratch, out, *flags, bucket="bucket"):
  scratch.mkdir(exist_ok=True)
  return subprocess.Popen(
    [
      sys.executable,
      "-m",
      "input_pipeline.prepare",
      "--out",
      f"gs://{bucket}/{out}",
      *map(str, flags),
    ],
    env=os.environ | server.environment | {"TMPDIR": str(scratch)},
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def test_into_a_bucket_killed_and_resumed(parquet, bucket, tmp_path):  # noqa: F811
  flags = ("--from", f"hf:{parquet}", "--shards", 12)
  assert run_prepare("--out", tmp_path / "local", *flags) == 0
  with into_bucket(bucket, tmp_path / "scratch", "out", *flags, "--workers", "1") as process:
    while not [name for name in objects(bucket, "out/") if name.startswith(".journal/train")]:
      assert process.poll() is None
    bucket.refuse("^POST", 503)
    while not bucket.refused():
      assert process.poll() is None
      time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
  bucket.answer()
  found = objects(bucket, "out/")
  finished = [name for name in found if name.startswith(".journal/train")]
  assert 0 < len(finished) < 12 and records.MANIFEST not in found
  left = [f for f in (tmp_path / "scratch").rglob("*") if f.is_file()]
  assert len(left) <= 1  # the shard under way
  with into_bucket(bucket, tmp_path / "scratch", "out", *flags, "--workers", "2") as process:
    log = process.communicate(timeout=100)[0]
  assert process.returncode == 0, log
  assert f"kept {len(finished)} finished shards" in log
  assert not [f for f in (tmp_path / "scratch").rglob("*") if f.is_file()]
  found = objects(bucket, "out/")
  assert {name: data for name, data in found.items() if not name.startswith(".")}.keys() == hashes(
    tmp_path / "local"
  ).keys()
  for file in (tmp_path / "local").glob("[!.]*"):
    assert found[file.name] == file.read_bytes(), file.name

  # What is not what was sent is made again, and another plan is refused.
  url = bucket.environment["STORAGE_EMULATOR_HOST"]
  victim = records.shard_name("train", 3, 12)
  requests.post(
    f"{url}/upload/storage/v1/b/bucket/o",
    params={"uploadType": "media", "name": f"out/{victim}"},
    data=b"x" * len(found[victim]),
    timeout=10,
  )
  assert objects(bucket, "out/")[victim] != found[victim]
  with into_bucket(bucket, tmp_path / "scratch", "out", *flags) as process:
    log = process.communicate(timeout=100)[0]
  assert process.returncode == 0 and "kept 12 finished shards, made 1" in log, log
  assert objects(bucket, "out/")[victim] == found[victim]
  # What was sent is streamed from there.
  log = read_in_process(tmp_path, bucket.environment, "gs://bucket/out", "")
  assert LABELS in log, log


def test_a_folder_into_a_bucket_and_a_bucket_that_is_not_there(folder, bucket, shards, tmp_path):
  with into_bucket(
    bucket, tmp_path / "scratch", "images", "--folder", folder, "--shards", 3, "--workers", 1
  ) as process:
    log = process.communicate(timeout=100)[0]
  assert process.returncode == 0, log
  assert json.loads(objects(bucket, "images/")[records.MANIFEST]) == manifest_of(shards)
  with into_bucket(
    bucket, tmp_path / "scratch", "images", "--folder", folder, "--workers", 1, bucket="nowhere"
  ) as process:
    log = process.communicate(timeout=100)[0]
  assert process.returncode == 1 and "Traceback" not in log, log
  assert "prepare: there is no bucket nowhere" in log


def test_parquet_in_a_bucket(parquet, bucket, tmp_path):  # noqa: F811
  url = bucket.environment["STORAGE_EMULATOR_HOST"]
  for file in parquet.rglob("*.parquet"):
    requests.post(
      f"{url}/upload/storage/v1/b/bucket/o",
      params={"uploadType": "media", "name": f"pictures/{file.relative_to(parquet)}"},
      data=file.read_bytes(),
      timeout=10,
    )
  log = read_in_process(tmp_path, bucket.environment, "hf:gs://bucket/pictures", "")
  assert LABELS in log, log
