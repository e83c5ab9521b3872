"""Runs a command on several hosts that are processes of this machine: the test bed of pods.

    python -m launch.local_pod --hosts=4 --devices-per-host=2 [--cpus=N] -- \\
        python -m trainer --config=... --workdir=...

Each process is a host of its own to `jax.distributed`, with forced CPU devices and gloo in place of
a pod's network. Its lines are prefixed with its number. SIGTERM and SIGINT go to all hosts; to
signal one of them, use the process id that is printed at start. When a host fails, its last lines
are shown, the others get `--grace` seconds to end, and whatever is left is killed. The exit code is
that of the host that failed first, else 0.
"""

import argparse
import collections
from collections.abc import Sequence
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time

_LAST_LINES = 15
_CAN_BIND = hasattr(os, "sched_setaffinity")  # to cores; not on macOS


def main(argv: Sequence[str] | None = None) -> int:
  """Run the command and return its exit code."""
  parser = argparse.ArgumentParser(
    prog="python -m launch.local_pod",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--hosts", type=int, default=2, help="number of processes (default 2)")
  parser.add_argument(
    "--devices-per-host", type=int, default=1, help="CPU devices per host (default 1)"
  )
  parser.add_argument(
    "--cpus",
    type=int,
    default=0,
    help="cores of this machine per host (default 0: every host may use all)",
  )
  parser.add_argument(
    "--grace",
    type=float,
    default=150.0,
    help="seconds for the other hosts to end when one has failed (default 150)",
  )
  parser.add_argument(
    "command", nargs=argparse.REMAINDER, help="after --: the command of each host"
  )
  args = parser.parse_args(argv)
  command = args.command[1:] if args.command[:1] == ["--"] else args.command
  if args.hosts < 1 or args.devices_per_host < 1:
    parser.error("--hosts and --devices-per-host must be 1 or more")
  if args.cpus and not _CAN_BIND:
    parser.error("--cpus needs Linux, where a process can be bound to cores")
  cores = sorted(os.sched_getaffinity(0)) if _CAN_BIND else [0]
  if not 0 <= args.cpus * args.hosts <= len(cores):
    parser.error(
      f"--cpus={args.cpus} for {args.hosts} hosts is more than the {len(cores)} cores of this "
      "machine"
    )
  if not command:
    parser.error("give the command after --")
  shares = [cores[args.cpus * host : args.cpus * (host + 1)] or cores for host in range(args.hosts)]
  return _LocalPod(shares, args.devices_per_host, args.grace, command).run()


class _LocalPod:
  """The processes of one run."""

  def __init__(
    self,
    cores: Sequence[Sequence[int]],
    devices_per_host: int,
    grace: float,
    command: Sequence[str],
  ):
    """Start a host for each entry of `cores`, on these cores."""
    hosts, self._grace = len(cores), grace
    self._lines: queue.Queue[tuple[int, str | None]] = queue.Queue()
    self._last: list[collections.deque[str]] = [
      collections.deque(maxlen=_LAST_LINES) for _ in range(hosts)
    ]
    port = _free_port()
    self._processes = [
      subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # a Ctrl-C of the terminal must reach each host once, through us
        env=os.environ
        | {
          "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
          "JAX_NUM_PROCESSES": str(hosts),
          "JAX_PROCESS_ID": str(host),
          "JAX_NUM_CPU_DEVICES": str(devices_per_host),
          "JAX_PLATFORMS": "cpu",
          "PYTHONUNBUFFERED": "1",
        },
      )
      for host in range(hosts)
    ]
    for host, process in enumerate(self._processes):
      if _CAN_BIND:
        os.sched_setaffinity(process.pid, cores[host])
      print(f"[{host}] started as process {process.pid}", flush=True)
      threading.Thread(target=self._read, args=(host,), daemon=True).start()

  def _read(self, host: int) -> None:
    output = self._processes[host].stdout
    assert output is not None  # a pipe
    for line in output:
      self._lines.put((host, line.rstrip("\n")))
    self._lines.put((host, None))

  def _send(self, number: int) -> None:
    for process in self._processes:
      if process.poll() is None:
        os.killpg(process.pid, number)

  def run(self) -> int:
    """Wait until no process is left, and return the exit code."""
    handlers = {
      number: signal.signal(number, lambda number, _: self._send(number))
      for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
      return self._run()
    finally:
      for number, handler in handlers.items():
        signal.signal(number, handler)

  def _run(self) -> int:
    first: tuple[int, int] | None = None
    deadline, running = float("inf"), len(self._processes)
    try:
      while running:
        try:
          host, line = self._lines.get(timeout=1.0)
        except queue.Empty:
          host, line = None, ""
        if host is not None and line is not None:
          self._last[host].append(line)
          print(f"[{host}] {line}", flush=True)
        elif host is not None:
          running -= 1
          code = self._processes[host].wait()
          print(f"[{host}] ended with code {code}", flush=True)
          if code and first is None:
            first, deadline = (host, code), time.monotonic() + self._grace
        if first and time.monotonic() > deadline:
          left = [str(host) for host, one in enumerate(self._processes) if one.poll() is None]
          print(
            f"killing host {', '.join(left)}, still running {self._grace:g} s after host "
            f"{first[0]} ended",
            flush=True,
          )
          self._send(signal.SIGKILL)
          deadline = float("inf")
    finally:
      self._send(signal.SIGKILL)
    if first is None:
      return 0
    print(
      f"host {first[0]} was the first to fail, with code {first[1]}; its last lines:", flush=True
    )
    for line in self._last[first[0]]:
      print(f"  {line}", flush=True)
    return first[1] if first[1] > 0 else 128 - first[1]


def _free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("localhost", 0))
    return probe.getsockname()[1]


if __name__ == "__main__":
  sys.exit(main())
