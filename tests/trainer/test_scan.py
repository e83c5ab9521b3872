"""A scanned net in training: the same run as the unrolled net, with the same checkpoints."""

import jax
import numpy as np
import pytest

from configs import base
from trainer import mesh as mesh_lib
from trainer import program as program_lib
from trainer.errors import ConfigError
from trainer.models import packing
from trainer.pod.requests import NOTHING
from trainer.state import path_name
from trainer.tools import depth

# Whatever takes a leaf by its name, its axes or its norm.
OPTIMIZER = {
  "name": "lars",
  "agc": 0.05,
  "no_agc": "^head",
  "no_decay": "^stage3",
  "freeze": "stage2_block[23]/conv1|stage1_block1",
  "lr_scales": "stage1_block2:0.5, ^stem:0.1",
  "weight_decay": 0.01,
  "clip_norm": 1.0,
  "ema_decay": 0.9,
  "warmup_epochs": 0.0,
}


def program_of(**fields):
  config = base.get_config("cifar_resnet")
  config.model.update(
    {"depth": 20, "width": 0.125, "num_classes": 10, "dtype": "float64", "bn_group": "2"}
    | {"zero_init_residual": False, **fields}
  )
  config.optimizer.update(OPTIMIZER)
  config.global_batch_size, config.accumulation_steps, config.data.image_size = 8, 2, 8
  config.total_epochs, config.total_steps = 0.0, 10
  return program_lib.build(config, 80)


def leaves_of(state):
  return {path_name(path): np.asarray(leaf) for path, leaf in jax.tree.leaves_with_path(state)}


def assert_close(state, expected):
  ours, theirs = leaves_of(state), leaves_of(expected)
  assert ours.keys() == theirs.keys()
  for name, leaf in theirs.items():
    np.testing.assert_allclose(
      ours[name], leaf, rtol=0, atol=1e-10 * max(1e-3, np.abs(leaf).max()), err_msg=name
    )


def test_a_scanned_run_is_the_unrolled_run():
  rng = np.random.default_rng(0)
  batch = {
    "image": rng.integers(0, 256, (8, 8, 8, 3), np.uint8),
    "label": rng.integers(0, 10, 8, np.int32),
  }
  with jax.enable_x64(True):
    plain, scanned = program_of(scan=False), program_of(scan=True)
    # One form of checkpoints, down to the state of the optimizer.
    assert scanned.abstract_checkpoint == plain.abstract_state == plain.abstract_checkpoint
    assert len(jax.tree.leaves(scanned.abstract_state)) < len(jax.tree.leaves(plain.abstract_state))
    states = [plain.init_state(), scanned.init_state()]
    first = leaves_of(states[0])
    for name, leaf in leaves_of(scanned.to_checkpoint(states[1])).items():
      np.testing.assert_array_equal(leaf, first[name], err_msg=name)
    requests = mesh_lib.flags(plain.mesh, NOTHING)
    batch = mesh_lib.to_global(plain.mesh, batch)
    plain_step, scanned_step = (p.compile("train", **p.sizes("train")) for p in (plain, scanned))
    (one, output), (packed, other) = (
      step(state, batch, requests)
      for step, state in zip((plain_step, scanned_step), states, strict=True)
    )
    np.testing.assert_allclose(other.metrics, output.metrics, rtol=1e-12)
    unpacked = scanned.to_checkpoint(packed)
    assert_close(unpacked, one)
    kept = leaves_of(packed)
    for name, leaf in leaves_of(scanned.from_checkpoint(unpacked)).items():
      np.testing.assert_array_equal(leaf, kept[name], err_msg=name)
    # Each goes on as the other, scanned from unrolled and unrolled from scanned.
    from_plain, from_scanned = scanned.from_checkpoint(one), unpacked
    crossed = scanned.to_checkpoint(scanned_step(from_plain, batch, requests)[0])
    assert_close(plain_step(from_scanned, batch, requests)[0], crossed)


@pytest.mark.parametrize(
  ("field", "pattern"),
  [("freeze", "block2/conv1"), ("no_decay", "stage1_block3/"), ("no_agc", "^stage2_block2")],
)
def test_patterns_take_scanned_blocks_alike(field, pattern, monkeypatch):
  monkeypatch.setitem(OPTIMIZER, field, pattern)
  with pytest.raises(ConfigError, match=rf"optimizer\.{field} is .* alike; config\.model\.scan"):
    program_of(dtype="float32", scan=True)


def test_packing_is_undone_by_unpacking():
  blocks = {f"stage1_block{i}": {"conv": {"kernel": np.full((2, 3), i)}} for i in range(1, 13)}
  tree = ({"head": np.zeros(1), **blocks, "stage2_block1": 0, "stage2_block2": 1}, [3, None])
  packed = packing.pack(tree)
  assert packed[0].keys() == {"head", "stage1_block1", "stage1_block2..12"} | {
    "stage2_block1",
    "stage2_block2",
  }
  name = "ema/stage1_block2..12/conv/kernel"
  assert packing.is_packed(name) and not packing.is_packed("ema/stage1_block2/conv/kernel")
  assert packing.names(name)[9] == "ema/stage1_block11/conv/kernel"
  back = packing.unpack(packed)
  assert jax.tree.structure(back) == jax.tree.structure(tree)
  jax.tree.map(np.testing.assert_array_equal, back, tree)


@pytest.mark.slow
def test_the_program_of_a_step_does_not_grow_with_depth():
  sizes = []
  for layers in (20, 44):
    config = depth.net_config(
      "cifar_resnet", layers, scan=True, remat="none", width=0.0625, image_size=8, batch_size=2
    )
    program = program_lib.build(config, 100)
    leaves = len(jax.tree.leaves(program.abstract_state))
    compiled = program.compile("train", **program.sizes("train"))
    sizes.append((leaves, len(compiled.as_text().splitlines())))
  (leaves, lines), (same, others) = sizes
  assert leaves == same and others < 1.02 * lines
