"""A bit that flips in one device's copy is found, named, and never saved.

The flips are those of tests/trainer/replicas.py, on virtual devices.
"""

import json
import re
import subprocess
import sys

import jax
from jax.sharding import AbstractMesh, NamedSharding
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from tests.trainer.replicas import CASES
from tests.trainer.shared import ENVIRONMENT, fingerprints, run, trainer
from trainer.errors import DONE, HOST_LOST
from trainer.replicas import Leaf, copied, hash_each


@pytest.fixture(scope="module")
def seen():
  """{case: what it showed}"""
  result = subprocess.run(
    [sys.executable, "-m", "tests.trainer.replicas"],
    capture_output=True,
    text=True,
    env=ENVIRONMENT | {"JAX_NUM_CPU_DEVICES": "8"},
  )
  assert result.returncode == 0, result.stderr
  return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_a_flipped_bit_is_found_and_named(seen, case):
  _, leaf, devices = CASES[case]
  found = seen[case]
  assert found["differs"] == [0, 1]
  start = f"After step 4, {leaf} "
  sentence = found["sentence"]
  assert sentence.startswith(start) and "Nothing of it was saved" in sentence
  named = [int(number) for number in re.findall(r"device (\d) of host 0", sentence)]
  if case == "half of them":
    assert named == [0, 1, 2] and "5 more are not the same, and nothing shows" in sentence
  elif case == "height":  # a shard that two devices have
    assert named == [0, 1] and "are not the same, and nothing shows which is right" in sentence
  else:
    assert named == devices and "not what the other devices have" in sentence


def test_one_small_collective(seen):
  found = seen["params"]
  leaves = found["leaves"]
  assert leaves == found["all leaves"]  # without shards, every leaf is on all devices
  assert found["collectives"] == [["all-reduce", 8, 2 * 4 * leaves]]
  # With shards one for each set of axes, and a word for all; what no device shares is left out.
  both = seen["params beside shards of the update"]
  assert both["leaves"] < both["all leaves"]
  assert [kind for kind, *_ in both["collectives"]] == 3 * ["all-reduce"]
  assert sum(size for *_, size in both["collectives"]) == 2 * 4 * both["leaves"] + 4


def test_a_device_that_computes_another_gradient_is_named(seen):
  assert "After step 8, the gradient of " in seen["gradients"]
  assert "on device 5 of host 0 are not what the other devices have" in seen["gradients"]


def test_which_leaves_have_copies():
  mesh = AbstractMesh((4, 2, 1), ("data", "fsdp", "space"))

  def leaf(*spec):
    return jax.ShapeDtypeStruct((8, 8), np.float32, sharding=NamedSharding(mesh, P(*spec)))

  state = {"a": leaf(), "b": leaf(None, "fsdp"), "c": leaf(("fsdp", "data")), "d": leaf("data")}
  assert copied(state, mesh) == {
    0: Leaf("a", ("data", "fsdp")),
    1: Leaf("b", ("data",)),
    3: Leaf("d", ("fsdp",)),
  }


def test_every_bit_of_every_leaf_counts():
  leaves = [
    np.arange(4, dtype=np.float32),
    np.arange(6, dtype=np.float32).reshape(2, 3),
    np.arange(4, dtype=np.float32) + 1,
    np.int32(7),
    np.arange(4, dtype=np.int32),
    np.zeros((2, 2), jax.numpy.bfloat16),
  ]
  hashes = jax.jit(hash_each)(leaves)
  assert hashes.shape == (6,) and len(set(hashes.tolist())) == 6
  for place, leaf in enumerate(leaves):
    for number in range(leaf.size):
      for bit in (0, 8 * leaf.dtype.itemsize - 1):
        other = np.array(leaf)
        words = other.reshape(-1).view(f"u{leaf.dtype.itemsize}")
        words[number] ^= words.dtype.type(1 << bit)
        changed = jax.jit(hash_each)([*leaves[:place], other, *leaves[place + 1 :]])
        assert (changed != hashes).tolist() == [i == place for i in range(6)]


STEPS = ("checkpoint.every_steps=4", "checks.replicas_every_steps=3", "checkpoint.keep_last=9")
SHARDS = ("mesh.fsdp=2", "sharding.params=fsdp", "sharding.opt_state=data")


@pytest.mark.parametrize(
  "hosts, fields", [(1, ()), pytest.param(2, SHARDS, marks=pytest.mark.slow)], ids=["1x4", "2x4"]
)
def test_a_run_leaves_before_it_saves_a_wrong_state(tmp_path, hosts, fields):
  quiet, broken = tmp_path / "quiet", tmp_path / "broken"

  def command(workdir, *front):
    return [sys.executable, "-m", *front, *trainer(workdir, *STEPS, *fields)[3:]]

  # With tests of the devices besides, which find nothing and change nothing.
  run(hosts, 4, [*command(quiet, "trainer"), "--config.checks.recompute_every_steps=3"])
  # A bit flips after step 7. Step 9 is compared by its number, step 8 because it is saved.
  flipping = command(broken, "tests.trainer.replicas", "7", str(hosts - 1))
  log = run(hosts, 4, flipping, HOST_LOST)
  where = rf"on device \d+ of host {hosts - 1} is not what the other devices have"
  assert re.search(rf"After step 8, params/head/bias {where}", log), log
  assert "Traceback" not in log
  saved = [int(path.name) for path in (broken / "checkpoints").iterdir() if path.name.isdigit()]
  assert saved == [4] and fingerprints(broken, 4) == fingerprints(quiet, 4)
  assert "Resuming from checkpoint 4 of 10" in run(hosts, 4, flipping, DONE)
  assert fingerprints(broken, 10) == fingerprints(quiet, 10)
