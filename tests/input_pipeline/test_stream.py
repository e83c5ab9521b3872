"""Shards read in place: the order, resume, faults of the network, and what is refused."""

import collections
import contextlib
import itertools
import pickle
import shutil
import threading
import time

from array_record.python import array_record_module
import numpy as np
import pytest

from input_pipeline import loader, order, records, sources
from input_pipeline.errors import BadRecordError, DataError
from input_pipeline.remote import read_ahead, record_reader, tensorstore
from tests.input_pipeline import web
from tests.input_pipeline.conftest import data_config, make_folder, run_prepare
from tests.input_pipeline.test_loader import digest, evaluate, joined, take

_BATCH = 16
_TRAIN, _VAL = 373, 101


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory):
  """373 images to train in five shards, 101 to evaluate in three."""
  root = tmp_path_factory.mktemp("stream")
  counts = {"train": {"a": 150, "b": 150, "c": 73}, "val": {"a": 40, "b": 30, "c": 31}}
  make_folder(root / "images", counts)
  out = root / "out"
  argv = ("--out", out, "--folder", root / "images", "--shards", 5, "--val-shards", 3)
  assert run_prepare(*argv) == 0
  return out


@pytest.fixture
def server(data_folder, monkeypatch):
  """A web server of the shards."""
  with web.Server(data_folder) as started:
    for key, value in started.environment().items():
      monkeypatch.setenv(key, value)
    yield started


def opened(path, split="train", **fields):
  few = {"stream_lanes": 4, "stream_block": 8, "stream_window": 3, "kind": "stream"}
  data = data_config(path, **(few | fields))
  return sources.open_source(data, split, 3), data


def steps(path, count, first_step=0, **where):
  fields = {k: where.pop(k) for k in list(where) if k not in ("host", "hosts", "seed")}
  return take(*opened(path, **fields), count, batch=_BATCH, first_step=first_step, **where)


def test_hosts_threads_and_processes_do_not_change_the_batches(data_folder):
  # 60 steps of 16 cross the borders of epochs of 373 at places that differ from those of batches.
  expected = digest(steps(data_folder, 60))
  for hosts in (2, 4, 8):
    parts = [steps(data_folder, 60, host=h, hosts=hosts) for h in range(hosts)]
    assert digest(joined(parts)) == expected
  assert digest(steps(data_folder, 60, threads=0)) == expected
  assert digest(steps(data_folder, 60, threads=4, stream_ahead_steps=1)) == expected
  assert digest(steps(data_folder, 60, workers=3)) == expected


def test_each_epoch_is_another_permutation_of_all(data_folder):
  source, _ = opened(data_folder)
  lanes = order.LaneShuffle(
    [shard.count for shard in source.shards], 7, _BATCH, lanes=4, block=8, window=3
  )
  epochs = []
  for epoch in range(3):
    indices = [index_of(lanes, number) for number in range(epoch * _TRAIN, (epoch + 1) * _TRAIN)]
    assert sorted(indices) == list(range(_TRAIN))
    epochs.append(indices)
  for one, other in itertools.combinations(epochs, 2):
    assert sum(a == b for a, b in zip(one, other)) < 20


@pytest.mark.parametrize("repeats", [2, 3])
def test_repeated_examples_follow_each_other_in_their_lane(data_folder, repeats):
  source, _ = opened(data_folder)
  fields = {"lanes": 4, "block": 8, "window": 3}
  counts = [shard.count for shard in source.shards]
  once = order.LaneShuffle(counts, 7, _BATCH, **fields)
  lanes = order.LaneShuffle(counts, 7, _BATCH, **fields, repeats=repeats)
  rows = _BATCH // 4
  for epoch in range(2):
    served = {(order_, lane): [] for order_ in (once, lanes) for lane in range(4)}
    for order_ in (once, lanes):
      for number in range(epoch * _TRAIN, (epoch + 1) * _TRAIN):
        served[order_, number % _BATCH // rows].append(index_of(order_, number))
    for lane in range(4):
      expected = np.repeat(served[once, lane], repeats)[: len(served[once, lane])]
      np.testing.assert_array_equal(served[lanes, lane], expected)
  numbers = range(_TRAIN - 2 * _BATCH, _TRAIN + 2 * _BATCH)
  parts = lanes.parts(numbers.start, len(numbers))
  assert sum(len(slots) for _, slots in parts) == len(numbers)


def index_of(lanes, number):
  ((key, (slot,)),) = lanes.parts(number, 1)
  ends = list(itertools.accumulate(run.count for run in lanes.runs(key)))
  place = next(i for i, end in enumerate(ends) if slot < end)
  run = lanes.runs(key)[place]
  return run.first + int(slot) - (ends[place] - run.count)


def test_examples_are_those_of_the_shards(data_folder):
  images = collections.Counter()
  source, _ = opened(data_folder)
  local = sources.open_source(data_config(data_folder), "train", 3)
  for index in range(len(source)):
    assert source[index] == local[index]
    images[source[index].image] += 1
  assert len(images) == _TRAIN


def test_a_restart_continues_with_the_same_batches(data_folder):
  all_steps = steps(data_folder, 93)
  for first_step in np.random.default_rng(0).choice(90, 20, replace=False).tolist():
    expected = all_steps[first_step : first_step + 3]
    assert digest(steps(data_folder, 3, first_step)) == digest(expected)
    assert digest(steps(data_folder, 3, first_step, host=1, hosts=2)) == digest(
      [{k: v[_BATCH // 2 :] for k, v in batch.items()} for batch in expected]
    )


def test_any_step_starts_at_once(data_folder):
  source, data = opened(data_folder)
  start = time.process_time()
  take(source, data, 1, batch=_BATCH, first_step=10**6)
  assert time.process_time() - start < 1


@pytest.mark.parametrize("scheme", ["http", "gs"])
def test_evaluation_sees_each_example_once(data_folder, server, scheme):
  url = server.url if scheme == "http" else "gs://bucket"
  expected = evaluate(sources.open_source(data_config(data_folder), "val", 3), data_config(""))
  expected_digest = digest(expected)
  for hosts in (1, 2, 4):
    parts = [evaluate(*opened(url, "val"), host=h, hosts=hosts) for h in range(hosts)]
    assert digest(joined(parts)) == expected_digest


def test_few_requests_and_few_bytes_are_used(tmp_path, server):
  make_folder(tmp_path / "images", {"train": {"a": 600, "b": 600, "c": 720}})
  out = tmp_path / "out"
  assert run_prepare("--out", out, "--folder", tmp_path / "images", "--shards", 4) == 0
  server.folder = out
  source, data = opened(server.url, stream_block=48, stream_window=2)
  iterator = loader.train_batches(source, data, seed=0, global_batch_size=24)
  with contextlib.closing(iterator):
    for _ in range(3 * 1920 // 24):
      next(iterator)
  assert server.counts["requests"] <= 3 * 1920 / 32
  local = sources.open_source(data_config(out), "train", 3)
  used = 3 * sum(len(records.encode(local[i])) for i in range(len(local)))
  indexes = len(source.shards) * 3 * 65536  # much, beside such small images
  assert used < iterator.reads["bytes"] < 1.1 * used + indexes


def test_faults_change_nothing_and_are_counted(data_folder, server, monkeypatch):
  monkeypatch.setattr(tensorstore, "_FIRST_PAUSE", 0.01)
  expected = digest(steps(data_folder, 3 * _TRAIN // _BATCH))
  server.faults = {"reset": 0.05, "refuse": 0.05, "short": 0.05, "slow": 0.05}
  for url in (server.url, "gs://bucket"):
    source, data = opened(url, stream_hedge_seconds=0.2, stream_timeout_seconds=5.0)
    iterator = loader.train_batches(source, data, seed=0, global_batch_size=_BATCH)
    with contextlib.closing(iterator):
      assert digest([next(iterator) for _ in range(3 * _TRAIN // _BATCH)]) == expected
    assert iterator.bad_records == 0
    assert iterator.reads["retries"] >= 5
    assert iterator.reads["hedges"] >= 2
    assert len(server.faults) == len([kind for kind in server.faults if server.counts[kind]])


def test_a_server_that_is_gone_ends_the_run_in_time(data_folder, server):
  source, data = opened(server.url, stream_give_up_seconds=1.0, stream_timeout_seconds=1.0)
  server.faults = {"refuse": 1.0}
  start = time.monotonic()
  with pytest.raises(DataError, match=r"could not be read within .*give_up_seconds=1.*HTTP code"):
    take(source, data, 1, batch=_BATCH)
  server.faults, server.slow_seconds = {"slow": 1.0}, 8.0
  source, data = opened_silently(server, data_folder)
  with pytest.raises(DataError, match="no answer within 1 s"):
    take(source, data, 1, batch=_BATCH)
  assert time.monotonic() - start < 20


def opened_silently(server, data_folder):
  """Open a source while the server answers nothing."""
  source, data = opened(data_folder)
  patience = tensorstore.Patience(timeout_seconds=1.0, hedge_seconds=0.5, give_up_seconds=1.5)
  source.bucket = tensorstore.Bucket(server.url, patience)
  return pickle.loads(pickle.dumps(source)), data


def test_closing_ends_a_wait_for_records():
  reading = threading.Event()

  def read(run):
    reading.set()
    time.sleep(0.3)
    return [b""] * run.count

  ahead = read_ahead.ReadAhead(
    read, order.InOrder([100]), lambda step: (step * 10, 10), steps=range(10), ahead=5, requests=1
  )
  failures = []

  def take_one():
    try:
      ahead.take(3)
    except DataError as e:
      failures.append(str(e))

  waiting = threading.Thread(target=take_one, daemon=True)
  waiting.start()
  assert reading.wait(5)
  ahead.close()
  waiting.join(5)
  assert failures == ["the loader was closed"]
  with pytest.raises(DataError, match="closed"):
    ahead.take(4)


def test_a_shard_that_is_gone_or_replaced_is_named(data_folder, server, tmp_path):
  shutil.copytree(data_folder, tmp_path / "copy")
  server.folder = tmp_path / "copy"
  source, data = opened(server.url)
  take(source, data, 1, batch=_BATCH)
  for shard in source.shards:
    file = server.folder / shard.name
    file.write_bytes(file.read_bytes())
  with pytest.raises(DataError, match=r"train-0000\d-of-00005.array_record was replaced while"):
    take(source, data, 60, batch=_BATCH)
  for shard in source.shards:
    (server.folder / shard.name).unlink()
  with pytest.raises(DataError, match=r"train-0000\d-of-00005.array_record is missing"):
    take(*opened(server.url), 1, batch=_BATCH)
  with pytest.raises(DataError, match=r"array_record is missing, but manifest.json lists it"):
    opened("gs://bucket")


def test_a_cut_shard_is_named(data_folder, tmp_path):
  shutil.copytree(data_folder, tmp_path / "copy")
  for file in (tmp_path / "copy").glob("train-*"):
    file.write_bytes(file.read_bytes()[:-65536])
  with pytest.raises(DataError, match="array_record is shorter than it was"):
    take(*opened(tmp_path / "copy"), 1, batch=_BATCH)


def test_a_bad_record_is_replaced_alike_on_any_number_of_hosts(data_folder, tmp_path):
  shutil.copytree(data_folder, tmp_path / "copy")
  file = tmp_path / "copy" / "train-00002-of-00005.array_record"
  data = bytearray(file.read_bytes())
  image = opened(data_folder)[0][sum((75, 75)) + 9].image
  place = data.find(image[100:200])
  data[place] ^= 1
  file.write_bytes(data)
  whole, one_host = (
    steps(path, 24, max_bad_fraction=0.1) for path in (data_folder, tmp_path / "copy")
  )
  bad = np.concatenate([batch["bad"] for batch in one_host])
  assert bad.sum() >= 1
  images = [np.concatenate([batch["image"] for batch in run]) for run in (whole, one_host)]
  assert (np.any(images[0] != images[1], axis=(1, 2, 3)) == bad).all()
  parts = [steps(tmp_path / "copy", 24, host=h, hosts=4, max_bad_fraction=0.1) for h in range(4)]
  assert digest(joined(parts)) == digest(one_host)


@pytest.mark.parametrize("options", ["group_size:1", "group_size:1,uncompressed", "group_size:16"])
def test_shards_of_other_writers_are_read(tmp_path, options):
  rng = np.random.default_rng(0)
  for count, longest in ((1, 1000), (7, 200_000), (300, 30_000), (6000, 300)):
    written = [rng.bytes(int(n)) for n in rng.integers(0, longest, count)]
    writer = array_record_module.ArrayRecordWriter(str(tmp_path / "shard"), options)
    for record in written:
      writer.write(record)
    writer.close()
    for size in (None, (tmp_path / "shard").stat().st_size):
      shard = record_reader.RemoteShard(
        tensorstore.Bucket(str(tmp_path)), "shard", count, size, "mend it"
      )
      for _ in range(3):
        first, last = sorted(rng.integers(0, count, 2).tolist())
        assert shard.read(first, last + 1) == written[first : last + 1]


def test_a_record_with_a_wrong_checksum_does_not_affect_its_neighbours(tmp_path):
  writer = array_record_module.ArrayRecordWriter(str(tmp_path / "shard"), records.WRITER_OPTIONS)
  for i in range(10):
    writer.write(bytes([i]) * 1000)
  writer.close()
  data = bytearray((tmp_path / "shard").read_bytes())
  data[data.find(bytes([4]) * 100)] ^= 16
  (tmp_path / "shard").write_bytes(data)
  shard = record_reader.RemoteShard(
    tensorstore.Bucket(str(tmp_path)), "shard", 10, len(data), "mend it"
  )
  found = shard.read(2, 7)
  assert [i for i, record in enumerate(found) if isinstance(record, BadRecordError)] == [2]
  assert found[3] == bytes([5]) * 1000


def test_lanes_must_divide_the_batch(data_folder):
  with pytest.raises(
    DataError, match=r"global_batch_size=16 must be a multiple of .*stream_lanes=5"
  ):
    steps(data_folder, 1, stream_lanes=5)


def test_a_secret_in_a_url_is_not_shown(server, data_folder):
  source, data = opened(f"{server.url}?token=hush", stream_give_up_seconds=0.3)
  assert len(source) == _TRAIN
  server.faults = {"refuse": 1.0}
  with pytest.raises(DataError) as raised:
    take(source, data, 1, batch=_BATCH)
  assert "hush" not in str(raised.value)


def test_the_order_is_near_a_uniform_shuffle():
  """At the size of ImageNet, in some batches; order_quality.py looks at a whole epoch."""
  data = data_config("")
  fields = {key: data[f"stream_{key}"] for key in ("lanes", "block", "window")}
  lanes = order.LaneShuffle([1251] * 1024, 0, 1024, **fields)
  for step in (100, 700, 2000):
    indices = []
    for key, slots in lanes.parts(step * 1024, 1024):
      read = np.concatenate([np.arange(r.first, r.first + r.count) for r in lanes.runs(key)])
      indices += read[slots].tolist()
    assert len(set(indices)) == 1024
    # Of 1,000 classes, were the shards sorted by them: 641 in a batch of a uniform shuffle.
    assert len({index * 1000 // (1251 * 1024) for index in indices}) > 300
