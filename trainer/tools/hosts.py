"""How long many hosts take to agree: the server of host 0 against simulated hosts.

`python -m trainer.tools.hosts PORT FIRST LAST HOSTS` is one process of simulated hosts.
"""

import argparse
from collections.abc import Callable
import itertools
import json
import os
import pathlib
import selectors
import socket
import subprocess
import sys
import threading
import time

from trainer.pod.lifeline import Lifeline, allow_connections, expand

_PROCESSES = 2  # that simulate hosts
_VALUES: dict[str, Callable[[int], str]] = {
  "equal": lambda host: "0" * 64,
  "one differs": lambda host: f"{host == 1:064d}",
  "all differ": lambda host: f"{host:064d}",
}


def bench_hosts(options: argparse.Namespace) -> None:
  """Time an agreement of many simulated hosts, with memory and threads of host 0."""
  memory, threads = _memory(), threading.active_count()
  with socket.socket() as probe:
    probe.bind(("", 0))
    port = probe.getsockname()[1]
  try:
    Lifeline(port, options.hosts, timeout=600.0)
  except OSError as error:
    raise SystemExit(f"{options.hosts} hosts cannot be served here: {error}.") from error
  edges = [options.hosts * part // _PROCESSES for part in range(_PROCESSES + 1)]
  processes = [
    subprocess.Popen(
      [sys.executable, "-m", "trainer.tools.hosts", *map(str, (port, first, last, options.hosts))],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    for first, last in itertools.pairwise(edges)
  ]
  _wait(processes)
  for name in _VALUES:
    start, cpu = time.perf_counter(), time.process_time()
    for process in processes:
      assert process.stdin
      process.stdin.write(f"{name}\n")
      process.stdin.flush()
    _wait(processes)
    print(
      f"{options.hosts} hosts, {name}: {time.perf_counter() - start:.2f} s, of which host 0 "
      f"computes {time.process_time() - cpu:.2f} s; it holds {_memory() - memory:.0f} MiB and "
      f"{threading.active_count() - threads} threads for the others"
    )
  for process in processes:
    process.communicate()


def _wait(processes: list[subprocess.Popen[str]]) -> None:
  for process in processes:
    assert process.stdout
    if not process.stdout.readline():
      raise SystemExit("A process of simulated hosts has ended; its error is above.")


def _memory() -> float:
  """Return the MiB of RAM that this process holds."""
  pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
  return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def _simulate(port: int, first: int, last: int, hosts: int) -> None:
  """Be the hosts from `first` up to `last`: one gather for each line of the standard input."""
  allow_connections(last - first)
  connections = {
    host: socket.create_connection(("localhost", port), timeout=60) for host in range(first, last)
  }
  selector = selectors.DefaultSelector()
  for host, connection in connections.items():
    selector.register(connection, selectors.EVENT_READ, host)
  print("ready", flush=True)
  for number, line in enumerate(sys.stdin):
    value = _VALUES[line.strip()]
    requests = {
      host: json.dumps(
        {"ask": "gather", "host": host, "number": number, "name": "bench", "value": value(host)}
      ).encode()
      + b"\n"
      for host in connections
    }
    for host, connection in connections.items():
      connection.sendall(requests[host])
    replies: dict[int, list[bytes]] = {host: [] for host in connections}
    whole: bytes | None = None
    waiting = set(connections)
    while waiting:
      for key, _ in selector.select():
        host = key.data
        part = connections[host].recv(1 << 20)
        if not part:
          raise SystemExit(f"Host 0 closed the connection of simulated host {host}.")
        replies[host].append(part)
        if not part.endswith(b"\n"):
          continue
        reply = b"".join(replies.pop(host))
        replies[host] = []
        if reply.startswith(b'{"missing"'):
          connections[host].sendall(requests[host])
          continue
        # One reply is parsed, for the others are the same bytes: real hosts parse at the same time.
        if whole is None:
          groups = json.loads(reply)["values"]
          given = {other: text for text, others in groups for other in expand(others)}
          assert given == {other: value(other) for other in range(hosts)}
          whole = reply
        assert reply == whole
        waiting.remove(host)
    print("done", flush=True)


if __name__ == "__main__":
  _simulate(*map(int, sys.argv[1:]))
