"""Runs whose training images change their size: programs, batches, resumes, and what is refused."""

import contextlib
import json
import logging
import shutil

import numpy as np
import pytest

from configs import base, image_sizes
from input_pipeline import loader, sources
from tests.trainer import outside, tiny
from tests.trainer.shared import StopAt, fingerprints, run, trainer
from trainer import config as config_lib
from trainer import program as program_lib
from trainer import train as train_lib
from trainer.errors import ConfigError, Preempted
from trainer.reporting import events


def ffcv(epoch, low, high, start, end):
  """The size that the recipes of FFCV have at an epoch, by numpy."""
  if epoch <= start:
    return low
  if epoch >= end:
    return high
  return int(np.round(np.interp([epoch], [start, end], [low, high])[0] / 32)) * 32


@pytest.mark.parametrize(
  "low, high, start, end",
  [(160, 192, 11, 13), (160, 192, 65, 76), (128, 224, 10, 40), (96, 96, 0, 5)],
)
def test_a_ramp_has_the_sizes_of_ffcv(low, high, start, end):
  text = image_sizes.ramp(min_size=low, max_size=high, start_epoch=start, end_epoch=end)
  points = image_sizes.parse(text)
  for epoch in range(90):
    assert image_sizes.at(points, epoch) == ffcv(epoch, low, high, start, end)
  assert len({size for _, size in points}) == len(points)


def test_a_ramp_that_falls_is_refused():
  with pytest.raises(ValueError, match="does not rise"):
    image_sizes.ramp(min_size=192, max_size=160, start_epoch=0, end_epoch=5)


@pytest.mark.parametrize(
  "text, words",
  [
    ("5:128", "begins at epoch 5; the first must be 0:PIXELS"),
    ("0:128, 9:160, 4:192", "where epoch 4 follows 9; write rising epochs"),
    ("0:128, 9:160, 9:192", "where epoch 9 follows 9"),
    ("0:128, 9", "write EPOCH:PIXELS, EPOCH:PIXELS"),
    ("0:128; 9:160", "write EPOCH:PIXELS, EPOCH:PIXELS"),
    ("0:0", "write EPOCH:PIXELS, EPOCH:PIXELS"),
    ("-1:128", "write EPOCH:PIXELS, EPOCH:PIXELS"),
  ],
)
def test_what_is_no_schedule_of_sizes_is_refused(text, words):
  config = tiny.get_config()
  config.data.image_sizes = text
  with pytest.raises(ConfigError) as error:
    config_lib.validate(config)
  assert words in str(error.value) and "config.data.image_sizes is" in str(error.value)
  assert "\n" not in str(error.value)


def test_a_size_that_the_devices_do_not_divide():
  config = tiny.get_config()
  config.data.image_sizes, config.mesh.space = "0:16, 2:22", 4
  with pytest.raises(ConfigError, match=r"image_sizes has 22, which config\.mesh\.space = 4 does"):
    config_lib.check_split(config, num_devices=4)
  config.data.image_sizes = "0:16, 2:24"
  config_lib.check_split(config, num_devices=4)


def test_a_family_whose_parameters_depend_on_the_size():
  config = outside.get_config()
  config.data.image_sizes = "0:16, 2:24"
  with pytest.raises(ConfigError, match="has 16 and 24, for which the model family"):
    program_lib.build(config, 64)


def test_sizes_of_a_program():
  config = tiny.get_config()
  config.total_steps, config.total_epochs = 0, 4.0
  config.data.image_sizes = "0:16, 1:24, 1.5:20, 3:24, 9:32"
  program = program_lib.build(config, 72)  # 9 steps an epoch
  assert program.lengths.sizes == ((0, 16), (9, 24), (14, 20), (27, 24), (81, 32))
  assert [program.lengths.image_size(s) for s in (0, 8, 9, 13, 14, 26, 27, 35)] == [
    *(16, 16, 24, 24, 20, 20, 24, 24)
  ]
  train = {"batch_size": 8}
  assert program.all_sizes("train") == [train | {"image_size": s} for s in (16, 24, 20)]
  assert program.all_sizes("train", 14) == [train | {"image_size": s} for s in (20, 24)]
  assert program.all_sizes("eval") == [program.sizes("eval")]
  assert program.sizes("train") == train | {"image_size": 32}
  # A resume with another batch size counts in batches of the new size.
  config.global_batch_size = 4
  later = program_lib.build(config, 72, offset=18 * 8 // 4 - 18).lengths
  assert [later.image_size(s) for s in (9, 10, 35, 36)] == [20, 20, 20, 24]


def test_batches_have_the_size_of_their_step_and_the_order_of_always(shards):
  data = tiny.get_config().data
  data.update(path=str(shards), workers=0, threads=0)
  source = sources.open_source(data, "train", 6)
  sizes = ((0, 16), (4, 24), (7, 20))

  def batches(count, **options):
    with contextlib.closing(
      loader.train_batches(source, data, seed=3, global_batch_size=8, **options)
    ) as made:
      return [{name: np.array(x) for name, x in next(made).items()} for _ in range(count)]

  plain = batches(10)
  grown = batches(10, sizes=sizes)
  assert [len(batch["image"][0]) for batch in grown] == [16] * 4 + [24] * 3 + [20] * 3
  for one, other in zip(plain, grown, strict=True):
    np.testing.assert_array_equal(one["label"], other["label"])
  for step in range(4):
    np.testing.assert_array_equal(plain[step]["image"], grown[step]["image"])
  # From any step, right at a change or between; and of the second of two hosts.
  for first in (4, 5):
    for one, other in zip(batches(4, first_step=first, sizes=sizes), grown[first:], strict=False):
      np.testing.assert_array_equal(one["image"], other["image"])
  second = batches(5, first_step=3, host=1, hosts=2, sizes=sizes)
  for one, other in zip(second, grown[3:], strict=False):
    np.testing.assert_array_equal(one["image"], other["image"][4:])
  # In shared memory of processes, which is reserved for the largest.
  data.workers = 2
  for one, other in zip(batches(8, first_step=2, sizes=sizes), grown[2:], strict=True):
    np.testing.assert_array_equal(one["image"], other["image"])


def test_stopped_anywhere_the_result_is_bitwise_the_same(tmp_path, shards, caplog):
  caplog.set_level(logging.INFO, logger="absl")
  config = tiny.get_config()
  config.data.path, config.total_steps = str(shards), 12
  config.data.image_sizes = "0:16, 0.5:24, 1:20"  # from steps 4 (4.5 of 9, to even) and 9 on
  quiet = train_lib.train(config, str(tmp_path / "quiet"))
  assert "Images of 24 px from step 5 on" in caplog.text
  assert "Images of 20 px from step 10 on" in caplog.text
  curves = events.read_scalars(tmp_path / "quiet" / "events")
  assert curves["train/image_size"][1].tolist() == [16] * 4 + [24] * 5 + [20] * 3
  assert quiet["examples"] == 29 and (tmp_path / "quiet" / "report.html").exists()
  # Asked once before it compiles, then by each step; a stop is met two steps later.
  stopped = []
  for n in (3, 5):
    workdir = tmp_path / f"stopped-{n}"
    with pytest.raises(Preempted):
      train_lib.train(config, str(workdir), StopAt(n))
    stopped.append(max(int(p.name) for p in (workdir / "checkpoints").iterdir()))
    train_lib.train(config, str(workdir))
    assert fingerprints(workdir, 12) == fingerprints(tmp_path / "quiet", 12)
  assert stopped == [4, 6]  # right at a change, and between two


def test_an_old_config_has_one_size():
  config = base.get_config()
  saved = config_lib.flatten(config)
  del saved["data.image_sizes"]
  assert config_lib.check_same_run(saved, config, "runs/a") == {}
  config.data.image_sizes = "0:128, 11:160"
  with pytest.raises(ConfigError, match=r"config\.resume\.allow=data\.image_sizes"):
    config_lib.check_same_run(saved, config, "runs/a")


@pytest.mark.slow
def test_two_hosts_resume_at_a_change_and_between(tmp_path, shards):
  """Bitwise on the same hosts; with averaged weights in shards, and raw ones evaluated beside."""
  overrides = (
    *("data.kind=auto", f"data.path={shards}", "data.image_sizes=0:16, 0.5:24, 1:20"),
    *("total_steps=12", "checkpoint.every_steps=1", "checkpoint.keep_last=20"),
    *("data.train_split=train[:90%]", "data.eval_split=train[90%:], val"),
    *("optimizer.ema_decay=0.9", "eval.raw=True", "sharding.opt_state=data"),
  )
  run(2, 1, trainer(tmp_path / "quiet", *overrides))
  quiet = json.loads((tmp_path / "quiet" / "final.json").read_text())
  assert quiet["examples"] == 7 and quiet["splits"]["val"]["examples"] == 29
  for hosts, devices, step in ((2, 1, 4), (2, 1, 6), (1, 1, 6)):
    again = tmp_path / f"{hosts}-from-{step}"
    shutil.copytree(tmp_path / "quiet", again)
    (again / "final.json").unlink()
    for folder in (again / "checkpoints").iterdir():
      if int(folder.name) > step:
        shutil.rmtree(folder)
    log = run(hosts, devices, trainer(again, *overrides))
    assert f"Resuming from checkpoint {step} of 12" in log
    final = json.loads((again / "final.json").read_text())
    assert final["loss"] == pytest.approx(quiet["loss"], rel=1e-4)
    assert final["splits"]["val"]["raw_loss"] == pytest.approx(
      quiet["splits"]["val"]["raw_loss"], rel=1e-4
    )
    if hosts == 2:
      assert fingerprints(again, 12) == fingerprints(tmp_path / "quiet", 12)
