"""A run in a real Jupyter kernel: what it prints, an interrupt at any point, and a second run."""

import os
import pathlib
import re
import sys
import time

import pytest

ROOT = pathlib.Path(__file__).parents[2]
START = """
import threading, os, signal, json
from tests.trainer import tiny
from trainer import train
from trainer.errors import Preempted
config = tiny.get_config()
config.data.kind = "synthetic"
config.total_steps = {steps}
"""
LIMIT = 300.0  # seconds, so that a kernel that hangs ends the test


class Kernel:
  """A kernel in a process of its own."""

  def __init__(self, manager):
    self._manager, self._client = manager, manager.blocking_client()
    self._client.start_channels()
    self._client.wait_for_ready(timeout=LIMIT)

  def run(self, code, interrupt_at=None):
    """Return all output of a cell and the name of what it raised; interrupt it at some output."""
    self._client.execute(code)
    output, raised, limit = "", "", time.monotonic() + LIMIT
    while time.monotonic() < limit:
      message = self._client.get_iopub_msg(timeout=LIMIT)
      kind, content = message["msg_type"], message["content"]
      if kind == "stream":
        output += content["text"]
      elif kind == "error":
        raised = content["ename"]
      elif kind == "status" and content["execution_state"] == "idle":
        return output, raised
      if interrupt_at and re.search(interrupt_at, output):
        interrupt_at = None
        self._manager.interrupt_kernel()
    raise AssertionError(f"the cell did not end: {output}")


@pytest.fixture(scope="module")
def kernel():
  client = pytest.importorskip("jupyter_client", reason="pip install -e '.[notebook]'")
  pytest.importorskip("ipykernel", reason="pip install -e '.[notebook]'")
  manager = client.KernelManager()
  manager.kernel_cmd = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
  path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
  manager.start_kernel(env=os.environ | {"PYTHONPATH": path, "JAX_PLATFORMS": "cpu"})
  try:
    yield Kernel(manager)
  finally:
    manager.shutdown_kernel(now=True)


@pytest.mark.slow
def test_progress_interrupts_and_a_second_run(kernel, tmp_path):
  def cell(name, steps):
    return f"{START.format(steps=steps)}\nfinal = train.train(config, {str(tmp_path / name)!r})"

  output, raised = kernel.run(f"{cell('first', 10)}\nprint('step', final['step'])")
  assert not raised and output.rstrip().endswith("step 10"), output
  assert "This run:" in output and "step 10/10" in output and "Done: top1" in output

  # During compilation: the process lives, nothing is lost, and the same cell runs to its end.
  output, raised = kernel.run(cell("compile", 11), "Compiling the training step")
  assert raised == "Preempted" and "SIGINT: stopping after" in output, output
  output, raised = kernel.run(f"{cell('compile', 11)}\nprint('step', final['step'])")
  assert not raised and output.rstrip().endswith("step 11"), output

  # During the steps: saved, and resumed from there in the same kernel.
  output, raised = kernel.run(cell("steps", 100_000), r"step \d+/100000")
  assert raised == "Preempted" and "is saved" in output, output
  output, raised = kernel.run(cell("steps", 100_000), r"step \d+/100000")
  assert raised == "Preempted" and re.search(r"[Rr]estored|[Rr]esum", output), output
