"""The benchmarks run and print what they promise, whatever the figures."""

import os
import re
import subprocess
import sys

import numpy as np
import pytest

from input_pipeline import loader, sources
from tests.trainer import tiny
from trainer.errors import ConfigError
from trainer.tools import bench, mixed


@pytest.mark.slow
def test_loop(capsys):
  bench.main(["loop", "--steps", "5", "--rounds", "1", "--batch-size", "8"])
  assert "median ratio" in capsys.readouterr().out


def test_save(tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(bench, "base", tiny)  # a net that is saved in a moment
  bench.main(
    ["save", "--rounds", "1", "--steps", "2", "--idle-seconds", "0.0", "--folder", str(tmp_path)]
  )
  out = capsys.readouterr().out
  assert "first:" in out and "save  1:" in out and "medians: the loop stands still for" in out
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_startup():
  environment = os.environ | {"JAX_PLATFORMS": "cpu"}
  out = subprocess.run(
    [sys.executable, "-m", "trainer.bench", "startup"],
    env=environment,
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  ).stdout
  assert "start 2: first step after" in out and "ratio" in out


@pytest.mark.slow
def test_depth(capsys):
  bench.main(
    [
      "depth",
      *("--nets", "cifar_resnet-20", "--ways", "unroll,scan+blocks", "--width", "0.25"),
      *("--image-size", "8", "--batch-size", "2", "--steps", "1"),
    ]
  )
  rows = capsys.readouterr().out.splitlines()[2:]
  assert [row.split()[:3] for row in rows] == [
    ["cifar_resnet-20", "unroll", "none"],
    ["cifar_resnet-20", "scan", "blocks"],
  ]
  unrolled, scanned = (float(row.split()[-1]) for row in rows)
  assert scanned == pytest.approx(unrolled, rel=1e-3)


def test_augment(capsys, monkeypatch):
  monkeypatch.setattr(bench, "base", tiny)
  chain = "mix(mixup=0.2)|random_erasing(p=0.5)"
  bench.main(["augment", "--batch-size", "8", "--image-size", "16", "--chain", chain])
  out = capsys.readouterr().out
  share = float(out.split("the augmentation adds ")[1].split(" %")[0])
  assert "MB of an image with no augmentation" in out and f"with {chain}" in out and share > 0


def test_replicas(capsys, monkeypatch):
  monkeypatch.setattr(bench, "base", tiny)
  with pytest.raises(SystemExit, match="one device, and no copy"):
    bench.main(["replicas"])
  # In a process of its own, for it needs several devices.
  code = "from trainer.tools import bench; from tests.trainer import tiny; bench.base = tiny; "
  out = subprocess.run(
    [sys.executable, "-c", code + "bench.main(['replicas', '--rounds', '1'])"],
    env=os.environ | {"JAX_NUM_CPU_DEVICES": "2"},
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  ).stdout
  assert re.search(r"(\d+) of \1 leaves have copies; .* GFLOP and .* MB on each device", out)
  assert "all-reduce                over 2 devices: 1," in out and "median of 1:" in out


def test_a_picture_of_mixed_images(tmp_path):
  config = tiny.get_config()
  config.data.kind, config.accumulation_steps = "synthetic", 2
  plain = mixed.draw_section(config, 3)
  source = sources.open_source(config.data, "train", config.model.num_classes)
  batch = next(loader.train_batches(source, config.data, seed=0, global_batch_size=8))
  np.testing.assert_array_equal(plain.images, batch["image"][::2][:3])  # of the first micro-batch
  names = [source.class_names[label] for label in batch["label"][::2][:3]]
  assert plain.captions == [f"1.00 {name}" for name in names]
  config.augment = "mix(mixup=1.0, group=2, per='example')"
  section = mixed.draw_section(config, 4)
  assert (section.images != batch["image"][::2][:4]).any()
  both = [caption.split(" + ") for caption in section.captions if "+" in caption]
  assert both and all(
    sum(float(part.split()[0]) for part in parts) == pytest.approx(1, abs=0.02) for parts in both
  )
  config.augment = "mix(mixup=1.0, group=3)"
  with pytest.raises(ConfigError, match="group of mix makes 3"):
    mixed.draw_section(config, 4)
