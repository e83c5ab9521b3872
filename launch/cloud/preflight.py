"""`up --preflight`: whether the run fits the slice, found out before the slice is asked for."""

from __future__ import annotations

import os
import subprocess
import sys

from launch.cloud import bundle
from launch.cloud.settings import Settings, UsageError

DOES_NOT_FIT = 3  # exit code of launch.preflight, and of `up`
# Topologies of a plane, and of a cube, with the cores of a chip that a type counts.
_PLANES, _CUBES = {"v2": 2, "v3": 2, "v5litepod": 1, "v6e": 1}, {"v4": 2, "v5p": 2}
_OF_COMPILER = {"v5litepod": "v5e"}


def topology(accelerator_type: str) -> str:
  """Returns the topology that the Cloud TPU API gives a type, as the compiler names it.

  Args:
    accelerator_type: as in v5litepod-16, which is v5e:4x4.

  Raises:
    UsageError: if it is not known for such a type.
  """
  kind, _, size = accelerator_type.rpartition("-")
  cores = _PLANES.get(kind) or _CUBES.get(kind)
  chips = int(size) // cores if cores else 0
  if not chips or chips & (chips - 1):
    raise UsageError(
      f"--preflight: the topology of {accelerator_type} is not known here; run python -m "
      "launch.preflight --topology=... yourself, and up without --preflight."
    )
  doublings, axes = chips.bit_length() - 1, 2 if kind in _PLANES else 3
  if axes == 3 and doublings == 2:
    exponents = [1, 1, 0]
  else:
    exponents = [(doublings + axis) // axes for axis in range(axes)]
  return f"{_OF_COMPILER.get(kind, kind)}:{'x'.join(str(2**n) for n in exponents)}"


def run(settings: Settings) -> bool:
  """Estimate the run in the environment of this clone; its report goes to standard error.

  Returns:
    Whether it fits.

  Raises:
    UsageError: if it could not be found out; launch.preflight has said why, where it began.
  """
  python = bundle.ROOT / ".venv" / "bin" / "python"
  if not python.exists():
    raise UsageError(f"--preflight needs {python}, which bash launch/smoke.sh makes.")
  words = [word for word in settings.argv if word.startswith("--config")]
  if settings.dollars_per_chip_hour:
    words.append(f"--dollars_per_chip_hour={settings.dollars_per_chip_hour}")
  where = [f"--topology={topology(settings.type)}", f"--slices={settings.slices}"]
  code = subprocess.run(
    [python, "-m", "launch.preflight", *where, *words],
    cwd=bundle.ROOT,
    env=dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(bundle.ROOT)),
    stdin=subprocess.DEVNULL,
    stdout=sys.stderr,
    check=False,
  ).returncode
  if code not in (0, DOES_NOT_FIT):
    raise UsageError("--preflight found out nothing, so that nothing was created.")
  return code == 0
