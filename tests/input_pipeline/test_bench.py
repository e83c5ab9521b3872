"""The benchmark of the input: it runs, and its arithmetic is right."""

import importlib.util
import itertools
import os
import re

import numpy as np
import pytest

from input_pipeline import records
from input_pipeline.tools import bench, bench_data, bench_operations, rivals
from tests.input_pipeline.conftest import encoded, picture


def _turn(milliseconds, images_per_second=1.0, **stages):
  return bench.Turn(milliseconds / 1e3, images_per_second, {k: v / 1e3 for k, v in stages.items()})


def test_ratios_are_medians_of_the_ratios_of_rounds():
  # In the second round the machine is busy with something else.
  turns = {"ours": [_turn(1), _turn(4), _turn(1)], "rival": [_turn(2), _turn(6), _turn(2)]}
  rows = bench.report(turns).splitlines()[1:]
  expected = ["1.00 1000 1 ours", "2.00 500 1 rival"]
  assert [" ".join(row.split()) for row in rows] == expected


def test_stages_and_what_comes_on_top_of_them():
  timed = [_turn(2.1, read=0.1, decode=1.5, resize=0.5, rest=0.0)]
  text = bench.report_stages(timed, [_turn(2.2)], [_turn(2.5)], mean_bytes=110_000)
  assert "read 100, decode 1500, resize 500, rest 0" in text
  assert "10.0% in process, 25.0% through a decoding process" in text
  assert "50 MB per CPU-second" in text
  assert "1829 images/s: 4.6 cores" in text


def test_scaling_is_a_share_of_linear():
  text = bench.report_scaling([_turn(1, 500)], [_turn(1.25, 900)], 2)
  assert "0.90 of 2 times one by the clock" in text
  assert "0.80 by CPU time" in text


def test_a_sample_is_taken_from_all_of_the_data(shards, tmp_path):
  source = bench_data.open_data(str(shards), "train", 5, str(tmp_path))
  sample = bench_data.Sample(source, 5)
  names = [example.name for example in sample.once()]
  assert names == [source[i].name for i in (0, 4, 8, 12, 16)]
  assert sample[5 * 1000 + 3].name == names[3]


def test_classes_without_splits(tmp_path):
  for number in range(6):
    file = tmp_path / "mine" / "ab"[number % 2] / f"{number}.jpg"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(encoded(picture(number, 30, 26)))
  assert len(bench_data.open_data(str(tmp_path / "mine"), "train", 9, str(tmp_path))) == 6


@pytest.mark.parametrize("task", ["TRAIN", "EVAL"])
def test_the_rival_that_is_always_installed_makes_batches(task):
  examples = [records.Record(encoded(picture(i, 300, 260)), 0, str(i)) for i in range(3)]
  name, make = list(rivals.installed(task))[-1]
  assert name.startswith("Pillow")
  for batch in itertools.islice(make(examples, 4)[0], 2):
    assert batch.shape == (4, 224, 224, 3)
    assert batch.dtype == np.uint8


def test_the_table_of_a_folder_of_images(folder, capsys, monkeypatch):
  found = importlib.util.find_spec
  absent = ("tensorflow", "nvidia", "nvidia.dali", "timm")
  monkeypatch.setattr(
    importlib.util, "find_spec", lambda name, *a: None if name in absent else found(name, *a)
  )
  monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0})
  arguments = [f"--data={folder}", "--images=8", "--batch-size=4", "--rounds=1"]
  assert bench.main(arguments) == 0
  out, err = capsys.readouterr()
  assert "8 images of" in out
  rows = re.findall(r"^ +(\d+\.\d\d) +(\d+) +\d+  (.*)$", out, re.M)
  names = [re.sub(r" \d.*", "", name) for _, _, name in rows]
  assert names == ["ours", "ours, through a decoding process", "Pillow", "ours", "Pillow", "ours"]
  assert all(int(rate) > 0 for _, rate, _ in rows)
  assert re.search(r"read \d+, decode \d+, resize \d+, rest \d+", out)
  assert "cores like these" in out
  for chain in bench_operations.CHAINS:
    assert re.search(rf"^ +\d+ +[\d,]+  {re.escape(chain)}$", out, re.M)
  assert re.search(r"^ +\d+ +[\d,]+    rotate 21.0 bicubic$", out, re.M)
  assert not err


def test_what_cannot_be_read_is_one_sentence(tmp_path, capsys):
  assert bench.main([f"--data={tmp_path / 'absent'}"]) == 1
  assert capsys.readouterr().err.splitlines() == [
    f"bench: config.data.path is {tmp_path / 'absent'}, which does not exist."
  ]
