"""Compiles the train step of a run for a TPU topology, on a machine without a TPU.

    python -m launch.preflight --topology=v5e:4x4 --config=configs/X.py [--config.field=value ...]

Prints mesh, shardings, collectives and memory. It needs libtpu (pip install -e '.[tpu]') and no
data, and takes minutes. The step is not run: memory is the compiler's estimate. This is the only
command of launch/ that imports JAX.
"""

import importlib.util
import os
import re
import sys
import time
from typing import Any

from absl import flags
import ml_collections

from trainer import command_line
from trainer.errors import DONE, FAILED, ConfigError, TrainerError

FLAGS = flags.FLAGS
flags.DEFINE_string(
  "topology", None, "Topology of a slice, as the compiler names it: v5e:4x4, v4:2x2x4, v6e:16x16."
)
flags.DEFINE_integer(
  "slices", 1, "Number of such slices, joined by the data centre's network.", lower_bound=1
)

# Only constants of the schedule depend on the number of examples, so ImageNet's fits any data.
EXAMPLES = 1_281_167


def topology_devices(topology: str, slices: int) -> list:
  """Returns descriptions of the devices of TPU slices, to compile for.

  Args:
    topology: of one slice, e.g. "v5e:4x4".
    slices: number of slices.

  Raises:
    ConfigError: if libtpu is missing or does not know the topology.
  """
  if importlib.util.find_spec("libtpu") is None:
    raise ConfigError(
      "The TPU compiler is missing; install it with pip install -e '.[tpu]' (480 MB)."
    )
  # Keep libtpu from searching a TPU and its metadata server, whatever its type, and from its lock:
  # without a TPU to share, several compilers may run at once.
  os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
  }
  from jax.experimental import topologies

  try:
    return topologies.get_topology_desc(
      platform="tpu", topology_name=topology, num_slices=slices
    ).devices
  except Exception as error:
    raise ConfigError(f"--topology={topology}: {_first_line(error)}") from error


def preflight(config: ml_collections.ConfigDict, topology: str, slices: int) -> None:
  """Compile the train step of a config for a topology and print what is known about it.

  Raises:
    TrainerError: with one sentence if config and topology do not fit, or the memory is too small.
  """
  devices = topology_devices(topology, slices)
  import jax  # after the environment is set

  from trainer import config as config_lib
  from trainer import mesh as mesh_lib
  from trainer import program as program_lib
  from trainer.tools import collectives

  config_lib.validate(config)
  config_lib.check_split(config, num_devices=len(devices))
  program = program_lib.build(config, EXAMPLES, devices)
  hosts = len({device.process_index for device in devices})
  _section(
    "Mesh",
    [
      (
        f"{dict(program.mesh.shape)}: {len(devices)} x {devices[0].device_kind}, {hosts} host(s), "
        f"{slices} slice(s)"
      )
    ],
  )
  _section("State", mesh_lib.describe_shardings(program.abstract_state))
  start = time.perf_counter()
  try:
    step = program.compile("train", **program.sizes("train"))
  except jax.errors.JaxRuntimeError as error:
    raise ConfigError(f"The compiler refuses this step: {_first_line(error)}") from error
  seconds = time.perf_counter() - start
  found = collectives.describe(collectives.read(step.as_text() or ""))
  _section("Collectives of a step", found or ["none"])
  _section(
    "Memory of each device, as the compiler estimates it", _describe_memory(step.memory_analysis())
  )
  print(f"Compiled in {seconds:.0f} s.")


def _describe_memory(memory: Any) -> list[str]:
  """Returns the lines of a compiled step's `memory_analysis()`."""
  new = memory.output_size_in_bytes - memory.alias_size_in_bytes
  parts = {
    "arguments": (memory.argument_size_in_bytes, "the state and a batch"),
    "outputs": (new, "metrics; the new state takes the place of the old"),
    "temporary": (memory.temp_size_in_bytes, "activations, gradients"),
    "program": (memory.generated_code_size_in_bytes, ""),
  }
  parts["in all"] = sum(size for size, _ in parts.values()), ""
  return [
    f"{name:9} {size / 2**20:9.1f} MiB  {what}".rstrip() for name, (size, what) in parts.items()
  ]


def _section(title: str, lines: list[str]) -> None:
  print("\n".join([f"{title}:", *[f"  {line}" for line in lines]]), flush=True)


def _first_line(error: Exception) -> str:
  """Returns the message of an XLA error, without its code and its trace."""
  line = str(error).strip().splitlines()[0]
  return re.sub(r"^[A-Z_]+: ", "", line).rstrip(".") + "."


def main(argv: list[str]) -> int:
  """Returns the exit code of trainer.errors."""
  try:
    if command_line.answered(argv, __doc__):
      return DONE
    command_line.parse(argv, "--topology=v5e:4x4 --config=configs/X.py")
    preflight(FLAGS.config, FLAGS.topology, FLAGS.slices)
  except TrainerError as error:
    print(f"preflight: {error}", file=sys.stderr)
    return FAILED
  return DONE


if __name__ == "__main__":
  sys.exit(main(sys.argv))
