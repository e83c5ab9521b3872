"""Messages between the hosts of a run that do not pass through devices: which host is where.

Host 0 serves; each request and each reply is a line of JSON. Collectives wait in C++ without a time
limit, and JAX's own coordination service ends a process with a stack trace. What is kept here is
enough to end it with one sentence instead.

One thread serves all hosts, and what all hosts receive is encoded once: values of a gather that are
equal are sent as one value with the ranges of its hosts.
"""

from collections.abc import Iterable
import json
import resource
import selectors
import socket
import threading
import time
from typing import Any

from trainer.errors import FAILED, HOST_LOST

_HOLD = 1.0  # seconds for which the reply to a gather waits for missing hosts
_WINDOWS = 8  # windows whose notes are kept
_TICK = 0.25  # seconds between two looks at the clock
_READ = 1 << 16  # bytes read from a connection at once
_OTHER_FILES = 64  # open files that a process needs beside its connections
_QUESTIONS = ("hello", "alive", "gather", "failed", "bye")


def allow_connections(number: int) -> None:
  """Raise this process's limit of open files so that it may hold `number` connections.

  Raises:
    OSError: if the hard limit is too low.
  """
  needed = number + _OTHER_FILES
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  if soft == resource.RLIM_INFINITY or soft >= needed:
    return
  if hard != resource.RLIM_INFINITY and hard < needed:
    raise OSError(
      f"{number} connections need {needed} open files, and the hard limit of this process is "
      f"{hard}; raise it (ulimit -Hn)"
    )
  # Room for the files of everything else in the process, as far as the hard limit allows.
  wanted = needed + soft
  limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
  resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def expand(ranges: Iterable[tuple[int, int]]) -> list[int]:
  """Return the numbers of ranges (first, last), both included."""
  return [number for first, last in ranges for number in range(first, last + 1)]


def _ranges(numbers: Iterable[int]) -> list[tuple[int, int]]:
  """Return ascending numbers as ranges (first, last), both included."""
  ranges: list[tuple[int, int]] = []
  for number in numbers:
    if ranges and ranges[-1][1] == number - 1:
      ranges[-1] = ranges[-1][0], number
    else:
      ranges.append((number, number))
  return ranges


def _line(reply: dict[str, Any]) -> bytes:
  return json.dumps(reply).encode() + b"\n"


class _Connection:
  """A host's connection with what is half received and half sent."""

  def __init__(self, stream: socket.socket):
    self.stream = stream
    self.received = bytearray()
    self.sending: list[memoryview] = []
    self.watched: int | None = None  # the host that has ended when this connection ends


class _Gather:
  """One exchange: the values so far, and the connections that wait for the rest."""

  def __init__(self) -> None:
    self.values: dict[int, str] = {}  # JSON, by host
    self.waiting: dict[_Connection, float] = {}  # and when each is answered at the latest
    self.whole: bytes | None = None

  def reply(self, hosts: int, verdict: Any) -> bytes:
    """Return the line that all hosts receive, or who is missing."""
    if len(self.values) < hosts:
      missing = _ranges(host for host in range(hosts) if host not in self.values)
      return _line({"missing": missing, "verdict": verdict})
    if self.whole is None:
      equal: dict[str, list[int]] = {}
      for host in sorted(self.values):
        equal.setdefault(self.values[host], []).append(host)
      groups = (f"[{value}, {json.dumps(_ranges(who))}]" for value, who in equal.items())
      self.whole = f'{{"values": [{", ".join(groups)}]}}\n'.encode()
    return self.whole


class Lifeline:
  """The server, in one thread of host 0.

  A request is {"ask": method without its underscore, "host": number of the sender, ...arguments}.
  """

  def __init__(self, port: int, hosts: int, timeout: float):
    """Start to listen.

    Args:
      port: port to listen at, on all interfaces.
      hosts: number of hosts.
      timeout: seconds after which a silent host is lost.

    Raises:
      OSError: if the port is taken or not allowed, or so many connections are not.
    """
    self._hosts, self._timeout = hosts, timeout
    self._changed = threading.Condition()
    self._heard: dict[int, tuple[float, str]] = {}
    self._ended: set[int] = set()
    self._verdict: tuple[int, str, int] | None = None
    self._stop = False  # whether any host was asked to stop
    self._given: dict[tuple[int, str], _Gather] = {}
    self._notes: dict[int, dict[int, float]] = {}
    self._newest, self._newest_json = -1, "{}"  # window that all hosts have reported, its notes
    allow_connections(2 * hosts + 2)  # two of each host, and the other ends of its own
    both = socket.has_dualstack_ipv6()
    self._socket = socket.create_server(
      ("", port),
      family=socket.AF_INET6 if both else socket.AF_INET,
      dualstack_ipv6=both,
      backlog=2 * hosts,
    )
    self._socket.setblocking(False)
    self._selector = selectors.DefaultSelector()
    self._selector.register(self._socket, selectors.EVENT_READ)
    threading.Thread(target=self._serve, name="lifeline", daemon=True).start()

  def _serve(self) -> None:
    swept = time.monotonic()
    while True:
      events = self._selector.select(_TICK)
      with self._changed:
        judged = self._verdict
        for key, mask in events:
          if key.data is None:
            self._accept()
          elif mask & selectors.EVENT_READ:
            self._receive(key.data)
          else:
            self._send(key.data)
        now = time.monotonic()
        if now - swept >= _TICK or self._verdict != judged:
          swept = now
          self._find_silent(now)
          self._answer_late(now)

  def _accept(self) -> None:
    try:
      stream, _ = self._socket.accept()
    except OSError:  # it was closed while it waited
      return
    stream.setblocking(False)
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    self._selector.register(stream, selectors.EVENT_READ, _Connection(stream))

  def _receive(self, connection: _Connection) -> None:
    try:
      part = connection.stream.recv(_READ)
    except BlockingIOError:
      return
    except OSError:
      part = b""
    if not part:
      self._close(connection)
      return
    connection.received += part
    if b"\n" not in part:
      return
    *lines, rest = bytes(connection.received).split(b"\n")
    connection.received = bytearray(rest)
    for line in lines:
      try:
        request = json.loads(line)
        question = request.pop("ask")
        if question not in _QUESTIONS:
          raise ValueError(question)
        if question != "hello" and request["host"] not in range(self._hosts):
          raise ValueError(request["host"])
        if question == "gather":
          self._gather(connection, **request)
          continue
        reply = getattr(self, f"_{question}")(**request)
      except (ValueError, TypeError, KeyError, AttributeError):  # not from a host
        self._close(connection)
        return
      if question == "alive":
        connection.watched = request["host"]
      self._send(connection, reply)

  def _send(self, connection: _Connection, reply: bytes = b"") -> None:
    """Send a reply behind what is left of earlier ones, as far as the connection takes it."""
    if connection.stream.fileno() < 0:
      return
    if reply:
      connection.sending.append(memoryview(reply))
    try:
      while connection.sending:
        sent = connection.stream.send(connection.sending[0])
        connection.sending[0] = connection.sending[0][sent:]
        if not connection.sending[0]:
          del connection.sending[0]
    except BlockingIOError:
      pass
    except OSError:
      self._close(connection)
      return
    writing = selectors.EVENT_WRITE if connection.sending else 0
    if self._selector.get_key(connection.stream).events != selectors.EVENT_READ | writing:
      self._selector.modify(connection.stream, selectors.EVENT_READ | writing, connection)

  def _close(self, connection: _Connection) -> None:
    if connection.stream.fileno() < 0:
      return
    self._selector.unregister(connection.stream)
    connection.stream.close()
    for gather in self._given.values():
      gather.waiting.pop(connection, None)
    watched = connection.watched
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

  def _find_silent(self, now: float) -> None:
    for other, (heard, where) in self._heard.items():
      if now - heard > self._timeout and other not in self._ended:
        self._ended.add(other)
        silence = f"{now - heard:.0f} s ago at '{where}'"
        self._judge(other, f"host {other} was last heard from {silence}", HOST_LOST)

  def _answer_late(self, now: float) -> None:
    """Answer those that have waited for `_HOLD`, or all if something is wrong."""
    for gather in self._given.values():
      late = [one for one, limit in gather.waiting.items() if self._verdict or limit <= now]
      if late:
        reply = gather.reply(self._hosts, self._verdict)
        for connection in late:
          gather.waiting.pop(connection, None)
        self._send_all(late, reply)

  def _send_all(self, connections: Iterable[_Connection], reply: bytes) -> None:
    for connection in connections:
      self._send(connection, reply)

  def _hello(self, host: int, hosts: int) -> bytes:
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
      return _line({"refused": refused})
    self._heard[host] = time.monotonic(), "start"
    return _line({})

  def _alive(
    self, host: int, point: str, note: list[Any] | None, seen: int, stop: bool = False
  ) -> bytes:
    """Note where a host is and what it measured; return what is wrong, the time, and new notes.

    Returned as well is whether any host was asked to stop.

    Args:
      host: number of the host.
      point: where it is.
      note: [last step of a window, time]; None before the first.
      seen: the last window whose notes the host has received; -1 before the first.
      stop: whether the host was asked to stop.
    """
    self._heard[host] = time.monotonic(), point
    self._stop |= stop
    if note:
      window = self._notes.setdefault(note[0], {})
      window[host] = note[1]
      if len(window) == self._hosts and note[0] > self._newest:
        self._newest, self._newest_json = note[0], json.dumps(window)
      for old in sorted(self._notes)[:-_WINDOWS]:
        del self._notes[old]
    head = json.dumps(
      {
        "verdict": self._verdict,
        "stop": self._stop,
        "now": time.monotonic(),
        "window": self._newest,
      }
    )
    notes = self._newest_json if self._newest > seen else "null"
    return f'{head[:-1]}, "notes": {notes}}}\n'.encode()

  def _gather(self, connection: _Connection, host: int, number: int, name: str, value: Any) -> None:
    gather = self._given.setdefault((number, name), _Gather())
    gather.values[host] = json.dumps(value)
    gather.waiting[connection] = time.monotonic() + _HOLD
    if len(gather.values) == self._hosts:  # so all hosts have the results of earlier gathers
      self._given = {key: others for key, others in self._given.items() if key[0] >= number}
    elif not self._verdict:
      return
    waiting, gather.waiting = list(gather.waiting), {}
    self._send_all(waiting, gather.reply(self._hosts, self._verdict))

  def _failed(self, host: int, sentence: str, code: int) -> bytes:
    self._ended.add(host)
    self._judge(host, sentence, code)
    return _line({})

  def _bye(self, host: int) -> bytes:
    self._ended.add(host)
    self._changed.notify_all()
    return _line({})

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
