"""The hosts of a run: how they find each other, agree, and notice that one of them is missing.

Every host runs the same program. Collectives wait for all hosts, in C++ and without a time limit.
So a thread of each host reports to host 0 where the host is, and receives what is wrong elsewhere
(trainer/pod/lifeline.py). If a host dies, fails, or is silent for `config.pod.timeout_seconds`, all
others name it and the point where it was, and exit too.
"""

from collections.abc import Callable
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from typing import Any

from absl import logging
import jax

# Private: there is no public way to find out what jax.distributed.initialize() would detect. Held
# by tests/trainer/test_private_apis.py.
from jax._src import clusters
import ml_collections

from input_pipeline.errors import DataError, first_line
from trainer.errors import (
  FAILED,
  HOST_LOST,
  ConfigError,
  HostLost,
  Preempted,
  TrainerError,
  exit_code,
)
from trainer.pod import preemption
from trainer.pod.lifeline import Lifeline, Line, expand

_TICKS = 10  # reports to host 0 within a timeout
_LOOK_SECONDS = 0.25  # between two looks at whether this host is asked to stop, which it reports


class Pod:
  """This host among the others; with one host there is nobody to wait for.

  As a context manager it leaves together with the others, and reports an error to them first.

  Attributes:
    host: number of this host.
    hosts: how many there are.
  """

  def __init__(self, limits: ml_collections.ConfigDict, host: int = 0, hosts: int = 1):
    """Make a pod of one host; for more, use `join`."""
    self.host, self.hosts, self._limits = host, hosts, limits
    self._point, self._since = "start", time.monotonic()
    self._note: tuple[int, float] | None = None
    self._notes: dict[int, float] = {}
    self._stop_reported = False  # by any host
    self._reported = False  # by this host, that it has failed
    self._gathers = 0
    self._left = threading.Event()
    self._dying = threading.Lock()

  @classmethod
  def join(cls, limits: ml_collections.ConfigDict, stop: Callable[[], bool]) -> "Pod":
    """Find the other hosts, before anything else of JAX is used.

    JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES and JAX_PROCESS_ID give the address of host
    0, the number of hosts and the number of this one. Without them JAX detects a cluster (TPU pods,
    Slurm, MPI). If there is none, this host is the only one.

    Args:
      limits: `config.pod`.
      stop: whether this host is asked to stop, polled while it waits.

    Raises:
      ConfigError: if only some of the variables are set, or hosts contradict each other.
      HostLost: naming the hosts that did not come up in time.
      Preempted: if a host was asked to stop meanwhile.
    """
    address, hosts, host = _find_hosts(limits.start_seconds)
    pod = cls(limits, host, hosts)
    if hosts > 1:
      pod._start(address, stop)
    return pod

  def _start(self, address: str, stop: Callable[[], bool]) -> None:
    limits, (name, _, port) = self._limits, address.rpartition(":")
    deadline = time.monotonic() + limits.start_seconds
    if self.host == 0:
      try:
        self._lifeline = Lifeline(int(port), self.hosts, limits.timeout_seconds)
      except (OSError, ValueError) as error:
        raise ConfigError(
          f"Host 0 cannot listen at {address} (JAX_COORDINATOR_ADDRESS): {error}."
        ) from error
    where = ("localhost" if self.host == 0 else name, int(port))
    while True:
      try:
        self._line = Line(where, self.host, limits.timeout_seconds)
        break
      except OSError as error:
        if stop():
          raise Preempted(
            "Stopped before the other hosts were found; nothing was started."
          ) from error
        if time.monotonic() > deadline:
          raise HostLost(
            f"Host {self.host} could not reach host 0 at {address} within "
            f"{limits.start_seconds:g} s ({error}). Is it up, and can the hosts reach each other?"
          ) from error
        time.sleep(0.5)
    refused = self._line.ask("hello", hosts=self.hosts).get("refused")
    if refused:
      raise ConfigError(refused)
    self._thread = threading.Thread(
      target=self._watch,
      args=(Line(where, self.host, limits.timeout_seconds),),
      name="pod",
      daemon=True,
    )
    self._thread.start()

    def wanted(missing: list[int]) -> None:
      if stop():
        self._fail("was asked to stop while the hosts came up", Preempted)
      if time.monotonic() > deadline:
        self._fail(
          f"waited {limits.start_seconds:g} s for host {', '.join(map(str, missing))} to come up",
          HostLost,
        )

    # JAX's coordinator listens at any free port of host 0, which the other hosts learn here.
    free = _free_port() if self.host == 0 else None
    ports = self.gather("start", free, wanted)
    self._catch_aborts()
    # Stops are agreed in the step (trainer/pod/requests.py); JAX's own service would catch SIGTERM.
    jax.config.update("jax_enable_preemption_service", False)
    self.at("jax.distributed.initialize")
    # JAX's own heartbeat must come later: it ends the process without naming the missing host.
    jax.distributed.initialize(
      f"{name}:{ports[0]}",
      self.hosts,
      self.host,
      cluster_detection_method="deactivate",
      initialization_timeout=round(limits.start_seconds),
      heartbeat_timeout_seconds=round(10 * limits.timeout_seconds),
      shutdown_timeout_seconds=round(limits.timeout_seconds),
    )

  def at(self, point: str) -> None:
    """Note where this host is, for its own messages and those of the others."""
    self._point, self._since = point, time.monotonic()

  def gather(
    self, name: str, value: Any, while_waiting: Callable[[list[int]], None] = lambda missing: None
  ) -> dict[int, Any]:
    """Return the value of every host, by number; all hosts call this in the same order.

    Args:
      name: name of this exchange, and of the point where the hosts wait for each other.
      value: value of this host, JSON-able.
      while_waiting: called every second with the missing hosts; an exception ends the wait.

    Raises:
      HostLost: if a host is lost meanwhile, or host 0 cannot be reached.
    """
    if self.hosts == 1:
      return {0: value}
    self.at(name)
    self._gathers += 1
    while True:
      try:
        reply = self._line.ask("gather", number=self._gathers, name=name, value=value)
      except OSError as error:
        raise HostLost(
          self._farewell(f"host 0, which coordinates, cannot be reached: {error}", HOST_LOST)
        ) from error
      if "values" in reply:
        given = {host: value for value, ranges in reply["values"] for host in expand(ranges)}
        return dict(sorted(given.items()))
      if reply["verdict"]:
        self._await_verdict()
      while_waiting(expand(reply["missing"]))

  def odd_one(self, name: str, value: Any) -> int | None:
    """Return the first host whose value is another than that of host 0, the same on all hosts.

    The arguments and errors are those of `gather`; None if all values are equal.
    """
    seen = self.gather(name, value)
    return next((host for host in sorted(seen) if seen[host] != seen[0]), None)

  def agree(self, name: str, value: bool) -> bool:
    """Whether `value` is true on any host."""
    return any(self.gather(name, value).values())

  def exchange(self, step: int, seconds: float) -> dict[int, float]:
    """Report a time of this host's monotonic clock for the window up to `step`, without waiting.

    Returns:
      The times of all hosts, in seconds by the clock of host 0, for the newest window that all have
      reported; {} before the first.
    """
    self._note = step, seconds
    return self._notes if self.hosts > 1 else {0: seconds}

  def stop_requested(self) -> bool:
    """Whether any host was asked to stop, as far as this one knows; never waits.

    Hosts learn it at different moments, so what depends on it is to be agreed in the step.
    """
    return self._stop_reported or preemption.requested()

  def _watch(self, line: Line) -> None:
    """Report where this host is and receive what is wrong elsewhere, until `leave`."""
    seen = -1  # the last window whose notes were received
    best, offset = float("inf"), 0.0  # clock of host 0 minus ours, by the quickest reply
    while True:
      note = self._note and (self._note[0], self._note[1] + offset)
      # No clock of the day: those jump when they are set.
      asked = time.monotonic()
      try:
        stop = preemption.requested()
        reply = line.ask("alive", point=self._point, note=note, seen=seen, stop=stop)
      except OSError as error:
        if self._left.is_set():
          return
        self._give_up(f"host 0, which coordinates, cannot be reached: {error}", HOST_LOST)
      answered = time.monotonic()
      if answered - asked < best:
        best, offset = answered - asked, reply["now"] - (asked + answered) / 2
      if reply["notes"] is not None:
        seen = reply["window"]
        self._notes = {int(host): seconds for host, seconds in reply["notes"].items()}
      self._stop_reported = reply["stop"]
      if self._left.is_set():
        line.ask("bye")
        return
      # A verdict on this host that it has not given itself is on its silence: it was suspended.
      if reply["verdict"] and not (reply["verdict"][0] == self.host and self._reported):
        self._give_up(*reply["verdict"][1:])
      stuck = time.monotonic() - self._since
      if stuck > self._limits.stuck_seconds:
        self._line_failed(
          f"host {self.host} has been at '{self._point}' for {stuck:.0f} s", HOST_LOST, line
        )
        self._give_up(f"this host has been at '{self._point}' for {stuck:.0f} s", HOST_LOST)
      pause = min(5.0, self._limits.timeout_seconds / _TICKS)
      due = time.monotonic() + pause
      while time.monotonic() < due and preemption.requested() == stop:
        if self._left.wait(min(pause, _LOOK_SECONDS)):
          break

  def _farewell(self, reason: str, code: int) -> str:
    advice = "" if code == FAILED else " Run the same command again on all hosts."
    return f"Host {self.host} at '{self._point}' gives up: {reason.rstrip('.')}.{advice}"

  def _give_up(self, reason: str, code: int) -> None:
    """End this process with one sentence; no exception would reach a main thread held in C++."""
    self._dying.acquire()  # never released: one sentence is enough
    logging.error("%s", self._farewell(reason, code))
    if self.host == 0:
      self._lifeline.wait_for_others()  # they receive the reason from here
    logging.flush()
    sys.stderr.flush()
    os._exit(code)

  def _line_failed(self, sentence: str, code: int, line: Line) -> None:
    self._reported = True
    try:
      line.ask("failed", sentence=sentence, code=code)
    except OSError:
      logging.warning("Host 0 could not be notified.")

  def _fail(self, what: str, kind: type[TrainerError]) -> None:
    """Notify the others, and raise."""
    self._line_failed(f"host {self.host} {what}", kind.exit_code, self._line)
    raise kind(f"Host {self.host} {what}.")

  def _await_verdict(self) -> None:
    """Give the watching thread the time to find out what is wrong, and to end this process."""
    time.sleep(self._limits.timeout_seconds * (1 + 2 / _TICKS))

  def _catch_aborts(self) -> None:
    """Delay aborts in C++: JAX and gloo abort when a host dies, before the reason is known."""

    @ctypes.CFUNCTYPE(None, ctypes.c_int)
    def on_abort(number: int) -> None:
      del number
      self._await_verdict()
      self._give_up(
        "JAX's runtime aborted this process for the reason above; no other host is missing",
        HOST_LOST,
      )

    self._on_abort = on_abort  # C holds no reference to it
    ctypes.CDLL(None).signal(signal.SIGABRT, on_abort)

  def __enter__(self) -> "Pod":
    return self

  def __exit__(
    self, kind: type[BaseException] | None, error: BaseException | None, trace: object
  ) -> None:
    if self.hosts == 1:
      return
    if error is None or getattr(error, "agreed", False):
      self.leave()
      return
    if not isinstance(error, (TrainerError, DataError)):
      self.rule_out_lost(error)
    sentence = first_line(error) or type(error).__name__
    self._line_failed(
      f"host {self.host} failed at '{self._point}': {sentence}", exit_code(error), self._line
    )
    self._left.set()
    if self.host == 0:
      self._lifeline.wait_for_others()

  def rule_out_lost(self, error: BaseException) -> None:
    """Return if an error is this host's own: most often it is gloo's, as another host has ended."""
    if self.hosts == 1:
      return
    logging.error(
      "Host %d at '%s': %s. Checking whether another host is lost ...",
      self.host,
      self._point,
      first_line(error)[:200] or type(error).__name__,
    )
    self._await_verdict()

  def leave(self) -> None:
    """Leave together with the others."""
    if self.hosts > 1:
      self.gather("end", None)
      jax.distributed.shutdown()
      self._left.set()
      self._thread.join()
      if self.host == 0:
        self._lifeline.wait_for_others()


def _find_hosts(timeout: float) -> tuple[str, int, int]:
  """Return the address of host 0, the number of hosts, and the number of this one."""
  address = os.environ.get("JAX_COORDINATOR_ADDRESS")
  if address:
    try:
      hosts, host = int(os.environ["JAX_NUM_PROCESSES"]), int(os.environ["JAX_PROCESS_ID"])
    except (KeyError, ValueError) as error:
      raise ConfigError(
        f"JAX_COORDINATOR_ADDRESS={address} needs the numbers JAX_NUM_PROCESSES and JAX_PROCESS_ID "
        f"with it ({error})."
      ) from error
    if not 0 <= host < hosts or not address.rpartition(":")[2].isdigit():
      raise ConfigError(
        f"JAX_COORDINATOR_ADDRESS={address} must be HOST:PORT, and JAX_PROCESS_ID={host} below "
        f"JAX_NUM_PROCESSES={hosts}."
      )
    return address, hosts, host
  if os.environ.get("JAX_PLATFORMS") == "cpu":  # as in a smoke run on one worker of a TPU pod
    return "", 1, 0
  where, count, number, _ = clusters.ClusterEnv.auto_detect_unset_distributed_params(
    None, None, None, None, None, round(timeout)
  )
  return ("", 1, 0) if not where or not count or number is None else (where, count, number)


def _free_port() -> int:
  with socket.socket() as probe:
    probe.bind(("", 0))
    return probe.getsockname()[1]
