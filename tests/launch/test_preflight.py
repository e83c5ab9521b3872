"""What a run would be on a TPU is said without one; what cannot be is said in one sentence."""

import importlib.util
import pathlib
import subprocess
import sys

import pytest

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


def assert_refused(result, *words):
  assert result.returncode == 2
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
    (["--topology=v5e:3x3", TINY], ["--topology=v5e:3x3", "not divisible"]),
    (["--topology=v9:2x2", TINY], ["--topology=v9:2x2", "Invalid"]),
    (
      ["--topology=v5e:2x2", TINY, "--config.global_batch_size=6"],
      ["config.global_batch_size is 6", "4 devices"],
    ),
    (["--topology=v5e:2x2", TINY, "--config.mesh.fsdp=3"], ["config.mesh.fsdp", "4 devices"]),
    (
      [
        "--topology=v5e:2x2",
        TINY,
        "--config.data.image_size=1024",
        "--config.global_batch_size=4096",
      ],
      ["refuses this step", "memory"],
    ),
  ],
)
def test_what_does_not_fit(args, words):
  assert_refused(preflight(*args), *words)


@needs_libtpu
def test_step_of_a_small_net():
  result = preflight("--topology=v5e:2x2", TINY, "--config.model.bn_group=device")
  assert result.returncode == 0, result.stderr
  for words in (
    "{'data': 4, 'fsdp': 1, 'space': 1}: 4 x TPU v5 lite, 1 host(s), 1 slice(s)",
    "params      P(): ",
    "all-reduce                over 4 devices: ",
    "arguments",
    "MiB",
    "Compiled in",
  ):
    assert words in result.stdout
  assert "all-gather" not in result.stdout and "collective-permute" not in result.stdout


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
  assert "reduce-scatter            over 4 devices" in result.stdout
  assert "all-gather                over 16 devices" in result.stdout
  assert "in loops" not in result.stdout
