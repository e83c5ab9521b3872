"""`config.init_from`: what a new run begins with, and what is refused before anything compiles."""

import http.client
import json
import os
import subprocess
import sys
import types
import urllib.error
import urllib.request

import jax
import numpy as np
import pytest

from tests.trainer import tiny
from tests.trainer.shared import running
from trainer import program as program_lib
from trainer import train
from trainer.errors import DONE, FAILED, HOST_LOST, ConfigError, TrainerError
from trainer.weights import export, foreign, read, run_folder, safetensors, start
from trainer.weights import net as net_lib
from trainer.weights.errors import WeightsError
from trainer.workdir import storage

ALONE = types.SimpleNamespace(host=0, hosts=1, gather=lambda name, value: {0: value})


@pytest.fixture(scope="module")
def donor(tmp_path_factory):
  """A workdir with random weights of six classes, their leaves, and the same as safetensors."""
  config = tiny.get_config()
  config.data.kind = "synthetic"
  net = net_lib.build(config)
  leaves = net_lib.random_leaves(net)
  folder = tmp_path_factory.mktemp("donor")
  run_folder.write(str(folder / "run"), config, net, leaves, tuple("abcdef"))
  export.export(str(folder / "run"), "safetensors", str(folder / "weights.safetensors"))
  return folder, leaves


def begin(config, **fields):
  """Return the program, what was read, and the leaves of the state of step 0."""
  config.update(fields)
  program = program_lib.build(config, 64)
  found = start.read_start(program, ALONE)
  return program, found, start.make_state(program, found)


def flat(*variables):
  return {name: np.asarray(x) for name, x in net_lib.flatten(variables).items()}


def test_all_leaves_bit_for_bit_with_averages_and_a_new_optimizer(config, donor):
  config.optimizer.ema_decay = 0.9
  folder, leaves = donor
  program, found, state = begin(config, init_from=str(folder / "run"))
  assert not found.anew and not found.left_over and found.head
  assert found.classes == tuple("abcdef")
  assert f"{len(leaves)} loaded" in str(found) and "0 made anew; 0 left over" in str(found)
  for ours in (state.raw(), state.for_eval()):
    ours = flat(*ours)
    assert ours.keys() == leaves.keys()
    for name, leaf in leaves.items():
      np.testing.assert_array_equal(ours[name], leaf, strict=True)
  fresh = program.init_state()
  assert int(state.step) == 0
  jax.tree.map(np.testing.assert_array_equal, state.opt_state, fresh.opt_state)
  # A step donates the state: no two leaves may share their memory.
  pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state) if leaf.size]
  assert len(set(pointers)) == len(pointers)


def test_a_new_head_for_other_classes_and_what_is_excluded(config, donor):
  folder, leaves = donor
  config.model.num_classes = 4
  program, found, state = begin(
    config, init_from=str(folder / "weights.safetensors"), init_exclude="^stage3_block1/conv"
  )
  anew = {"head/bias", "head/kernel", "stage3_block1/conv1/kernel", "stage3_block1/conv2/kernel"}
  assert set(found.anew) == anew and not found.head
  assert set(found.left_over) == {
    "fc.bias",
    "fc.weight",
    "layer3.0.conv1.weight",
    "layer3.0.conv2.weight",
  }
  assert "4 made anew (head/bias, head/kernel, stage3_block1/conv1/kernel, ...)" in str(found)
  ours, drawn = flat(*state.raw()), flat(*program.init_state().raw())
  for name in ours:
    np.testing.assert_array_equal(ours[name], drawn[name] if name in anew else leaves[name])


@pytest.mark.parametrize(
  ("fields", "words"),
  [
    ({"model.depth": 14}, ["does not fit config.model (CIFAR ResNet-14", "layer1.1.", "depth=8"]),
    ({"model.width": 0.5}, ["of another shape", "instead of"]),
    ({"init_from": "nowhere.pth"}, ["config.init_from: There is no file or folder nowhere.pth"]),
    ({"init_from": "https://x.y/z.pth"}, ["config.init_from", "no checksum"]),
    ({"init_exclude": "^stem/"}, ["init_exclude is '^stem/'", "no leaf of the model matches"]),
    ({"init_exclude": "."}, ["init_exclude is '.'", "leaves nothing"]),
  ],
)
def test_refused_in_one_sentence(config, donor, fields, words):
  config.init_from = str(donor[0] / "weights.safetensors")
  for name, value in fields.items():
    section, _, leaf = name.rpartition(".")
    (config[section] if section else config)[leaf] = value
  with pytest.raises(TrainerError) as caught:
    start.read_start(program_lib.build(config, 64), ALONE)
  assert all(word in str(caught.value) for word in words), caught.value
  assert "\n" not in str(caught.value)


def test_a_smaller_net_does_not_take_a_part_of_a_larger_one(config, donor, tmp_path):
  """Every leaf of the smaller one is there, in its shape; what is left over gives it away."""
  config.model.depth = 14
  net = net_lib.build(config)
  file = tmp_path / "deep.safetensors"
  tensors = {
    net.torch_name(leaf): foreign.theirs(leaf, net.torch_name(leaf), array)
    for leaf, array in net_lib.random_leaves(net).items()
  }
  file.write_bytes(b"".join(safetensors.encode(tensors, {})))
  config.model.depth, config.init_from = 8, str(file)
  program = program_lib.build(config, 64)
  with pytest.raises(TrainerError, match=r"without a place in the model .*depth=14"):
    start.read_start(program, ALONE)
  config.init_exclude = r"^layer\d\.1"
  found = start.read_start(program, ALONE)
  assert not found.anew and len(found.left_over) == 30


def test_hosts_that_read_other_weights_end_together(config, donor):
  config.init_from = str(donor[0] / "weights.safetensors")
  program = program_lib.build(config, 64)

  def pod(answer):
    return types.SimpleNamespace(host=0, hosts=2, gather=lambda name, own: {0: own, 1: answer})

  with pytest.raises(ConfigError, match=r"Host 1 reads other weights at config\.init_from"):
    start.read_start(program, pod(["", "another digest", DONE]))
  for code in (FAILED, HOST_LOST):
    with pytest.raises(TrainerError, match=r"Host 1: config\.init_from: There is no") as error:
      start.read_start(program, pod(["config.init_from: There is no x.", "", code]))
    assert error.value.exit_code == code
  assert start.read_start(
    program, pod(["", read.digest(start.read_start(program, ALONE).leaves), DONE])
  ).leaves


class Silent(Exception):
  """As gcsfs raises it."""

  __module__ = "gcsfs.retry"

  def __init__(self, code):
    super().__init__(code)
    self.code = code


@pytest.mark.parametrize(("status", "code"), [(503, HOST_LOST), (403, FAILED)])
@pytest.mark.parametrize("at", ["is_dir", "read_bytes", "iterdir", "checkpoint"])
def test_a_silent_bucket_of_weights_may_answer_a_rerun(donor, monkeypatch, status, code, at):
  origin = donor[0] / ("weights.safetensors" if at == "read_bytes" else "run")

  def fail(*unused, **options):
    if at != "checkpoint":
      raise Silent(status)
    error = Exception("as Orbax wraps what TensorStore raises")
    word = "UNAVAILABLE" if status == 503 else "PERMISSION_DENIED"
    raise error from ValueError(f"{word}: Error reading gs://bucket/run/checkpoints")

  if at == "checkpoint":
    monkeypatch.setattr(run_folder, "_read_step", fail)
  else:
    monkeypatch.setattr(type(storage.path_of(str(origin))), at, fail)
  with pytest.raises(WeightsError, match=r"cannot be read .*the same command again\.$") as error:
    read.load(str(origin))
  assert error.value.exit_code == code


@pytest.mark.parametrize(
  ("reason", "code"),
  [
    (urllib.error.HTTPError("https://x.y", 503, "busy", None, None), HOST_LOST),
    (urllib.error.HTTPError("https://x.y", 404, "no", None, None), FAILED),
    (urllib.error.URLError(TimeoutError("timed out")), HOST_LOST),
    (http.client.IncompleteRead(b""), HOST_LOST),
  ],
  ids=str,
)
def test_an_address_that_does_not_answer_may_answer_a_rerun(monkeypatch, reason, code):
  def urlopen(*unused, **options):
    raise reason

  monkeypatch.setattr(urllib.request, "urlopen", urlopen)
  with pytest.raises(WeightsError, match=r"cannot be read") as error:
    read.load("https://x.y/net-01234567.pth")
  assert error.value.exit_code == code


def test_a_run_begins_with_them_and_a_resume_never_reads_them(config, donor, tmp_path, caplog):
  caplog.set_level("INFO")
  folder, leaves = donor
  config.update(init_from=str(folder / "run"), total_steps=2)
  config.optimizer.update(freeze="^stem|^stage1|^stage2|^stage3", ema_decay=0.5)
  config.log.every_steps = 2
  first = train.train(config, str(tmp_path / "run"))
  assert "0 made anew" in caplog.text
  _, after, _ = run_folder.read(str(tmp_path / "run"), averaged=False)
  changed = {name for name in leaves if not np.array_equal(after[name], leaves[name])}
  assert changed == {"head/kernel", "head/bias"}  # with running averages of all batch norms
  config.init_from = "nowhere"
  caplog.clear()
  assert train.train(config, str(tmp_path / "run"))["loss"] == first["loss"]
  assert "config.init_from is not read" in caplog.text


PLACED = """
import json, sys
import jax, numpy as np
from tests.trainer import test_start, tiny
from trainer.weights import net as net_lib, run_folder
config = tiny.get_config()
config.mesh.fsdp, config.sharding.params, config.sharding.opt_state = 2, "fsdp", "data"
config.optimizer.ema_decay, config.model.num_classes, config.model.width = 0.9, 8, 2.0
program, found, state = test_start.begin(config, init_from=sys.argv[1])
like = jax.tree.map(lambda x, y: x.sharding.is_equivalent_to(y.sharding, x.ndim),
                    state, program.abstract_state)
parts = sum(not x.is_fully_replicated for x in jax.tree.leaves(state))
equal = all(np.array_equal(x, found.leaves[name])
            for name, x in test_start.flat(*state.raw()).items() if name in found.leaves)
print(json.dumps([all(jax.tree.leaves(like)), parts, equal, list(found.anew)]))
"""


def test_each_leaf_is_placed_as_a_new_one(tmp_path):
  """On four devices, parameters over two of them, the state of the optimizer over all."""
  config = tiny.get_config()
  config.model.width = 2.0
  net = net_lib.build(config)
  run_folder.write(str(tmp_path), config, net, net_lib.random_leaves(net), ())
  ended = subprocess.run(
    [sys.executable, "-c", PLACED, str(tmp_path)],
    env=os.environ | {"JAX_NUM_CPU_DEVICES": "4"},
    capture_output=True,
    text=True,
    check=False,
  )
  assert ended.returncode == 0, ended.stderr
  placed, parts, equal, anew = json.loads(ended.stdout.splitlines()[-1])
  assert placed and equal and parts > 10 and anew == ["head/bias", "head/kernel"]


@pytest.mark.slow
def test_two_hosts_begin_with_the_weights_of_a_workdir(donor, tmp_path):
  flags = {
    "workdir": tmp_path / "run",
    "config": tiny.__file__,
    "config.data.kind": "synthetic",
    "config.init_from": donor[0] / "run",
    "config.optimizer.freeze": "^stem|^stage",
    "config.total_steps": 2,
  }
  command = [sys.executable, "-m", "trainer", *(f"--{key}={value}" for key, value in flags.items())]
  with running(2, 2, command) as pod:
    pod.finish()
    assert pod.codes() == {0: 0, 1: 0}, pod.log[-3000:]
  _, after, about = run_folder.read(str(tmp_path / "run"), averaged=False)
  assert about.step == 2
  for name, leaf in donor[1].items():
    assert np.array_equal(after[name], leaf) == (not name.startswith("head/"))
