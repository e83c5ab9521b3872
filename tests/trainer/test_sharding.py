"""Any layout over devices and hosts computes the same numbers, with no needless communication.

The runs themselves are those of tests/trainer/sharded.py, in processes with eight virtual devices.
"""

import contextlib
import json
import os
import subprocess
import sys
import types

import jax
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P
import numpy as np
import pytest

from configs import base
from tests.trainer.shared import free_port
from trainer import mesh as mesh_lib
from trainer import program as program_lib
from trainer.errors import ConfigError
from trainer.optimizer import OPTIMIZERS, make_optimizer
from trainer.state import make_init

RANDOM = ("random", "random micro-batches")
FLOAT32 = ("global", "device", "hosts", "checkpoint")
FLOAT64 = ("global", "group", "accumulation", "accumulation of groups", "one", "four", *RANDOM)
RTOL = {"float32": 1e-5, "float64": 1e-9}


def launch(*args, devices):
  environment = os.environ | {
    "JAX_NUM_CPU_DEVICES": str(devices),
    "JAX_ENABLE_X64": str(int(args[0] == "float64")),
  }
  return subprocess.Popen(
    [sys.executable, "-m", "tests.trainer.sharded", *args],
    env=environment,
    text=True,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )


def results(process):
  with process:
    try:
      out, log = process.communicate(timeout=600)
    except subprocess.TimeoutExpired:
      process.kill()
      raise
  assert process.returncode == 0, log
  return json.loads(out.splitlines()[-1])


@pytest.fixture(scope="module")
def seen():
  """{dtype: {family: {mode: what it showed}}}"""
  processes = {
    "float32": launch("float32", *FLOAT32, devices=8),
    "float64": launch("float64", *FLOAT64, "optimizers", "thin", devices=8),
  }
  try:
    return {dtype: results(process) for dtype, process in processes.items()}
  finally:
    for process in processes.values():
      with contextlib.suppress(ProcessLookupError):
        process.kill()


def assert_same(mode, reference, rtol):
  for name in ("loss", "top1", "grad_norm", "param_norm", "learning_rate"):
    np.testing.assert_allclose(mode[name], reference[name], rtol=rtol, err_msg=name)
  for a, b in zip(mode["batch_stats"], reference["batch_stats"], strict=True):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)
  assert mode["eval"] == pytest.approx(reference["eval"], rel=1e-5)  # its sums are float32
  assert mode["eval"]["examples"] == 10 * 29


@pytest.mark.parametrize(
  "dtype, family",
  [
    ("float32", "global"),
    ("float32", "device"),
    ("float64", "global"),
    ("float64", "group"),
    ("float64", "accumulation"),
    ("float64", "accumulation of groups"),
    ("float64", "random"),
    ("float64", "random micro-batches"),
  ],
)
def test_every_layout_computes_the_same(seen, dtype, family):
  modes = dict(seen[dtype][family])
  modes.pop("half", None)  # other groups, other numbers
  reference = next(iter(modes.values()))
  assert set(reference["dtypes"]) == {dtype, "int32"}
  assert reference["loss"][0] != reference["loss"][-1]
  for mode in modes.values():
    assert_same(mode, reference, RTOL[dtype])


def test_every_optimizer_updates_shards_as_it_does_whole_leaves(seen):
  """Trust ratios, clipping by unit and by norm are of whole leaves."""
  norms = seen["float64"]["optimizers"]
  assert set(norms) == set(OPTIMIZERS)
  for name, (whole, shards) in norms.items():
    np.testing.assert_allclose(shards, whole, rtol=1e-12, err_msg=name)
  assert len({tuple(whole[:3]) for whole, _ in norms.values()}) == len(norms)


def test_maps_of_few_rows_are_convolved_as_on_one_device(seen):
  """Split over `space`, such maps have wrong values and gradients; see models/convolution.py."""
  errors = seen["float64"]["thin"]
  assert errors.keys() == {"2", "4"} and max(errors.values()) < 1e-10


def test_groups_and_micro_batches_change_the_statistics(seen):
  losses = {
    name: tuple(next(iter(seen["float64"][name].values()))["loss"])
    for name in FLOAT64
    if name != "four" and name not in RANDOM
  }
  assert len(set(losses.values())) == len(losses)


def test_micro_batches_make_the_step_of_the_whole_batch(seen):
  one, four = seen["float64"]["one"]["1"], seen["float64"]["four"]["1"]
  for name in ("loss", "top1", "grad_norm", "param_norm"):
    np.testing.assert_allclose(four[name], one[name], rtol=1e-9, err_msg=name)
  # Four updates of the running averages in a step, where the whole batch makes one.
  assert four["batch_stats"] != one["batch_stats"]


def test_statistics_within_a_device_cross_no_device(seen):
  # One all-reduce is that of the gradients, with loss, accuracy and the mean of the running
  # averages in it; the other is the scalar by which hosts agree on stops and saves.
  assert seen["float32"]["device"]["device"]["train_collectives"] == {"all-reduce": 2}
  assert seen["float32"]["device"]["half"]["train_collectives"] == {"all-reduce": 2}
  group = {name: mode["train_collectives"] for name, mode in seen["float64"]["group"].items()}
  assert group["2"] == group["4"] == {"all-reduce": 2}
  assert group["8"]["all-reduce"] > 2  # two devices share a group


def test_norms_computed_together_send_their_moments_once(seen):
  group = {name: mode["train_collectives"] for name, mode in seen["float64"]["group"].items()}
  assert group["together"] == group["8"]


def test_collectives_are_those_of_the_layout(seen):
  found = {name: mode["train_collectives"] for name, mode in seen["float32"]["global"].items()}
  assert found["1"] == {}
  assert found["8"].keys() == {"all-reduce"}
  # One for each kernel that is sharded: the three smallest have no dimension that 8 divides.
  assert found["update"]["all-gather"] == 7 and found["fsdp"]["all-gather"] == 10
  assert found["update"].keys() == found["fsdp"].keys() == {"all-gather", "all-reduce"}
  assert found["space"].keys() == {"all-reduce", "collective-permute"}  # halos
  for family in ("global", "group", "accumulation"):
    assert "all-to-all" not in seen["float64"][family]["all"]["train_collectives"]
  assert seen["float32"]["global"]["8"]["eval_collectives"].keys() == {"all-reduce"}


def test_memory_is_that_of_a_shard(seen):
  modes = seen["float32"]["global"]
  eighths = [total for local, total in modes["update"]["momentum"].values() if 8 * local == total]
  wholes = [total for local, total in modes["update"]["momentum"].values() if local == total]
  assert (len(eighths), len(wholes)) == (7, 3) and max(wholes) < max(eighths)
  assert all(2 * local == total for local, total in modes["fsdp"]["params"].values())
  assert all(2 * local == total for local, total in modes["fsdp"]["momentum"].values())
  assert all(local == total for local, total in modes["update"]["params"].values())


def test_two_hosts_compute_the_same(seen):
  """Host h holds the h-th half of every batch; BN groups and shards cross from host to host."""
  port = str(free_port())
  hosts = [launch("float32", "hosts", port, str(process), devices=4) for process in range(2)]
  for host in [results(process) for process in hosts]:
    for name, mode in host["hosts"].items():
      assert_same(mode, seen["float32"]["hosts"][name], 1e-5)


def test_checkpoints_move_between_layouts(seen):
  assert seen["float32"]["checkpoint"] == {"1": True, "fsdp": True, "update": True, "born": True}


def specs(overrides, axes):
  """Returns {path: PartitionSpec} of the state of ResNet-50 with averaged weights."""
  config = base.get_config()
  config.optimizer.ema_decay = 0.9
  config.update_from_flattened_dict(overrides)
  shapes = jax.eval_shape(make_init(config, make_optimizer(config, lambda step: 0.1), 1)[1])
  shardings = mesh_lib.state_shardings(
    config, AbstractMesh(axes, ("data", "fsdp", "space")), shapes
  )
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): sharding.spec
    for path, sharding in jax.tree.leaves_with_path(shardings)
  }


def test_table_of_rules():
  assert set(specs({}, (4, 2, 1)).values()) == {P()}

  found = specs({"sharding.opt_state": "data"}, (4, 2, 1))
  for name, spec in found.items():
    kernel = name.startswith(("opt_state/", "ema/params/")) and name.endswith("kernel")
    assert (spec != P()) == kernel, name
  assert found["ema/params/stage4_block3/conv2/kernel"] == P(None, None, ("fsdp", "data"))
  assert found["ema/params/head/kernel"] == P(("fsdp", "data"))
  # 3 input channels: the stem is cut along its 64 outputs.
  assert found["ema/params/stem_conv/kernel"] == P(None, None, None, ("fsdp", "data"))

  found = specs({"sharding.params": "fsdp"}, (4, 2, 1))
  assert found["params/stage1_block1/conv1/kernel"] == P(None, None, ("fsdp",))
  assert found["ema/params/stage1_block1/conv1/kernel"] == P(None, None, ("fsdp",))
  assert found["params/head/bias"] == found["batch_stats/stem_bn/mean"] == found["step"] == P()

  # Over 512 devices of the batch 64 channels stay whole.
  found = specs({"sharding.opt_state": "data"}, (512, 1, 1))
  assert found["ema/params/stage1_block1/conv1/kernel"] == P()
  assert found["ema/params/stage4_block3/conv2/kernel"] == P(None, None, ("fsdp", "data"))


def test_description_counts_leaves_and_bytes():
  config = base.get_config()
  lines = mesh_lib.describe_shardings(program_lib.build(config, 1_281_167).abstract_state)
  params = next(line for line in lines if line.startswith("params"))
  for word in ("P()", "161 leaves", "97.49 MiB", "stage4_block1/conv2/kernel [3, 3, 512, 512]"):
    assert word in params


def devices(*numbers, slices=1):
  """Returns stand-ins for the devices of processes with so many devices each."""
  return [
    types.SimpleNamespace(id=i, process_index=process, slice_index=process * slices // len(numbers))
    for process, number in enumerate(numbers)
    for i in range(number)
  ]


@pytest.mark.parametrize(
  "fields, available, words",
  [
    (
      {"data": 3},
      devices(8),
      ["config.mesh.data", "config.mesh.fsdp", "config.mesh.space", "8 devices"],
    ),
    ({"fsdp": 3}, devices(8), ["config.mesh.fsdp", "8 devices"]),
    ({"space": 4}, devices(2, 2), ["config.mesh.space is 4", "2 devices of process 0"]),
    ({"fsdp": 8}, devices(4, 4, 4, 4, slices=4), ["config.mesh.fsdp", "8", "4 devices of slice 0"]),
  ],
)
def test_meshes_that_do_not_fit_are_refused_by_name(fields, available, words):
  config = base.get_config().mesh
  config.update(fields)
  with pytest.raises(ConfigError) as error:
    mesh_lib.make_mesh(config, available)
  for word in words:
    assert word in str(error.value)
