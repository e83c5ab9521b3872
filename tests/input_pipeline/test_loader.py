"""The order of examples, on any hosts and processes, and the effect of bad records."""

import contextlib
import hashlib
import logging
import os
import pickle
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest

from input_pipeline import image, loader, records, rows, sources
from input_pipeline.errors import BadRecordError, DataError
from input_pipeline.sources import catalog
from tests.input_pipeline.conftest import data_config, encoded, make_folder, picture

_BATCH = 8


def opened(path, split="train", **fields):
  data = data_config(path, **fields)
  return sources.open_source(data, split, 3), data


def take(source, data, steps, *, seed=0, batch=_BATCH, **where):
  """Return the first batches of a training run, by default steps of 8 images."""
  iterator = loader.train_batches(source, data, seed=seed, global_batch_size=batch, **where)
  with contextlib.closing(iterator):
    return [next(iterator) for _ in range(steps)]


def evaluate(source, data, *, batch=_BATCH, **where):
  with contextlib.closing(loader.eval_batches(source, data, batch_size=batch, **where)) as iterator:
    return list(iterator)


def joined(parts):
  """Concatenate the batches of several hosts, host 0 first."""
  return [
    {key: np.concatenate([batch[key] for batch in batches]) for key in batches[0]}
    for batches in zip(*parts, strict=True)
  ]


def digest(batches):
  h = hashlib.sha256()
  for batch in batches:
    for key in sorted(batch):
      h.update(f"{key} {batch[key].shape} {batch[key].dtype}".encode())
      h.update(batch[key].tobytes())
  return h.hexdigest()


class Memory(sources.Source):
  """A source of given files; the label is the index, which identifies an example in a batch."""

  def __init__(self, images):
    self.images = images
    self.num_classes = len(images)
    self.class_names = tuple(str(i) for i in range(len(images)))

  def __len__(self):
    return len(self.images)

  def __getitem__(self, index):
    if self.images[index] is None:
      raise BadRecordError(f"record {index}: cannot be read")
    return records.Record(self.images[index], index, f"image {index}")


def memory(count, bad=()):
  """A source of `count` images, of which those in `bad` are empty."""
  return Memory([b"" if i in bad else encoded(picture(i, 24, 24)) for i in range(count)])


def test_the_shapes_and_types_of_a_batch(shards):
  (batch,) = take(*opened(shards), 1)
  assert {k: (v.shape, v.dtype) for k, v in batch.items()} == {
    "image": ((8, 16, 16, 3), np.uint8),
    "label": ((8,), np.int32),
    "bad": ((8,), np.bool_),
  }
  assert batch["image"].std() > 10
  assert not batch["bad"].any()


@pytest.mark.parametrize("kind", ["shards", "folder"])
def test_hosts_and_threads_do_not_change_the_batches(kind, request):
  # 12 steps of 8 cross the borders of epochs of 23 at places that differ from those of batches.
  path = request.getfixturevalue(kind)
  expected = digest(take(*opened(path), 12))
  for hosts in (2, 4, 8):
    parts = [take(*opened(path), 12, host=h, hosts=hosts) for h in range(hosts)]
    assert digest(joined(parts)) == expected
  for threads, prefetch in ((0, 1), (1, 1), (4, 2)):
    assert digest(take(*opened(path, threads=threads, prefetch_batches=prefetch), 12)) == expected


def test_a_restart_continues_with_the_same_batches(shards):
  expected = take(*opened(shards), 60)
  for first_step in np.random.default_rng(0).choice(58, 20, replace=False).tolist():
    got = take(*opened(shards), 2, first_step=first_step)
    assert digest(got) == digest(expected[first_step : first_step + 2])


def test_processes_do_not_change_the_batches(shards):
  expected = take(*opened(shards), 7)
  got = take(*opened(shards, workers=2), 4, first_step=3)
  assert digest(got) == digest(expected[3:])
  got = take(*opened(shards, workers=2, threads=1), 4, first_step=3, host=1, hosts=2)
  assert digest(got) == digest([{k: v[4:] for k, v in b.items()} for b in expected[3:]])


def test_any_step_starts_at_once(shards):
  source, data = opened(shards)
  start = time.process_time()
  take(source, data, 1, first_step=10**9)
  assert time.process_time() - start < 1


def test_seeds_are_different_runs(shards):
  runs = [take(*opened(shards), 3, seed=seed) for seed in (0, 1, 2**40)]
  assert len({digest(run) for run in runs}) == 3


def test_each_epoch_is_another_permutation_of_all(tmp_path):
  source = memory(20)
  labels = np.concatenate([b["label"] for b in take(source, data_config(""), 15)]).reshape(6, 20)
  for epoch in labels:
    assert sorted(epoch) == list(range(20))
  assert len({tuple(epoch) for epoch in labels}) == 6


def test_the_epochs_of_one_seed_are_not_those_of_the_next():
  source, data = memory(20), data_config("")
  first, second = (
    np.concatenate([b["label"] for b in take(source, data, 5, seed=s)]).reshape(2, 20)
    for s in (0, 1)
  )
  assert not (first[1] == second[0]).all()


def test_crops_and_flips_are_new_in_each_epoch():
  source, data = memory(1), data_config("")
  images = np.concatenate([b["image"] for b in take(source, data, 4)])
  assert len({view.tobytes() for view in images}) == 32


def test_the_random_numbers_of_an_example_are_its_own():
  draws = rows.Draws(2**32 - 1)
  for number in (5, 2**40, 5, 0):
    found = draws.of(number)
    fresh = np.random.Generator(np.random.Philox(key=[2**32 - 1, number]))
    np.testing.assert_array_equal(found.random((10, 4)), fresh.random((10, 4)))
    assert found.random() == fresh.random()


def test_a_batch_larger_than_the_data_holds_several_epochs():
  (batch,) = take(memory(3), data_config(""), 1, batch=12)
  assert sorted(batch["label"]) == sorted([0, 1, 2] * 4)


def test_without_augmentation_the_pixels_are_those_of_the_file():
  data = data_config("", crop_area=(1.0, 1.0), crop_aspect=(1.0, 1.0), flip=False)
  square = Memory([encoded(picture(0, 16, 16))])
  (batch,) = take(square, data, 1)
  np.testing.assert_array_equal(batch["image"][5], image.decode(square.images[0]))


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_evaluation_sees_each_example_once(hosts):
  source, data = memory(19), data_config("")
  parts = [evaluate(source, data, host=h, hosts=hosts) for h in range(hosts)]
  batches = joined(parts)
  assert len(batches) == 3
  assert all(batch["image"].shape == (8, 16, 16, 3) for batch in batches)
  mask = np.concatenate([b["mask"] for b in batches])
  assert mask.tolist() == [True] * 19 + [False] * 5
  assert np.concatenate([b["label"] for b in batches])[mask].tolist() == list(range(19))
  assert not np.concatenate([b["image"] for b in batches])[~mask].any()
  assert digest(batches) == digest(evaluate(source, data))


def test_evaluation_in_one_batch_of_mostly_padding():
  batches = evaluate(memory(3), data_config(""), batch=16, host=1, hosts=4)
  assert len(batches) == 1
  assert not batches[0]["mask"].any()


def test_evaluation_in_processes_is_the_same(shards):
  expected = evaluate(*opened(shards, "val"))
  assert len(expected) == 2
  # More processes than batches: some have nothing to do.
  assert digest(evaluate(*opened(shards, "val", workers=3))) == digest(expected)


def test_a_bad_record_is_replaced_by_its_neighbour(caplog):
  source, data = memory(20, bad=(5, 6, 19)), data_config("", max_bad_fraction=1.0)
  clean = take(memory(20), data, 5)
  iterator = loader.train_batches(source, data, seed=0, global_batch_size=_BATCH)
  with contextlib.closing(iterator), caplog.at_level(logging.WARNING):
    batches = [next(iterator) for _ in range(5)]
  label, was = (np.concatenate([b["label"] for b in batches]) for batches in (batches, clean))
  bad = np.concatenate([b["bad"] for b in batches])
  np.testing.assert_array_equal(bad, np.isin(was, (5, 6, 19)))
  np.testing.assert_array_equal(label[bad], [{5: 7, 6: 7, 19: 0}[i] for i in was[bad]])
  np.testing.assert_array_equal(label[~bad], was[~bad])
  assert iterator.bad_records == bad.sum() == 6
  # Two epochs, but one line for each.
  lines = [r.getMessage() for r in caplog.records if "Bad record" in r.getMessage()]
  assert sorted(lines) == [f"Bad record: image {i}: zero bytes" for i in (19, 5, 6)]


def test_the_warning_of_a_damaged_record_is_one_line(caplog):
  class Named(Memory):
    def __getitem__(self, index):
      return records.Record(self.images[index], index, "a\nb\x1b[31m\udce9ü" + 1000 * "x")

  source, data = Named([b"", encoded(picture(0))]), data_config("", max_bad_fraction=1.0)
  with caplog.at_level(logging.WARNING):
    take(source, data, 1)
  (line,) = [r.getMessage() for r in caplog.records if "Bad record" in r.getMessage()]
  assert line.startswith(r"Bad record: a\nb\x1b[31m\udce9üxxx")
  assert len(line) < 400


def test_hosts_and_processes_agree_about_bad_records(tmp_path):
  root = make_folder(tmp_path / "f", {"train": {"a": 6, "b": 5, "c": 4}})
  (root / "train" / "b" / "b_002.JPEG").write_bytes(b"")
  fields = {"max_bad_fraction": 1.0}
  expected = take(*opened(root, **fields), 4)
  assert sum(b["bad"].sum() for b in expected) == 2
  parts = [take(*opened(root, **fields), 4, host=h, hosts=2) for h in (0, 1)]
  assert digest(joined(parts)) == digest(expected)
  assert digest(take(*opened(root, workers=1, **fields), 4)) == digest(expected)


def test_too_many_bad_records_end_the_run():
  source, data = memory(20, bad=(5, 6, 19)), data_config("", max_bad_fraction=0.1)
  iterator = loader.train_batches(source, data, seed=0, global_batch_size=1)
  with contextlib.closing(iterator), pytest.raises(DataError) as e:
    for _ in range(20):
      next(iterator)
  assert "3 records cannot be decoded, 15.000% of 20" in str(e.value)
  assert "config.data.max_bad_fraction=0.1" in str(e.value)
  for i in (5, 6, 19):
    assert f"image {i}: zero bytes" in str(e.value)


def test_bad_records_within_the_limit_do_not_end_a_long_run():
  # One in 20 is 5 %; over many epochs the count grows and the share does not.
  source, data = memory(20, bad=(5,)), data_config("", max_bad_fraction=0.05)
  iterator = loader.train_batches(source, data, seed=0, global_batch_size=20)
  with contextlib.closing(iterator):
    for _ in range(10):
      next(iterator)
  assert iterator.bad_records == 10


def test_nothing_but_bad_records_ends_the_run_at_once():
  source, data = memory(40, bad=range(40)), data_config("", max_bad_fraction=1.0)
  with pytest.raises(
    DataError, match="17 neighbouring records cannot be decoded, the last is image"
  ):
    take(source, data, 1)


def test_a_bad_record_of_evaluation_is_grey_and_counted():
  source = memory(10, bad=(4,))
  source.images[7] = None  # cannot even be read
  batches = evaluate(source, data_config("", max_bad_fraction=0.2))
  assert sum(b["mask"].sum() for b in batches) == 10
  bad = np.concatenate([b["bad"] for b in batches])
  assert np.flatnonzero(bad).tolist() == [4, 7]
  assert (np.concatenate([b["image"] for b in batches])[bad] == 128).all()
  assert np.concatenate([b["label"] for b in batches])[bad].tolist() == [4, 0]
  with pytest.raises(DataError, match=r"2 records cannot be decoded, 20\.000% of 10"):
    evaluate(source, data_config("", max_bad_fraction=0.19))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_shard_is_the_same_error_from_a_thread_and_a_process(shards, workers, tmp_path):
  source, data = opened(shards, workers=workers)
  source = pickle.loads(pickle.dumps(source))
  source.folder = catalog.LocalFolder(str(tmp_path))  # as if the disk had gone
  with pytest.raises(DataError, match=r"array_record cannot be opened .No such file.*rerun"):
    take(source, data, 1)


def started_since(before):
  """Return the processes that decode, started since the set `before` was taken."""
  new = set(psutil.Process().children(recursive=True)) - before
  new = {p for p in new if p.status() != psutil.STATUS_ZOMBIE}
  return [p for p in new if "resource_tracker" not in " ".join(p.cmdline())]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_signals_for_the_whole_job_leave_the_processes_working(shards, how):
  expected = take(*opened(shards), 12)
  before = set(psutil.Process().children(recursive=True))
  iterator = loader.train_batches(*opened(shards, workers=1), seed=0, global_batch_size=_BATCH)
  with contextlib.closing(iterator):
    batches = [next(iterator)]
    workers = started_since(before)
    assert workers
    for process in workers:
      process.send_signal(how)
    batches += [next(iterator) for _ in range(11)]
  assert digest(batches) == digest(expected)


_RUN = """
import sys, time
from configs import base
from input_pipeline import loader, sources
if __name__ == "__main__":
  path, end = sys.argv[1:]
  data = base.get_config().data
  data.update(path=path, image_size=16, workers=2, threads=1, prefetch_batches=1)
  source = sources.open_source(data, "train", 3)
  iterator = loader.train_batches(source, data, seed=0, global_batch_size=8)
  next(iterator)
  print("started", flush=True)
  if end == "killed":
    time.sleep(60)
  # else the interpreter ends without close()
"""


@pytest.mark.parametrize("end", ["killed", "forgot to close"])
def test_no_process_outlives_the_run(shards, end, tmp_path):
  (tmp_path / "run.py").write_text(_RUN)
  command = [sys.executable, str(tmp_path / "run.py"), str(shards), end]
  environment = os.environ | {"PYTHONPATH": os.getcwd()}
  run = subprocess.Popen(
    command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
  )
  with run:
    assert run.stdout.readline() == b"started\n"
    family = psutil.Process(run.pid).children(recursive=True)
    assert len(family) >= 2 or end != "killed"
    if end == "killed":
      run.kill()
    run.wait(timeout=20)
  _, alive = psutil.wait_procs(family, timeout=20)
  assert not alive


def test_close_ends_the_processes_and_may_be_repeated(shards):
  before = set(psutil.Process().children(recursive=True))
  iterator = loader.train_batches(*opened(shards, workers=2), seed=0, global_batch_size=_BATCH)
  next(iterator)
  iterator.close()
  iterator.close()
  assert not started_since(before)


def test_synthetic_batches_cycle_and_have_right_masks():
  source, data = opened("", kind="synthetic", synthetic_examples=19)
  batches = take(source, data, 6)
  assert batches[0]["image"].std() > 10
  assert digest(batches[:1]) != digest(batches[1:2])
  assert digest(batches[:2]) == digest(batches[4:])
  assert digest(take(source, data, 2, first_step=4)) == digest(batches[4:])
  parts = [take(source, data, 6, host=h, hosts=2) for h in (0, 1)]
  assert digest(joined(parts)) == digest(batches)
  evaluated = evaluate(source, data, batch=4)
  assert [int(b["mask"].sum()) for b in evaluated] == [4, 4, 4, 4, 3]


def test_synthetic_batches_cost_nothing():
  source, data = opened("", kind="synthetic")
  iterator = loader.train_batches(source, data, seed=0, global_batch_size=256)
  with contextlib.closing(iterator):
    for _ in range(4):
      next(iterator)
    start = time.process_time()
    for _ in range(1000):
      next(iterator)
  assert time.process_time() - start < 0.5


@pytest.mark.parametrize(
  ("batch", "hosts", "fields", "says"),
  [
    (10, 4, {}, "config.global_batch_size=10 must be a positive multiple of .* hosts, 4"),
    (0, 1, {}, "config.global_batch_size=0 must be"),
    (8, 1, {"workers": -2}, "config.data.workers must be 0 or more, or -1 .*; it is -2"),
    (
      8,
      1,
      {"crop_area": (0.5, 1.1)},
      r"config.data.crop_area must be .* in \(0, 1\]; it is \[0.5, 1.1\]",
    ),
    (8, 1, {"crop_aspect": (2.0, 1.0)}, r"config.data.crop_aspect must be .*; it is \[2.0, 1.0\]"),
    (8, 1, {"prefetch_batches": 0}, "config.data.prefetch_batches must be 1 or more; it is 0"),
    (8, 1, {"crop": "center"}, "config.data.crop must be one of random_resized, padded, none"),
    (8, 1, {"crop_padding": -1}, "config.data.crop_padding must be 0 or more; it is -1"),
    (8, 1, {"interpolation": "area"}, "config.data.interpolation must be one of bilinear"),
    (8, 1, {"repeats": 0}, "config.data.repeats must be 1 or more; it is 0"),
    (
      8,
      1,
      {"crop": "padded", "image_size": 36, "crop_padding": 4},
      "an image of 24x24 pixels with config.data.crop_padding=4 is smaller than the crop",
    ),
  ],
)
def test_values_that_do_not_fit_are_named(batch, hosts, fields, says):
  with pytest.raises(DataError, match=says):
    take(memory(3), data_config("", **fields), 1, batch=batch, hosts=hosts)


def test_a_negative_seed_is_named():
  with pytest.raises(DataError, match=r"config.seed=-1 must not be negative"):
    take(memory(3), data_config(""), 1, seed=-1)


def test_values_of_evaluation_that_do_not_fit_are_named():
  with pytest.raises(DataError, match=r"config.eval.batch_size=10 must be"):
    evaluate(memory(3), data_config(""), batch=10, hosts=4)
  data = data_config("")
  data.eval_resize = 15
  with pytest.raises(
    DataError, match=r"config.data.eval_resize=15 is smaller than .*eval_image_size=16"
  ):
    evaluate(memory(3), data)
  data = data_config("", eval_interpolation="nearest")
  with pytest.raises(DataError, match="eval_interpolation must be one of bilinear, bicubic"):
    evaluate(memory(3), data)
  data = data_config("", eval_resize=0, eval_image_size=25)
  with pytest.raises(DataError, match=r"24x24 pixels is smaller than .*eval_image_size=25"):
    evaluate(memory(3), data)


def test_an_order_without_repeats_refuses_them():
  class Windows(Memory):
    order = "windows"

  with pytest.raises(DataError, match=r"config.data.repeats=2 is not possible .*'windows'"):
    take(Windows(memory(3).images), data_config("", repeats=2), 1)


def test_repeated_examples_differ_by_their_augmentation_alone():
  source = memory(20)
  one = np.concatenate([b["label"] for b in take(source, data_config(""), 10)])
  batches = take(source, data_config("", repeats=3), 10)
  labels = np.concatenate([b["label"] for b in batches])
  for epoch in range(4):  # of 20 examples each, the last copies cut off
    permutation, found = one[20 * epoch :][:20], labels[20 * epoch :][:20]
    np.testing.assert_array_equal(found, np.repeat(permutation, 3)[:20])
  plain = take(source, data_config("", repeats=3, crop="none", flip=False), 10)
  np.testing.assert_array_equal(plain[0]["image"][0], plain[0]["image"][1])
  assert not np.array_equal(batches[0]["image"][0], batches[0]["image"][1])
  # The key of the augmentation is the number of the example, as without repeats.
  np.testing.assert_array_equal(
    batches[0]["image"][0], take(source, data_config(""), 1)[0]["image"][0]
  )
