"""Messages between the hosts of a run that do not pass through devices: which host is where.

Host 0 serves; each request and each reply is a line of JSON. Collectives wait in C++ without a time
limit, and JAX's own coordination service ends a process with a stack trace. What is kept here is
enough to end it with one sentence instead.
"""

import json
import socket
import threading
import time
from typing import Any

from trainer.errors import FAILED, HOST_LOST

_HOLD = 1.0  # seconds for which the reply to a gather waits for missing hosts
_WINDOWS = 8  # windows whose notes are kept


class Lifeline:
  """The server, in threads of host 0.

  A request is {"ask": method without its underscore, "host": number of the sender, ...arguments}.
  """

  def __init__(self, port: int, hosts: int, timeout: float):
    """Start to listen.

    Args:
      port: port to listen at, on all interfaces.
      hosts: number of hosts.
      timeout: seconds after which a silent host is lost.

    Raises:
      OSError: if the port is taken or not allowed.
    """
    self._hosts, self._timeout = hosts, timeout
    self._changed = threading.Condition()
    self._heard: dict[int, tuple[float, str]] = {}
    self._ended: set[int] = set()
    self._verdict: tuple[int, str, int] | None = None
    self._given: dict[tuple[int, str], dict[int, Any]] = {}
    self._notes: dict[int, dict[int, float]] = {}
    both = socket.has_dualstack_ipv6()
    self._socket = socket.create_server(
      ("", port),
      family=socket.AF_INET6 if both else socket.AF_INET,
      dualstack_ipv6=both,
      backlog=2 * hosts,
    )
    threading.Thread(target=self._accept, name="lifeline", daemon=True).start()

  def _accept(self) -> None:
    while True:
      connection, _ = self._socket.accept()
      threading.Thread(target=self._serve, args=(connection,), name="lifeline", daemon=True).start()

  def _serve(self, connection: socket.socket) -> None:
    watched = None  # the host that has ended when this connection ends
    with connection, connection.makefile("rw", encoding="utf-8") as lines:
      try:
        for line in lines:
          request = json.loads(line)
          reply = getattr(self, f"_{request.pop('ask')}")(**request)
          if request.get("point") and "refused" not in reply:
            watched = request["host"]
          lines.write(json.dumps(reply) + "\n")
          lines.flush()
      except (OSError, ValueError):  # the host died in the middle of a line
        pass
    with self._changed:
      if watched is not None:
        if watched not in self._ended:
          self._judge(
            watched,
            f"host {watched} is gone: its connection closed at '{self._heard[watched][1]}'",
            HOST_LOST,
          )
        self._ended.add(watched)
        self._changed.notify_all()

  def _judge(self, host: int, sentence: str, code: int) -> None:
    """Keep the first thing that went wrong; later ones are its consequences."""
    self._verdict = self._verdict or (host, sentence, code)
    self._changed.notify_all()

  def _hello(self, host: int, hosts: int) -> dict[str, Any]:
    with self._changed:
      refused = None
      if hosts != self._hosts:
        refused = (
          f"Host {host} was started as one of {hosts} hosts, host 0 as one of {self._hosts}; start "
          "all with the same number."
        )
      elif host in self._heard:
        refused = f"There are two hosts with the number {host}; give each its own JAX_PROCESS_ID."
      if refused:
        self._judge(host, refused, FAILED)
        return {"refused": refused}
      self._heard[host] = time.monotonic(), "start"
      return {}

  def _alive(self, host: int, point: str, note: list[Any] | None) -> dict[str, Any]:
    """Note where a host is and what it measured; return what is wrong, the time, and the notes.

    Args:
      host: number of the host.
      point: where it is.
      note: [last step of a window, time]; None before the first.
    """
    with self._changed:
      now = time.monotonic()
      self._heard[host] = now, point
      if note:
        self._notes.setdefault(note[0], {})[host] = note[1]
        for old in sorted(self._notes)[:-_WINDOWS]:
          del self._notes[old]
      for other, (heard, where) in self._heard.items():
        if now - heard > self._timeout and other not in self._ended:
          self._ended.add(other)
          silence = f"{now - heard:.0f} s ago at '{where}'"
          self._judge(other, f"host {other} was last heard from {silence}", HOST_LOST)
      whole = [notes for _, notes in sorted(self._notes.items()) if len(notes) == self._hosts]
      return {"verdict": self._verdict, "now": time.time(), "notes": whole[-1] if whole else {}}

  def _gather(self, host: int, number: int, name: str, value: Any) -> dict[str, Any]:
    with self._changed:
      given = self._given.setdefault((number, name), {})
      given[host] = value
      if len(given) == self._hosts:  # so all hosts have the results of earlier gathers
        self._given = {key: others for key, others in self._given.items() if key[0] >= number}
      self._changed.notify_all()
      self._changed.wait_for(lambda: len(given) == self._hosts or self._verdict, timeout=_HOLD)
      return {"given": given, "verdict": self._verdict}

  def _failed(self, host: int, sentence: str, code: int) -> dict[str, Any]:
    with self._changed:
      self._ended.add(host)
      self._judge(host, sentence, code)
      return {}

  def _bye(self, host: int) -> dict[str, Any]:
    with self._changed:
      self._ended.add(host)
      self._changed.notify_all()
      return {}

  def wait_for_others(self) -> None:
    """Return when all other hosts have ended, in whatever way, or after the timeout."""
    with self._changed:
      self._changed.wait_for(lambda: len(self._ended | {0}) == self._hosts, timeout=self._timeout)


class Line:
  """A connection to host 0, for one thread."""

  def __init__(self, address: tuple[str, int], host: int, timeout: float):
    """Connect.

    Args:
      address: host name and port of host 0.
      host: number of this host.
      timeout: seconds to wait for the connection, and for each reply.

    Raises:
      OSError: if nothing answers at the address.
    """
    self._host = host
    self._lines = socket.create_connection(address, timeout=timeout).makefile(
      "rw", encoding="utf-8"
    )

  def ask(self, question: str, **arguments: Any) -> dict[str, Any]:
    """Return the reply of host 0.

    Args:
      question: method of Lifeline, without its underscore.
      arguments: its arguments, JSON-able.

    Raises:
      OSError: if the connection is closed, or no reply comes within the timeout.
    """
    self._lines.write(json.dumps({"ask": question, "host": self._host} | arguments) + "\n")
    self._lines.flush()
    line = self._lines.readline()
    if not line:
      raise ConnectionError("its connection closed")
    return json.loads(line)
