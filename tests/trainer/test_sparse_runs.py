"""Sparse runs by the command: equal masks on any topology, exact resumes, zeros in the files."""

import json
import shutil

import jax
import numpy as np
import pytest

from configs import base
from tests.trainer import tiny
from tests.trainer.shared import ENVIRONMENT, StopAt, fingerprints, run, trainer
from tests.trainer.test_sparse import flat, take
from trainer import program as program_lib
from trainer import train as train_lib
from trainer.errors import ConfigError, Preempted
from trainer.weights import read

FSDP = ("mesh.fsdp=2", "sharding.params=fsdp")
UPDATE = ("sharding.opt_state=data",)
RIGL = ("sparsity.name=rigl", "sparsity.every_steps=2", "sparsity.end_steps=9")


def masks_of(workdir, step):
  return {n: h for n, h in fingerprints(workdir, step).items() if n.startswith("masks/")}


@pytest.mark.slow
def test_masks_are_equal_on_any_topology_and_after_a_resume_on_another(tmp_path, monkeypatch):
  monkeypatch.setitem(ENVIRONMENT, "JAX_ENABLE_X64", "1")
  fields = (*RIGL, "model.dtype=float64", "global_batch_size=16", "eval.batch_size=16")
  saves = ("checkpoint.every_steps=4", "checkpoint.keep_last=9", "optimizer.ema_decay=0.9")
  layouts = [(1, 1, ()), (1, 2, UPDATE), (1, 4, FSDP + UPDATE), (2, 2, FSDP)]
  seen = []
  for hosts, devices, layout in layouts:
    workdir = tmp_path / f"{hosts}x{devices}"
    run(hosts, devices, trainer(workdir, *fields, *saves, *layout))
    seen.append([masks_of(workdir, step) for step in (4, 8, 10)])
  assert seen[0][0] and seen[0][0] != seen[0][1]
  for other in seen[1:]:
    assert other == seen[0]
  # From step 4 of one device on, by two hosts.
  moved = tmp_path / "moved"
  shutil.copytree(tmp_path / "1x1", moved)
  for step in (8, 10):
    shutil.rmtree(moved / "checkpoints" / str(step))
  (moved / "final.json").unlink()
  log = run(2, 2, trainer(moved, *fields, *saves, *FSDP, *UPDATE))
  assert "Resuming from checkpoint 4 of 10" in log
  assert [masks_of(moved, step) for step in (4, 8, 10)] == seen[0]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rigl", "gradual"])
def test_a_scanned_net_is_the_unrolled_net(name):
  def program_of(scan):
    config = tiny.get_config()
    config.model.update({"depth": 20, "dtype": "float64", "scan": scan, "width": 0.25})
    config.model.zero_init_residual = False
    config.sparsity.update(name=name, every_steps=1, sparsity=0.7)
    return program_lib.build(config, 64)

  with jax.enable_x64(True):
    plain, scanned = program_of(False), program_of(True)
    assert scanned.abstract_checkpoint == plain.abstract_state
    assert plain.sparse.layers == sorted(scanned.sparse.layers, key=plain.sparse.layers.index)
    states = [program.init_state() for program in (plain, scanned)]
    steps = [program.compile("train", **program.sizes("train")) for program in (plain, scanned)]
    for number in range(4):
      masks = flat(scanned.to_checkpoint(states[1]).masks)
      assert len(masks) > 10
      for leaf, mask in flat(states[0].masks).items():
        np.testing.assert_array_equal(masks[leaf], mask, err_msg=f"{number} {leaf}")
      states = [
        jax.device_put(take(program, step, state, number)[0], program.state_shardings())
        for program, step, state in zip((plain, scanned), steps, states, strict=True)
      ]


def test_patterns_take_scanned_blocks_alike():
  config = base.get_config("cifar_resnet")
  config.model.update(depth=20, scan=True)
  config.sparsity.update(name="static", dense="stage1_block2/")
  with pytest.raises(ConfigError, match=r"sparsity\.dense is .* alike; config\.model\.scan"):
    program_lib.build(config, 64)


@pytest.mark.slow
def test_a_run_stopped_anywhere_its_files_and_what_begins_with_it(tmp_path):
  config = tiny.get_config()
  config.data.kind, config.optimizer.ema_decay = "synthetic", 0.9
  config.sparsity.update(name="set", every_steps=2, end_steps=9)
  quiet, stopped = tmp_path / "quiet", tmp_path / "stopped"
  train_lib.train(config, str(quiet))
  with pytest.raises(Preempted):
    train_lib.train(config, str(stopped), StopAt(5))
  train_lib.train(config, str(stopped))
  assert fingerprints(stopped, 10) == fingerprints(quiet, 10)
  text = (quiet / "overview.txt").read_text()
  assert "sparsity  set, erk: 1,001 of 4,972 weights (20.1 %)" in text
  assert "stage3_block1/conv2/kernel" in text.partition("sparse leaves")[2]
  lines = [json.loads(line) for line in (quiet / "metrics.jsonl").read_text().splitlines()]
  curves = [line for line in lines if "train/density" in line]
  assert len(curves) == 10
  for line in curves:
    assert line["train/density"] == pytest.approx(1001 / 4972, rel=1e-6)
  assert [line["step"] for line in curves if line["train/mask_changed"] > 0] == [1, 3, 5, 7, 9]
  tensors = read.load(str(quiet)).tensors
  kept = sum(np.count_nonzero(t) for name, t in tensors.items() if t.ndim > 1)
  assert kept == 1001
  # A field that decides how many weights a layer has is refused in a resume by name.
  config.sparsity.sparsity = 0.5
  with pytest.raises(ConfigError, match=r"config\.sparsity\.sparsity: 0\.8 -> 0\.5"):
    train_lib.train(config, str(quiet))
  config.sparsity.sparsity, config.init_from, config.total_steps = 0.8, str(quiet), 1
  config.sparsity.update(name="static", every_steps=100, end_steps=0)
  train_lib.train(config, str(tmp_path / "later"))
  tensors = read.load(str(tmp_path / "later")).tensors
  assert sum(np.count_nonzero(t) for t in tensors.values() if t.ndim > 1) == 1001
