"""A whole run: to the end, stopped and resumed, and refused with one sentence."""

import contextlib
import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

from etils import epath
import jax
import numpy as np
import pytest

from input_pipeline.errors import DataError
from tests.trainer import tiny
from tests.trainer.shared import StopAt, fingerprints
from trainer import program as program_lib
from trainer import train as train_lib
from trainer.errors import (
  FAILED,
  PREEMPTED,
  CheckpointError,
  ConfigError,
  NonFiniteError,
  Preempted,
  StorageError,
)
from trainer.pod.pod import Pod
from trainer.reporting import events, recorded
from trainer.workdir.checkpoint import Checkpointer

TINY = pathlib.Path(tiny.__file__)


@pytest.fixture
def run_config(shards):
  config = tiny.get_config()
  config.data.path = str(shards)
  return config


def command(workdir, shards, *overrides):
  return [
    sys.executable,
    "-m",
    "trainer",
    f"--config={TINY}",
    f"--workdir={workdir}",
    f"--config.data.path={shards}",
    *[f"--config.{override}" for override in overrides],
  ]


def test_run_learns_and_writes_what_it_promises(tmp_path, run_config):
  run_config.total_steps, run_config.eval.every_steps = 60, 20
  final = train_lib.train(run_config, str(tmp_path))
  assert final == json.loads((tmp_path / "final.json").read_text())
  assert final["step"] == 60 and final["epochs"] == pytest.approx(60 * 8 / 72)
  assert final["examples"] == 29
  assert final["top1"] > 0.8 and final["top5"] >= final["top1"]
  assert final["best"]["top1"] >= final["top1"]
  assert {"compile", "input_wait", "step", "eval", "checkpoint"} <= final["wall_seconds"].keys()
  assert sum(v for k, v in final["wall_seconds"].items() if k != "total") == pytest.approx(
    final["wall_seconds"]["total"]
  )
  curves = events.read_scalars(str(tmp_path / "events"))
  steps, losses, _ = curves["train/loss"]
  assert list(steps) == list(range(1, 61)) and losses[-1] < losses[0]
  assert list(curves["eval/top1"][0]) == [20, 40, 60]
  assert curves["eval/top1"][1][-1] == pytest.approx(final["top1"])
  assert {
    "train/learning_rate",
    "train/grad_norm",
    "train/images_per_second",
    "train/input_wait",
    "train/goodput",
    "train/step_seconds_median",
    "train/step_seconds_p99",
    "train/checkpoint_stall_seconds",
    "train/host_memory_bytes",
    "steps_per_sec",
  } <= curves.keys()
  assert json.loads((tmp_path / "config.json").read_text())["total_steps"] == 60
  assert 'id="curves">{' in (tmp_path / "report.html").read_text()

  again = train_lib.train(run_config, str(tmp_path))
  assert again == final
  assert (
    final["goodput"]["starts"] == json.loads((tmp_path / "starts.json").read_text())["starts"] == 1
  )
  evaluated = train_lib.evaluate_only(run_config, str(tmp_path))
  assert {name: evaluated[name] for name in ("top1", "top5", "loss", "examples")} == pytest.approx(
    {name: final[name] for name in ("top1", "top5", "loss", "examples")}
  )


def test_stopped_anywhere_the_result_is_bitwise_the_same(tmp_path, run_config):
  run_config.total_steps, run_config.eval.every_steps, run_config.checkpoint.every_steps = 12, 5, 3
  train_lib.train(run_config, str(tmp_path / "quiet"))
  quiet = fingerprints(tmp_path / "quiet", 12)
  # Asked once before it compiles, then by 12 steps and three evaluations of four batches; 8, 10, 17
  # and 22 fall into these.
  for n in (2, 5, 8, 10, 14, 17, 22):
    workdir = tmp_path / f"stopped-{n}"
    with pytest.raises(Preempted) as stopped:
      train_lib.train(run_config, str(workdir), StopAt(n))
    saved = max(int(p.name) for p in (workdir / "checkpoints").iterdir())
    assert f"step {saved} of 12" in str(stopped.value)
    assert not (workdir / "final.json").exists()
    final = train_lib.train(run_config, str(workdir))
    assert fingerprints(workdir, 12) == quiet
    assert final["examples"] == 29
    steps, _, _ = events.read_scalars(str(workdir / "events"))["train/loss"]
    assert list(steps) == list(range(1, 13))


@pytest.mark.parametrize("stops", [4, pytest.param(10, marks=pytest.mark.slow)])
def test_signals_and_kills_at_random_moments(tmp_path, shards, stops):
  """SIGTERM and kill -9 in start, compilation, steps, evaluation and saving lose nothing."""
  steps = 100 * stops
  overrides = (
    f"total_steps={steps}",
    "eval.every_steps=50",
    "checkpoint.every_steps=20",
    "log.every_steps=50",
  )
  for name in ("compiling", "quiet"):  # the second finds everything compiled, as the later ones do
    began = time.monotonic()
    subprocess.run(command(tmp_path / name, shards, *overrides), check=True, capture_output=True)
    lifetime = time.monotonic() - began
  quiet = fingerprints(tmp_path / "quiet", steps)
  assert fingerprints(tmp_path / "compiling", steps) == quiet
  causes = json.loads((tmp_path / "quiet" / "final.json").read_text())["wall_seconds"]
  training = sum(causes[cause] for cause in ("step", "input_wait", "eval", "checkpoint"))

  # From early in the start to a tenth of the training, so that all such pieces are not a whole run.
  rng = random.Random(0)
  start = lifetime - training
  stopped_at = None
  for number in [signal.SIGTERM, signal.SIGKILL] * (stops // 2):
    with subprocess.Popen(
      command(tmp_path / "chaos", shards, *overrides), stderr=subprocess.PIPE, text=True
    ) as process:
      time.sleep(rng.uniform(0.3 * start, start + 0.1 * training))
      process.send_signal(number)
      _, log = process.communicate(timeout=120)
    assert process.returncode == (PREEMPTED if number == signal.SIGTERM else -signal.SIGKILL), log
    if stopped_at and "Compiled in" in log:
      # A SIGTERM loses no step: the next process goes on exactly where it stopped.
      assert f"Resuming from checkpoint {stopped_at} of" in log, log
    if number == signal.SIGTERM and "Stopped before the first step of this process" not in log:
      stopped_at = int(log.split("Stopped and saved at step ")[1].split()[0])
    elif number == signal.SIGKILL:
      stopped_at = None
  subprocess.run(command(tmp_path / "chaos", shards, *overrides), check=True, capture_output=True)
  assert fingerprints(tmp_path / "chaos", steps) == quiet
  assert json.loads((tmp_path / "chaos" / "final.json").read_text())["examples"] == 29
  assert not (tmp_path / "chaos" / "damaged").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_before_anything_is_loaded(tmp_path, shards, number):
  with subprocess.Popen(
    command(tmp_path / "run", shards), stderr=subprocess.PIPE, text=True
  ) as process:
    while not process.stderr.readline():  # pragma: no branch
      pass
    process.send_signal(number)
    log = process.communicate(timeout=120)[1]
  assert process.returncode == PREEMPTED, log
  assert f"{number.name}: stopping " in log and "Traceback" not in log
  assert "Stopped before the first step of this process; nothing is lost." in log


def test_ctrl_c_with_decoding_processes(tmp_path, shards):
  """Ctrl-C reaches every process of the group; the batches are those of a run in one process."""
  overrides = ("total_steps=600", "log.every_steps=10")
  args = command(tmp_path / "workers", shards, *overrides, "data.workers=2")
  with subprocess.Popen(args, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
    log = ""
    for line in process.stderr:
      log += line
      if "step 30/600" in line:
        os.killpg(process.pid, signal.SIGINT)
        break
    log += process.communicate(timeout=120)[1] or ""
  assert process.returncode == PREEMPTED, log
  assert "Traceback" not in log
  subprocess.run(args, check=True, capture_output=True)
  subprocess.run(command(tmp_path / "threads", shards, *overrides), check=True, capture_output=True)
  assert fingerprints(tmp_path / "workers", 600) == fingerprints(tmp_path / "threads", 600)


def test_profile_window(tmp_path, run_config):
  run_config.log.profile_step, run_config.log.profile_steps = 3, 2
  train_lib.train(run_config, str(tmp_path))
  assert list((tmp_path / "events").rglob("*.xplane.pb"))


def test_four_devices_give_the_result_of_one(tmp_path, shards):
  results = []
  for devices in (1, 4):
    workdir = tmp_path / str(devices)
    log = subprocess.run(
      [*command(workdir, shards, "model.bn_momentum=0.5")],
      check=True,
      text=True,
      stderr=subprocess.PIPE,
      env=os.environ | {"JAX_NUM_CPU_DEVICES": str(devices)},
    ).stderr
    assert f"devices   {devices} x" in log
    results.append(events.read_scalars(str(workdir / "events")))
  for name in ("train/loss", "train/grad_norm", "eval/loss"):
    np.testing.assert_allclose(results[0][name][1], results[1][name][1], rtol=2e-4)
  assert results[0]["eval/examples"][1][-1] == results[1]["eval/examples"][1][-1] == 29


@pytest.fixture
def small_disk(tmp_path):
  """A file system of 16 MiB, which only root can mount."""
  folder = tmp_path / "disk"
  folder.mkdir()
  mounted = subprocess.run(
    ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], capture_output=True
  )
  if mounted.returncode:
    pytest.skip(f"cannot mount a small disk here: {mounted.stderr.decode().strip()}")
  yield folder
  subprocess.run(["umount", "-l", str(folder)], check=True)


def test_full_disk_is_said_and_the_save_is_tried_again(small_disk, shards):
  """Training goes on while nothing can be saved, and ends well once there is room again."""
  overrides = (
    "total_steps=1500",
    "checkpoint.every_steps=50",
    "checkpoint.retry_seconds=0.5",
    "log.every_steps=100",
  )
  with subprocess.Popen(
    command(small_disk / "run", shards, *overrides), stderr=subprocess.PIPE, text=True
  ) as process:
    while not list((small_disk / "run" / "checkpoints").glob("?0")):
      time.sleep(0.05)
    ballast = small_disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
      while True:  # until the disk is full
        file.write(b"x" * 4096)
    log = ""
    for line in process.stderr:
      log += line
      if "could not be saved" in line:
        break
    ballast.unlink()
    log += process.communicate(timeout=120)[0] or ""
  assert process.returncode == 0, log
  assert "No space left" in log and "Training goes on" in log
  assert "Traceback" not in log
  assert (small_disk / "run" / "checkpoints" / "1500").exists()
  assert (small_disk / "run" / "final.json").exists()


def test_disk_full_to_the_end_is_a_failure(small_disk, shards):
  (small_disk / "ballast").write_bytes(b"x" * (14 << 20))
  refused(
    command(small_disk / "run", shards),
    "checkpoint of step 10 could not be written",
    "There is no whole checkpoint. Mend that",
  )


def test_not_finite_stops_and_names_the_step(tmp_path, run_config):
  run_config.checkpoint.every_steps = 1
  with pytest.raises(Preempted):
    train_lib.train(run_config, str(tmp_path), StopAt(4))
  assert not (tmp_path / "ended.json").exists()
  run_config.optimizer.lr_per_256, run_config.resume.allow = 1e30, "optimizer.lr_per_256"
  with pytest.raises(NonFiniteError, match=r"Step \d+ is not finite \(loss .*learning rate"):
    train_lib.train(run_config, str(tmp_path))
  ended = json.loads((tmp_path / "ended.json").read_text())
  assert ended["code"] == FAILED and "is not finite" in ended["reason"]
  assert recorded.read(str(tmp_path)).state == "failed"
  abstract_state = program_lib.build(run_config, 72).abstract_state
  checkpoints = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
  assert checkpoints
  for step in reversed(checkpoints):
    checkpointer = Checkpointer(Pod(run_config.pod), epath.Path(tmp_path), run_config, 0)
    state, meta = checkpointer.restore_newest(abstract_state)
    checkpointer.close()
    assert meta["step"] == step
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state))
    shutil.rmtree(tmp_path / "checkpoints" / str(step))


def test_importing_everything_imports_neither_tensorflow_nor_torch():
  code = (
    "import sys, trainer.train, trainer.__main__, trainer.reporting.report, trainer.tools.bench\n"
    "import input_pipeline.prepare.__main__, input_pipeline.loader, input_pipeline.inspect\n"
    "sys.exit(', '.join({'tensorflow', 'torch'} & sys.modules.keys()) or 0)"
  )
  subprocess.run([sys.executable, "-c", code], check=True)


def refused(process_args, *words):
  result = subprocess.run(process_args, capture_output=True, text=True)
  assert result.returncode == FAILED, result.stderr
  assert "Traceback" not in result.stderr, result.stderr
  last = result.stderr.strip().splitlines()[-1]
  for word in words:
    assert word in last, last


def test_command_line_is_refused_in_one_sentence(tmp_path, shards):
  refused(command(tmp_path, shards, "model.dephts=18"), "dephts")
  refused(command(tmp_path, shards, "model.depth=deep"), "depth", "deep")
  refused(command(tmp_path, shards, "global_batch_size=0"), "config.global_batch_size")
  refused(
    [sys.executable, "-m", "trainer", "--config=nowhere.py", f"--workdir={tmp_path}"], "nowhere.py"
  )
  refused([sys.executable, "-m", "trainer", f"--config={TINY}"], "--workdir")
  refused([*command(tmp_path, shards), "--mode=predict"], "mode", "predict")


@pytest.mark.parametrize(
  "field, value, error, words",
  [
    ("data.path", "/nowhere/at/all", DataError, ["/nowhere/at/all", "does not exist"]),
    ("data.eval_split", "test", DataError, ["no split 'test'", "train, val"]),
    ("model.num_classes", 7, DataError, ["6 classes", "config.model.num_classes", "7"]),
    ("model.depth", 9, ConfigError, ["config.model.depth", "6n+2"]),
    ("model.name", "vgg", ConfigError, ["config.model.name", "vgg"]),
  ],
)
def test_data_and_config_that_do_not_fit(tmp_path, run_config, field, value, error, words):
  run_config.update_from_flattened_dict({field: value})
  with pytest.raises(error) as refusal:
    train_lib.train(run_config, str(tmp_path / "run"))
  for word in words:
    assert word in str(refusal.value)


def test_truncated_shard_is_named(tmp_path, run_config, shards):
  shutil.copytree(shards, tmp_path / "shards")
  victim = sorted((tmp_path / "shards").glob("train-*.array_record"))[1]
  victim.write_bytes(victim.read_bytes()[:-100])
  run_config.data.path = str(tmp_path / "shards")
  with pytest.raises(DataError, match=f"{victim.name}.*prepare"):
    train_lib.train(run_config, str(tmp_path / "run"))


def test_workdir_that_cannot_be_written(tmp_path, run_config):
  (tmp_path / "file").write_text("")
  with pytest.raises(StorageError, match=r"--workdir .* cannot be written .*mend that"):
    train_lib.train(run_config, str(tmp_path / "file" / "run"))


def test_a_script_without_a_guard_ends_with_a_sentence(tmp_path, shards):
  """Decoding processes import the script that started them; it must not train in each of them."""
  script = tmp_path / "script.py"
  script.write_text(
    "from tests.trainer import tiny\nfrom trainer import train\n"
    f"config = tiny.get_config()\nconfig.data.path, config.data.workers = {str(shards)!r}, 1\n"
    "config.data.worker_restarts = 1\n"
    f"train.train(config, {str(tmp_path / 'run')!r})\n"
  )
  root = TINY.parents[2]
  environment = os.environ | {"PYTHONPATH": str(root)}
  command = [sys.executable, script]
  ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
  assert ended.returncode != 0
  assert "put the script's calls under: if __name__ == '__main__':" in ended.stderr


def test_workdir_of_another_config(tmp_path, run_config):
  train_lib.train(run_config, str(tmp_path))
  before = sorted(p for p in tmp_path.rglob("*") if "events" not in p.parts)
  run_config.optimizer.momentum = 0.8
  with pytest.raises(ConfigError, match=r"config\.optimizer\.momentum: 0\.9 -> 0\.8"):
    train_lib.train(run_config, str(tmp_path))
  assert sorted(p for p in tmp_path.rglob("*") if "events" not in p.parts) == before
  assert json.loads((tmp_path / "config.json").read_text())["optimizer"]["momentum"] == 0.9


def test_nothing_to_evaluate(tmp_path, run_config):
  with pytest.raises(CheckpointError, match="no checkpoint to evaluate"):
    train_lib.evaluate_only(run_config, str(tmp_path))
