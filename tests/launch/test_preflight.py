"""What a run would be on a TPU is said without one; what cannot be is said in one sentence."""

import dataclasses
import importlib.util
import io
import json
import pathlib
import signal
import subprocess
import sys
import types

from etils import epath
import jax
import pytest

from configs import imagenet_resnet50, smoke
from launch import preflight as preflight_lib
from launch import (
  preflight_checks,
  preflight_compile,
  preflight_table,
  preflight_text,
)
from tests.trainer import tiny
from trainer import program as program_lib
from trainer.errors import ConfigError
from trainer.pod.pod import Pod
from trainer.workdir.checkpoint import Checkpointer

ROOT = pathlib.Path(__file__).parents[2]
TINY = "--config=tests/trainer/tiny.py"

needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu, of pip install -e '.[tpu]', is not installed",
)


def preflight(*args, without=()):
  code = "".join(f"sys.modules[{name!r}] = None; " for name in without)
  return subprocess.run(
    [
      sys.executable,
      "-c",
      "import sys; " + code + "from launch import preflight; sys.exit(preflight.main(sys.argv))",
      *args,
    ],
    capture_output=True,
    text=True,
    cwd=ROOT,
  )


def assert_refused(result, *words, code=2):
  assert result.returncode == code
  assert "Traceback" not in result.stderr
  sentence = result.stderr.splitlines()[-1]
  for word in ("preflight: ", *words):
    assert word in sentence


@pytest.mark.parametrize(
  "args, words",
  [
    ([], ["--topology=v5e:4x4 and --config=configs/X.py are needed"]),
    (["--topology=v5e:2x2"], ["--config"]),
    (["--topology=v5e:2x2", "--config=nowhere.py"], ["nowhere.py"]),
    (["--topology=v5e:2x2", TINY, "--config.model.dept=20"], ["dept"]),
    (["--topology=v5e:2x2", TINY, "--slices=0"], ["slices"]),
  ],
)
def test_command_line(args, words):
  assert_refused(preflight(*args), *words)


def test_without_libtpu():
  assert_refused(
    preflight("--topology=v5e:2x2", TINY, without=["libtpu"]), "pip install -e '.[tpu]'"
  )


@needs_libtpu
@pytest.mark.parametrize(
  "args, words",
  [
    (
      ["--topology=v5e:3x3", TINY],
      ["--topology=v5e:3x3", "not divisible", "Of v5e there are v5e:1x1, v5e:2x2, v5e:2x4"],
    ),
    (
      ["--topology=v9:2x2", TINY],
      ["--topology=v9:2x2", "Invalid", "for example, v2:4x4", "v5e:2x2", "tpu7x:2x2x2"],
    ),
    (
      ["--topology=v5e:2x2", TINY, "--config.global_batch_size=6"],
      ["config.global_batch_size is 6", "4 devices"],
    ),
    (["--topology=v5e:2x2", TINY, "--config.mesh.fsdp=3"], ["config.mesh.fsdp", "4 devices"]),
  ],
)
def test_what_does_not_fit(args, words):
  assert_refused(preflight(*args), *words)


@needs_libtpu
def test_memory_that_does_not_suffice():
  result = preflight(
    "--topology=v5e:2x2", TINY, "--config.data.image_size=1024", "--config.global_batch_size=4096"
  )
  assert_refused(
    result,
    "train step, 4096 images of 1024 px",
    "memory",
    "too much",
    "config.accumulation_steps",
    "--find_batch",
    code=preflight_compile.DOES_NOT_FIT,
  )


@needs_libtpu
def test_step_of_a_small_net(tmp_path):
  result = preflight(
    "--topology=v5e:2x2",
    TINY,
    "--config.model.bn_group=device",
    "--config.data.image_sizes=0:16, 0.00003:24",
    "--dollars_per_chip_hour=1.2",
    f"--compiled={tmp_path}",
    "--json",
  )
  assert result.returncode == 0, result.stderr
  report = json.loads(result.stdout)
  assert (report["chips"], report["hosts"], report["slices"]) == (4, 1, 1)
  assert report["mesh"] == {"data": 4, "fsdp": 1, "space": 1}
  steps = report["steps"]
  assert [(step["mode"], step["image_size"]) for step in steps] == [
    ("train", 16),
    ("train", 24),
    ("eval", 16),
  ]
  for step in steps:
    assert step["memory"]["total"] == sum(
      size for part, size in step["memory"].items() if part != "total"
    )
    assert sum(step["cycles_by_kind"].values()) == pytest.approx(step["cycles"], rel=1e-3)
    assert sum(step["cycles_by_layer"].values()) == pytest.approx(step["cycles"], rel=1e-2)
    assert "stage3_block1/conv2" in step["cycles_by_layer"]
    assert not step["open_loops"]
    # The gradients, or counts: no statistics of batch norm cross devices.
    assert {each["kind"] for each in step["collectives"]} == {"all-reduce"}
    assert all(each["axes"] == ["data"] for each in step["collectives"])
    assert not any(each["crosses_slices"] for each in step["collectives"])
    assert step["ms"] > step["floors_ms"]["arithmetic"] > 0
    assert not step["norm_groups"]
    assert all(each["as_asked"] for each in step.get("as_asked", []))
  assert "weight gradient" in steps[0]["cycles_by_kind"]
  assert "weight gradient" not in steps[2]["cycles_by_kind"]
  assert steps[1]["cycles"] > steps[0]["cycles"]
  assert [each["what"] for each in steps[0]["as_asked"]] == ["batch norm", "sharding"]
  # The programs are where a host would find them, under keys of the same parts.
  programs = report["programs"]
  assert programs["folder"] == str(tmp_path)
  assert programs["files"] == {file.name: file.stat().st_size for file in tmp_path.iterdir()}
  names = [name.partition("-")[0] for name in programs["files"]]
  assert sorted(names) == ["jit_eval_step", "jit_train_step", "jit_train_step"]
  assert len(set(programs["key"]["computation"])) == 3
  assert len(set(programs["key"]["accelerator_config"])) == 1
  assert report["run"]["train_steps"] == 10
  assert report["run"]["dollars"] == pytest.approx(1.2 * report["run"]["chip_hours"])
  # Progress, and nothing that libtpu writes by itself.
  assert all(" step, 8 images of " in line for line in result.stderr.splitlines())
  text = preflight_text.text(report | {"largest_batch_per_chip": 24})
  for words in (
    "v5e:2x2: 4 chips",
    "all-reduce over data (4 devices)",
    "24 images a chip",
    "dollars",
  ):
    assert words in text


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
  "limit, code, words",
  [
    ("-Ss 8192", 0, []),
    ("-s 8192", -signal.SIGSEGV, ["preflight: stacks are limited here (ulimit -Hs)"]),
  ],
)
def test_stacks_are_unlimited_where_they_may_be(limit, code, words):
  """With 8 MiB, the limit of most systems, libtpu crashes on this step."""
  command = f"ulimit {limit} && exec {sys.executable} -m launch.preflight --topology=v6e:2x2 {TINY}"
  result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT)
  assert result.returncode == code, result.stderr
  assert all(word in result.stderr for word in words)


@needs_libtpu
def test_update_in_shards_is_scattered_in_two_steps():
  result = preflight(
    "--topology=v5e:4x4",
    TINY,
    "--config.model.width=4",
    "--config.model.bn_group=device",
    "--config.global_batch_size=16",
    "--config.eval.batch_size=16",
    "--config.mesh.fsdp=4",
    "--config.sharding.opt_state=data",
  )
  assert result.returncode == 0, result.stderr
  # One step over all 16 chips would be an all-reduce.
  assert "reduce-scatter over fsdp (4 devices)" in result.stdout
  assert "all-gather over data and fsdp (16 devices)" in result.stdout
  assert "sharding, as asked: opt_state in shards" in result.stdout
  assert "batch norm, as asked: model.bn_group=device: nothing crosses devices" in result.stdout


@pytest.fixture(scope="module")
def program():
  config = tiny.get_config()
  config.model.bn_group = "4"
  return program_lib.build(config, 64, jax.devices()[:1])


@pytest.mark.parametrize(
  "groups, gathered, agree",
  [({}, 0, [True, True]), ({2: 14}, 0, [False, True]), ({}, 30_000, [True, False])],
)
def test_what_is_not_as_asked(program, groups, gathered, agree):
  step = {"norm_groups": groups, "collectives": [{"kind": "all-gather", "bytes": gathered}]}
  found = preflight_checks.as_asked(step, program)
  assert [each["as_asked"] for each in found] == agree


def test_whether_a_checkpoint_restores(program, tmp_path):
  with pytest.raises(ConfigError, match="holds no checkpoint"):
    preflight_checks.checkpoint(str(tmp_path), program)
  checkpointer = Checkpointer(Pod(program.config.pod), epath.Path(tmp_path), program.config, 0)
  checkpointer.save_and_wait(7, program.init_state(), {"best": None, "wall_seconds": {}})
  checkpointer.close()
  before = sorted(tmp_path.rglob("*"))
  found = preflight_checks.checkpoint(str(tmp_path), program)
  assert (found["step"], found["of"], found["changes"]) == (7, 10, {})
  assert found["leaves"] > 2 * len(jax.tree.leaves(program.abstract_state.params))
  text = "\n".join(preflight_text._checkpoint(found))
  assert "restores onto this topology: step 7 of 10" in text

  def other(**fields):
    config = program.config.copy_and_resolve_references()
    config.update_from_flattened_dict(fields)
    return program_lib.build(config, 64, jax.devices()[:1])

  with pytest.raises(ConfigError, match=r"another config \(config.model.width"):
    preflight_checks.checkpoint(str(tmp_path), other(**{"model.width": 0.5}))
  # Of a version whose leaves have other shapes.
  wider = dataclasses.replace(other(**{"model.width": 0.5}), config=program.config)
  with pytest.raises(ConfigError, match=r"step 7 has \S+ with shape \S+, this config with shape"):
    preflight_checks.checkpoint(str(tmp_path), wider)
  assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("most", [0, 1, 5, 8, 9, 23, 100])
def test_largest_that_fits(most):
  asked = []

  def fits(n):
    asked.append(n)
    return n <= most

  assert preflight_lib.largest(fits, 8) == most
  assert len(asked) == len(set(asked)) <= 11
  if most >= 8:
    asked.clear()
    assert preflight_lib.largest(fits, 8, known=True) == most and 8 not in asked


@pytest.mark.parametrize("most, fits_now", [(1000, True), (100_000, True), (96, False), (1, False)])
def test_no_batch_is_compiled_twice_and_none_is_longer_than_the_run(monkeypatch, most, fits_now):
  """A batch of which the run has one step only is tried as any other: its warm-up is scaled."""
  config, asked = smoke.get_config(), []
  config.global_batch_size = 128

  def compiled(program, lowered, mode, sizes, screen):
    asked.append(sizes["batch_size"])
    if sizes["batch_size"] > most:
      raise preflight_compile.DoesNotFitError("They do not fit.")

  monkeypatch.setattr(preflight_compile, "lower", lambda *_: None)
  monkeypatch.setattr(preflight_compile, "compile_step", compiled)
  program = program_lib.build(config, smoke.EXAMPLES)
  found = preflight_lib._find_batch(program, smoke.EXAMPLES, 1, sys.stderr, fits_now)
  assert most - (16 if fits_now else 2) < found <= most and len(asked) == len(set(asked))
  assert (128 in asked) == (not fits_now)


@pytest.mark.slow
@needs_libtpu
def test_the_largest_batch_of_a_config_that_does_not_fit():
  result = preflight(
    *("--topology=v5e:1x1", TINY, "--find_batch"),
    *("--config.data.image_size=1024", "--config.global_batch_size=4096"),
  )
  assert_refused(result, "do not fit", "images a chip fit", code=preflight_lib.DOES_NOT_FIT)
  assert "--find_batch finds" not in result.stderr
  most = int(result.stderr.split("--config.global_batch_size=")[1].split(".")[0])
  assert 0 < most < 4096


@pytest.mark.parametrize(
  "fields, first, others, slow",
  [
    (
      {},
      "Use more chips",
      ["double config.accumulation_steps", "or set config.model.remat"],
      False,
    ),
    ({"accumulation_steps": 8}, "Set config.model.remat=blocks", ["double"], True),
    ({"accumulation_steps": 8, "model.remat": "blocks"}, "Use more", ["or double"], True),
    ({"accumulation_steps": 64}, "Set config.model.remat=blocks", ["or halve"], True),
  ],
)
def test_what_to_change_where_a_training_step_does_not_fit(fields, first, others, slow):
  """Before micro-batches of so few images that a step takes twice as long, blocks twice."""
  config = imagenet_resnet50.get_config()
  config.update_from_flattened_dict(fields)
  words = preflight_checks.advice(config, "train", 16)
  assert words.startswith(first) and "--find_batch" in words
  assert all(each in words for each in others)
  assert ("fewer than 8 a step takes" in words) == slow


def test_what_to_change_where_an_evaluation_does_not_fit():
  """Training batches and their micro-batches have no part in it."""

  def finish(lowered, mode):
    raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Used 20.50G of 15.75G hbm.")

  sizes = {"batch_size": 1024, "image_size": 224}
  with pytest.raises(preflight_compile.DoesNotFitError, match="The eval step, 1024") as caught:
    program = types.SimpleNamespace(finish=finish)
    preflight_compile.compile_step(program, None, "eval", sizes, io.StringIO())
  assert caught.value.mode == "eval"
  words = preflight_checks.advice(imagenet_resnet50.get_config(), "eval", 16)
  assert "config.eval.batch_size than 1024" in words and "global_batch_size" not in words


OVER = "Ran out of memory on HBM, the total memory required for HLO temporaries"


@pytest.mark.parametrize(
  "message, words",
  [
    (
      "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. ...",
      "need 20.50 GiB of the 15.75 of a chip's memory, 4.75 too much",
    ),
    (
      f"RESOURCE_EXHAUSTED: {OVER} (113.01G) exceeds available HBM (512.0M).",
      "need 113.01 GiB of the 0.50 of a chip's memory, 112.51 too much",
    ),
    ("RESOURCE_EXHAUSTED: something else", "too small"),
    ("INTERNAL: no such instruction", ""),
  ],
)
def test_words_of_the_compiler_about_memory(message, words):
  found = preflight_compile._too_large(message)
  assert words in found
  assert bool(words) == bool(found)


def test_table_of_what_was_made(tmp_path, monkeypatch):
  loop = {"name": "while.1", "cycles": 1e7}
  step = {
    "mode": "train",
    "per_chip": 64.0,
    "cycles": 9e7,
    "memory": {"total": 3 << 30},
    "ms": 60.04,
    "images_per_second_per_chip": 1066.0,
    "mfu": 0.214,
    "compile_cpu_seconds": 100.0,
    "open_loops": [],
  }
  report = {
    "steps": [
      step | {"cycles": 1e7, "ms": 7.0},
      step | {"open_loops": [loop | {"most": None}, loop | {"most": 8, "cycles": 8e5}]},
      step | {"mode": "eval", "cycles": 1e9},
    ],
    "run": {"hours": {"total": 2.5}, "chip_hours": 1040.0},
    "fields": {},
  }
  refused = {"fields": {"model.scan": True, "mesh.fsdp": 4}, "refused": "they need too much"}
  monkeypatch.setattr(preflight_table.recipes, "names", lambda: ["smoke", "a:b", "c", "d"])
  asked = []

  def run(command, **_):
    asked.append(command[3:])
    if "configs/c.py" in command[4]:
      return subprocess.CompletedProcess(command, 3, json.dumps(refused), "x\npreflight: too large")
    return subprocess.CompletedProcess(command, 0, json.dumps(report), "x")

  monkeypatch.setattr(preflight_table.subprocess, "run", run)
  (tmp_path / "d.json").write_text(json.dumps(report))
  preflight_table.make(tmp_path, ["--topology=v5e:4x4"])
  assert asked == [
    [
      *("--json", f"--config=configs/{name}", f"--known={tmp_path / 'steps'}"),
      "--topology=v5e:4x4",
    ]
    for name in ("smoke.py", "a.py:b", "c.py")
  ]
  preflight_table.make(tmp_path, ["--topology=v5e:4x4"])
  assert len(asked) == 3  # what is there is not made again
  (tmp_path / "smoke.json").unlink()
  lines = preflight_table.text(tmp_path).splitlines()
  assert lines[2] == "| `a:b` |  | 64 | yes | 3 | 60* | 1,070 | 21.4 % | 2.5 | 1,040 | 300 |"
  assert lines[3].startswith("| `c` | `model.scan=True mesh.fsdp=4` |  | no: they need too much | ")
  assert lines[-3] == "* has a loop whose rounds are not known, and counts with one."
  assert lines[-1] == "Not compiled: smoke."
  assert len({line.count("|") for line in lines[:-4]}) == 1


@needs_libtpu
def test_a_step_that_is_known_is_not_compiled_again(tmp_path):
  def run(*args):
    return preflight(
      *("--json", "--topology=v5e:1x1", "--config=configs/smoke.py", f"--known={tmp_path}", *args)
    )

  first, slower = run(), run("--config.optimizer.lr_per_256=0.05", "--config.total_epochs=3.0")
  assert first.returncode == slower.returncode == 0, first.stderr + slower.stderr
  for mode in ("train", "eval"):
    assert f"{mode} step" in first.stderr and "compiling:" in first.stderr
  assert "compiling" not in slower.stderr and slower.stderr.count("estimate of --known") == 2
  first, slower = (json.loads(each.stdout) for each in (first, slower))
  assert slower["steps"] == first["steps"]
  assert slower["run"]["train_steps"] != first["run"]["train_steps"]
  assert slower["fields"] == {"optimizer.lr_per_256": 0.05, "total_epochs": 3.0}
  for change in ("model.depth=14", "compiler_options=xla_tpu_scoped_vmem_limit_kib=8192"):
    other = run(f"--config.{change}")
    assert "train step" in other.stderr and "compiling:" in other.stderr
  for file in tmp_path.iterdir():
    file.write_text("{")
  assert_refused(run(), "--known: ", str(tmp_path), "is damaged", "remove it")


@needs_libtpu
def test_the_number_of_classes_is_that_of_the_data_or_must_be_said():
  args = ("--topology=v5e:1x1", "--config=configs/own_images.py")
  assert_refused(preflight(*args), "config.model.num_classes is 0", "--config.data.path")
