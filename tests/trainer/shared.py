"""What several tests of real runs need."""

from collections.abc import Iterator, Sequence
import contextlib
import json
import os
import pathlib
import re
import socket
import subprocess
import sys
import threading
from typing import Any
from unittest import mock

import psutil
import pytest

from tests import quickly
from tests.trainer import tiny
from trainer import command_line
from trainer import config as config_lib
from trainer.errors import ConfigError

TINY = pathlib.Path(tiny.__file__)
# With the flags of the tests outside pytest too. They are part of the key of a compiled program:
# whoever adds to them compiles anew what another test has compiled.
ENVIRONMENT = {"XLA_FLAGS": quickly.XLA_FLAGS} | os.environ


def fingerprints(workdir, step):
  """Return the hash of every leaf at a step, as the checkpoint holds them."""
  return json.loads((workdir / "checkpoints" / str(step) / "meta" / "metadata").read_text())[
    "fingerprints"
  ]


def assert_refused(family, fields, message):
  """Assert that a tiny run of a family with these fields is refused, in one sentence with this."""
  config = tiny.get_config(family)
  config.update_from_flattened_dict(fields)
  with pytest.raises(ConfigError) as error:
    config_lib.validate(config)
    config_lib.check_split(config, num_devices=1)
  assert message in str(error.value) and "\n" not in str(error.value)


def free_port():
  """Return a port of this machine that nobody listens at."""
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    return probe.getsockname()[1]


def trainer(workdir, *overrides, config=TINY):
  """Return the command of a run on synthetic images."""
  return [
    sys.executable,
    "-m",
    "trainer",
    f"--config={config}",
    f"--workdir={workdir}",
    "--config.data.kind=synthetic",
    *[f"--config.{override}" for override in overrides],
  ]


def call(main, program, *arguments):
  """Return the exit code of a command that takes --config, called as in a process of its own."""
  argv = [program, *map(str, arguments)]
  for name in list(command_line.FLAGS):
    if name.startswith("config."):  # overrides of the last call
      delattr(command_line.FLAGS, name)
  with mock.patch.object(sys, "argv", argv):  # where config_flags looks for overrides
    return main(argv)


class StopAt:
  """A stop at the n-th time of asking: between steps, and between batches of an evaluation.

  How often a thread asks meanwhile depends on the clock, and does not count.
  """

  def __init__(self, n):
    self.left = n

  def __call__(self):
    self.left -= threading.current_thread() is threading.main_thread()
    return self.left <= 0


class Process:
  """A process under way, whose output is followed by a thread.

  Attributes:
    log: what it has printed so far, on both streams.
    ended: whether it has closed them.
    limit: seconds that anything may take; an unloaded machine needs a fraction of it.
  """

  limit = 240.0

  def __init__(self, command: Sequence[Any], **options: Any):
    """Start a command; `options` are those of subprocess.Popen."""
    self._process = subprocess.Popen(
      command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    self.log, self.ended, self._lines = "", False, threading.Condition()
    threading.Thread(target=self._follow, daemon=True).start()

  @property
  def pid(self) -> int:
    """Number of the process."""
    return self._process.pid

  def send(self, number: int) -> None:
    """Send it a signal."""
    self._process.send_signal(number)

  def _follow(self) -> None:
    for line in self._process.stdout:
      with self._lines:
        self.log += line
        self._lines.notify_all()
    with self._lines:
      self.ended = True
      self._lines.notify_all()

  def wait_for(self, pattern: str, limit: float | None = None) -> None:
    """Return once the log matches; fail if it ends before, or after `limit` seconds."""
    with self._lines:
      self._lines.wait_for(
        lambda: re.search(pattern, self.log) or self.ended, timeout=limit or self.limit
      )
      if not re.search(pattern, self.log):
        self._process.kill()
        raise AssertionError(f"{pattern!r} did not come:\n{self.log[-5000:]}")

  def finish(self, limit: float | None = None) -> int:
    """Return the exit code once it has ended; fail after `limit` seconds."""
    limit = limit or self.limit
    with self._lines:
      if not self._lines.wait_for(lambda: self.ended, timeout=limit):
        self._process.kill()
        raise AssertionError(f"no end within {limit} s:\n{self.log[-5000:]}")
    return self._process.wait()


class LocalPod(Process):
  """A command on several hosts of this machine, by launch.local_pod."""

  def __init__(self, hosts: int, devices: int, command: Sequence[Any], grace: float = 60):
    self._grace = grace
    launcher = [
      sys.executable,
      "-m",
      "launch.local_pod",
      f"--hosts={hosts}",
      f"--devices-per-host={devices}",
      f"--grace={grace}",
      "--",
    ]
    super().__init__([*launcher, *command], env=ENVIRONMENT)

  def pids(self) -> dict[int, int]:
    """Return the process of each host that was started."""
    return self._numbers("started as process")

  def codes(self) -> dict[int, int]:
    """Return the exit codes of the hosts that have ended."""
    return self._numbers("ended with code")

  def _numbers(self, words: str) -> dict[int, int]:
    found = re.findall(rf"\[(\d+)\] {words} (-?\d+)", self.log)
    return {int(host): int(number) for host, number in found}

  def close(self) -> None:
    """End it, whatever it is at, and check that no process is left."""
    with contextlib.suppress(ProcessLookupError):
      self._process.terminate()
    self.finish(2 * self._grace)
    left = [host for host, pid in self.pids().items() if psutil.pid_exists(pid)]
    assert not left, f"the processes of hosts {left} are left"


@contextlib.contextmanager
def running(hosts, devices, command, grace=60) -> Iterator[LocalPod]:
  """A pod for the body, ended after it."""
  with contextlib.closing(LocalPod(hosts, devices, command, grace)) as pod:
    yield pod


def run(hosts, devices, command, expected=0):
  """Return the log of a pod that ends by itself."""
  with running(hosts, devices, command) as pod:
    assert pod.finish(180) == expected, pod.log
  return pod.log
