"""Parquet streamed as the hub has it: the order, the position in it, hosts, faults."""

import collections
import itertools
import json
import random
import threading

from absl import logging
import numpy as np
import pytest

from input_pipeline import loader, sources
from input_pipeline.errors import DataError, InputLost
from input_pipeline.sources import parquet_files
from tests.input_pipeline.conftest import data_config, encoded, picture

datasets = pytest.importorskip("datasets", reason="the extra [hf] is not installed")

# Each example has a class of its own, which identifies it.
EXAMPLES = {"train": 61, "validation": 26}


def write_parquet(folder, files=4, rows=5, damage=lambda split, i, data: data, names=range(61)):
  """Make FOLDER/data/SPLIT-I-of-N.parquet with row groups of `rows` examples."""
  features = datasets.Features(
    {
      "image": datasets.Image(decode=False),
      "label": datasets.ClassLabel(names=[f"class {i}" for i in names]),
    }
  )
  (folder / "data").mkdir(parents=True)
  for split, count in EXAMPLES.items():
    parts = np.array_split(np.arange(count), files)
    for number, part in enumerate(parts):
      images = [
        {"bytes": damage(split, i, encoded(picture(i))), "path": f"{split}_{i:03d}.JPEG"}
        for i in part.tolist()
      ]
      table = datasets.Dataset.from_dict(
        {"image": images, "label": part.tolist()}, features=features
      )
      table.to_parquet(
        str(folder / "data" / f"{split}-{number:05d}-of-{files:05d}.parquet"), batch_size=rows
      )
  return folder


@pytest.fixture(scope="module")
def parquet(tmp_path_factory):
  return write_parquet(tmp_path_factory.mktemp("parquet") / "set")


def config(path, **fields):
  small = {"hf_streams": 2, "hf_window": 16, "prefetch_batches": 2}
  return data_config(path if isinstance(path, str) else f"hf:{path}", **{**small, **fields})


def train(path, steps, first_step=0, host=0, hosts=1, positions=None, batch=8, seed=3, **fields):
  """Return batches and, by step, the positions around them as a checkpoint restores them."""
  data = config(path, **fields)
  batches = loader.train_batches(
    sources.open_source(data, "train", 61),
    data,
    seed=seed,
    first_step=first_step,
    host=host,
    hosts=hosts,
    global_batch_size=batch,
    positions=positions,
  )
  try:
    read, at = [next(batches)], {first_step: batches.position(first_step)}
    for step in range(first_step + 1, first_step + steps):
      read.append(next(batches))
      # One batch late, like a trainer that sends batches ahead.
      at[step] = json.loads(json.dumps(batches.position(step)))
    return read, at
  finally:
    batches.close()


def labels(batches):
  return np.concatenate([b["label"] for b in batches]).tolist()


def assert_same(a, b):
  assert len(a) == len(b)
  for x, y in zip(a, b):
    assert x.keys() == y.keys()
    for key in x:
      np.testing.assert_array_equal(x[key], y[key])


def test_what_it_is(parquet):
  for path in (f"hf:{parquet}", str(parquet)):
    source = sources.open_source(data_config(path, kind="hf"), "val", 61)
    assert len(source) == 26
    assert source.class_names[7] == "class 7"
    record = next(source.read(source.row_groups[0]))
    assert record == (encoded(picture(0)), 0, "validation_000.JPEG")


def test_epochs_are_permutations_and_differ(parquet):
  seen = labels(train(parquet, 61)[0])  # eight epochs
  epochs = [seen[i : i + 61] for i in range(0, len(seen), 61)]
  assert all(sorted(epoch) == list(range(61)) for epoch in epochs)
  assert len(set(map(tuple, epochs))) == 8
  assert labels(train(parquet, 10, seed=4)[0]) != seen[:80]


def test_the_images_are_those_of_the_labels_and_crops_differ_between_epochs(parquet):
  whole = {"crop_area": (1.0, 1.0), "crop_aspect": (1.25, 1.25), "flip": False}
  batches, _ = train(parquet, 16, **whole)
  by_label = collections.defaultdict(list)
  for batch in batches:
    for image, label in zip(batch["image"], batch["label"]):
      by_label[int(label)].append(image)
  assert len({images[0].tobytes() for images in by_label.values()}) == 61
  assert all((a == b).all() for a, b, *_ in by_label.values())
  first, second = train(parquet, 61)[0][0], train(parquet, 61, seed=5)[0][0]
  assert not np.array_equal(first["image"], second["image"])


def test_threads_and_read_ahead_change_nothing(parquet):
  quiet, _ = train(parquet, 20, threads=0, prefetch_batches=1)
  assert_same(quiet, train(parquet, 20, threads=3, prefetch_batches=7)[0])


@pytest.mark.parametrize("fields", [{}, {"hf_window": 7, "hf_streams": 3}, {"hf_window": 1000}])
def test_exact_resume(parquet, fields):
  batches, positions = train(parquet, 40, **fields)
  for step in random.Random(0).sample(range(1, 40), 6):
    resumed, _ = train(parquet, 4, first_step=step, positions=[positions[step]], **fields)
    assert_same(resumed[: 40 - step], batches[step : step + 4])


def test_resume_of_two_hosts(parquet):
  hosts = [train(parquet, 12, host=host, hosts=2) for host in range(2)]
  positions = [at[9] for _, at in hosts]
  for host, (batches, _) in enumerate(hosts):
    assert_same(
      train(parquet, 3, first_step=9, host=host, hosts=2, positions=positions)[0], batches[9:]
    )


@pytest.mark.parametrize("hosts", [1, 2, 3, 5])
def test_the_parts_of_the_hosts_make_up_an_epoch(parquet, hosts):
  seen = []
  for host in range(hosts):
    batches, at = train(parquet, 80 // hosts + 20, host=host, hosts=hosts, batch=hosts)
    # The position behind the last example of an epoch is still one of this epoch.
    seen += [
      int(b["label"][0]) for step, b in enumerate(batches[:-1]) if at[step + 1]["epoch"] == 0
    ]
  assert sorted(seen) == list(range(61))


@pytest.fixture
def warnings(monkeypatch):
  logged = []
  monkeypatch.setattr(logging, "warning", lambda message, *args: logged.append(message % args))
  return logged


def test_another_number_of_hosts_is_a_warning_and_a_new_order(parquet, warnings):
  positions = [train(parquet, 12, host=host, hosts=2)[1][9] for host in range(2)]
  del warnings[:]
  batches, at = train(parquet, 8, first_step=9, positions=positions)
  changed = [w for w in warnings if "order changes" in w]
  assert len(changed) == 1
  assert (
    "step 9" in changed[0]
    and "2 hosts, not 1" in changed[0]
    and "epoch 1 begins anew" in changed[0]
  )
  assert at[9]["epoch"] == 1
  assert sorted(labels(batches)[:61]) == list(range(61))
  other, _ = train(parquet, 3, first_step=9, positions=[positions[0] | {"data": "0"}])
  assert "other files" in warnings[-1]
  assert_same(other, batches[:3])
  train(parquet, 1, first_step=9)
  assert "none for this kind of data" in warnings[-1]


def test_the_same_files_elsewhere_are_the_same(parquet, tmp_path, warnings):
  batches, positions = train(parquet, 12)
  moved = tmp_path / "moved"
  parquet.rename(moved)
  try:
    assert_same(train(moved, 3, first_step=9, positions=[positions[9]])[0], batches[9:])
  finally:
    moved.rename(parquet)
  assert not [w for w in warnings if "order changes" in w]


@pytest.mark.parametrize("hosts, batch", [(1, 8), (2, 8), (3, 6), (4, 64), (12, 12)])
def test_every_example_is_evaluated_once(parquet, hosts, batch):
  data, seen, counts = config(parquet), [], set()
  for host in range(hosts):
    source = sources.open_source(data, "val", 61)
    batches = list(loader.eval_batches(source, data, batch_size=batch, host=host, hosts=hosts))
    counts.add(len(batches))
    for b in batches:
      assert b["image"].shape == (batch // hosts, 16, 16, 3)
      assert not b["image"][~b["mask"]].any()
      seen += b["label"][b["mask"]].tolist()
  assert len(counts) == 1
  assert sorted(seen) == list(range(26))


def test_bad_records_are_replaced_and_counted(tmp_path):
  path = write_parquet(
    tmp_path / "set", damage=lambda split, i, data: b"no image" if i in (3, 8) else data
  )
  data = config(path, max_bad_fraction=0.1)
  batches = loader.train_batches(
    sources.open_source(data, "train", 61), data, seed=0, global_batch_size=61
  )
  epoch = next(batches)
  assert batches.bad_records == epoch["bad"].sum() == 2
  assert set(epoch["label"]) == set(range(61)) - {3, 8}
  batches.close()
  evaluation = loader.eval_batches(
    sources.open_source(data, "val", 61), config(path, max_bad_fraction=0.1), batch_size=26
  )
  assert sorted(next(evaluation)["label"]) == list(range(26))
  assert evaluation.bad_records == 2
  evaluation.close()
  strict = config(path, max_bad_fraction=0.001)
  with pytest.raises(DataError, match=r"records cannot be decoded.*train_00[38].JPEG"):
    list(
      itertools.islice(
        loader.train_batches(
          sources.open_source(strict, "train", 61), strict, seed=0, global_batch_size=61
        ),
        2,
      )
    )


def test_what_does_not_fit_is_one_sentence(parquet, tmp_path):
  def refused(path, *words, split="train", classes=61):
    with pytest.raises(DataError) as e:
      sources.open_source(data_config(f"hf:{path}"), split, classes)
    assert all(word in str(e.value) for word in words), e.value
    assert "\n" not in str(e.value)

  refused("/nowhere/at/all", "neither a folder nor NAME")
  refused("s9://bucket/folder", "s9://bucket/folder cannot be read")
  refused(parquet, "no split 'more'", "train, validation", split="more")
  refused(parquet, "61 classes", "--config.model.num_classes=61", classes=10)
  (tmp_path / "empty").mkdir()
  refused(tmp_path / "empty", "holds no parquet files")
  cut = tmp_path / "cut" / "train.parquet"
  cut.parent.mkdir()
  whole = next((parquet / "data").glob("train-*"))
  cut.write_bytes(whole.read_bytes()[:-200])
  refused(cut.parent, "train.parquet is no parquet file, or cut off")


def test_columns(tmp_path):
  def opened(features, columns, classes=5):
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    folder.mkdir()
    datasets.Dataset.from_dict(columns, features=datasets.Features(features)).to_parquet(
      str(folder / "train.parquet")
    )
    return sources.open_source(data_config(f"hf:{folder}"), "train", classes)

  jpeg, integer = encoded(picture(0)), datasets.Value("int64")
  source = opened({"jpg": datasets.Value("binary"), "cls": integer}, {"jpg": [jpeg], "cls": [4]})
  assert next(source.read(source.row_groups[0])) == (jpeg, 4, "train.parquet[0][0]")
  assert source.class_names == ("0", "1", "2", "3", "4")
  with pytest.raises(DataError, match="label is 4, but there are 3 classes"):
    source = opened(
      {"jpg": datasets.Value("binary"), "label": integer}, {"jpg": [jpeg], "label": [4]}, 3
    )
    list(source.read(source.row_groups[0]))
  with pytest.raises(DataError, match=r"one column of images.*it has a, b, label"):
    opened(
      {"a": datasets.Image(), "b": datasets.Image(), "label": integer},
      {"a": [None], "b": [None], "label": [0]},
    )


def test_fewer_row_groups_than_hosts(parquet):
  with pytest.raises(DataError, match="13 row groups, fewer than the 24 hosts"):
    train(parquet, 1, hosts=24, batch=24)


def test_the_split_is_in_the_name():
  split = parquet_files.split_of
  assert split("/data/train-00000-of-00294.parquet") == "train"
  assert split("/data/test_val-00001-of-00002.parquet") == "test_val"
  assert split("/default/train/0000.parquet") == split("/my_train_3.parquet") == "train"
  assert split("/dev.parquet") == split("/a/val/1.parquet") == "validation"
  assert split("/eval.parquet") == "test"
  assert split("/restrained.parquet") == "other"


def test_closing_ends_all_threads_at_once(parquet):
  before = set(threading.enumerate())
  data = config(parquet)
  source = sources.open_source(data, "train", 61)
  for read in (0, 5):
    batches = loader.train_batches(source, data, seed=0, global_batch_size=8)
    for _ in range(read):
      next(batches)
    mine = set(threading.enumerate()) - before
    assert mine and all(thread.daemon for thread in mine)
    batches.close()
    batches.close()
    for thread in mine:
      thread.join(timeout=20)
    assert not set(threading.enumerate()) - before


@pytest.mark.parametrize(
  ("error", "kind"),
  [
    (ConnectionError("Couldn't reach 'me/x' on the Hub (ConnectTimeout)"), InputLost),
    (TimeoutError("timed out"), InputLost),
    (ConnectionError("Couldn't reach 'me/x' on the Hub (OfflineModeIsEnabled)"), DataError),
    (FileNotFoundError("Dataset 'me/x' doesn't exist on the Hub"), DataError),
  ],
  ids=str,
)
def test_a_silent_hub_may_answer_a_rerun(monkeypatch, error, kind):
  def builder(*unused, **options):
    raise error

  monkeypatch.setattr(datasets, "load_dataset_builder", builder)
  with pytest.raises(DataError, match="hf:me/x cannot be opened") as raised:
    sources.open_source(data_config("hf:me/x"), "train", 10)
  assert type(raised.value) is kind
