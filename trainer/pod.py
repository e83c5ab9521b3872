"""The hosts of a run: how they find each other, agree, and notice that one of them is missing.

Every host runs the same program. What the compiler emits waits for all of them, in C++ and for ever, so a thread of each
host keeps telling the others where it is, through the key-value store of JAX's coordination service on host 0. A host
that has not been heard for `config.pod.timeout_seconds` is named by all others, and they exit with `HOST_LOST`. Host 0 is
the exception: when its process dies, JAX's client in the others ends them at once, with a trace in place of a sentence.
"""

import os
import sys
import threading
import time
from typing import Any

from absl import logging
import jax
from jax._src import distributed  # the key-value store has no public name

from input_pipeline.errors import DataError
from trainer.errors import ConfigError, HOST_LOST, HostLost, TrainerError

_TICKS = 10  # signs of life within a timeout


class Pod:
  """This host among the others; with one host there is nobody to wait for.

  Attributes:
    host: number of this host.
    hosts: how many there are.
  """

  def __init__(self, host: int, hosts: int, timeout: float, stuck: float):
    """Starts to listen to the other hosts; use `join`."""
    self.host, self.hosts, self._timeout, self._stuck = host, hosts, timeout, stuck
    self._point, self._since = "start", time.monotonic()
    self._heard = {other: (time.monotonic(), "start") for other in range(hosts)}
    self._left = threading.Event()
    self._client = distributed.global_state.client
    if hosts > 1:
      self._thread = threading.Thread(target=self._watch, name="pod", daemon=True)
      self._thread.start()

  @classmethod
  def join(cls, *, timeout: float, start_timeout: float, stuck: float) -> "Pod":
    """Finds the other hosts, before anything else of JAX is used.

    JAX_COORDINATOR_ADDRESS=HOST:PORT with JAX_NUM_PROCESSES and JAX_PROCESS_ID tell where they are; with
    JAX_COORDINATOR_ADDRESS=auto the cluster tells (TPU pods, Slurm). Without it this host is the only one.

    Args:
      timeout: seconds that a host may be silent.
      start_timeout: seconds for all hosts to come up; if they do not, JAX ends the process itself.
      stuck: seconds that this host may stay at one point.

    Raises:
      ConfigError: if the environment says only half of it.
    """
    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    if not address:
      return cls(0, 1, timeout, stuck)
    found = {}
    if address != "auto":
      try:
        found = {"coordinator_address": address, "num_processes": int(os.environ["JAX_NUM_PROCESSES"]),
                 "process_id": int(os.environ["JAX_PROCESS_ID"])}
      except (KeyError, ValueError) as error:
        raise ConfigError(f"JAX_COORDINATOR_ADDRESS={address} needs the numbers JAX_NUM_PROCESSES and JAX_PROCESS_ID "
                          f"beside it ({error}).") from error
    else:
      del os.environ["JAX_COORDINATOR_ADDRESS"]
    # The stop is agreed in the step (see trainer.step); JAX's own service would take SIGTERM away from us.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX's own heartbeat comes late: it ends the process without a word about which host is missing.
    jax.distributed.initialize(**found, initialization_timeout=round(start_timeout),
                               heartbeat_timeout_seconds=round(10 * timeout), shutdown_timeout_seconds=round(timeout))
    return cls(distributed.global_state.process_id, distributed.global_state.num_processes, timeout, stuck)

  def at(self, point: str) -> None:
    """Notes where this host is, for itself and the others."""
    self._point, self._since = point, time.monotonic()

  def gather(self, name: str, value: str) -> dict[int, str]:
    """Returns the value of every host, by host; `name` must be new each time.

    Raises:
      HostLost: naming the hosts that did not give theirs in time.
    """
    if self.hosts == 1:
      return {0: value}
    self._client.key_value_set(f"gather/{name}/{self.host}", value)
    deadline, values = time.monotonic() + self._timeout, {}
    for other in range(self.hosts):
      left = max(1, round(1000 * (deadline - time.monotonic())))
      try:
        values[other] = self._client.blocking_key_value_get(f"gather/{name}/{other}", left)
      except RuntimeError:
        continue
    missing = [str(other) for other in range(self.hosts) if other not in values]
    if missing:
      raise HostLost(f"Host {self.host} waited {self._timeout:g} s at '{name}' for host {', '.join(missing)}.")
    return values

  def _watch(self) -> None:
    """Tells where this host is and listens where the others are, until `leave`."""
    count, reached = 0, time.monotonic()
    while not self._left.wait(self._timeout / _TICKS):
      count += 1
      now = time.monotonic()
      try:
        self._client.key_value_set(f"alive/{self.host}", f"{count}|{self._point}", allow_overwrite=True)
        for key, value in self._client.key_value_dir_get("alive/"):
          other = int(key.rsplit("/", 1)[1])
          if value != self._heard[other][1]:
            self._heard[other] = (now, value)
        reached = now
      except RuntimeError as error:
        if now - reached > self._timeout:
          self._give_up(f"host 0, which coordinates, cannot be reached ({str(error).splitlines()[0][:120]})")
        continue
      silent = [other for other, (heard, _) in self._heard.items() if now - heard > self._timeout]
      if silent and not self._left.is_set():
        self._give_up("; ".join(f"host {other} was last heard {now - self._heard[other][0]:.0f} s ago at "
                                f"'{self._heard[other][1].rpartition('|')[2]}'" for other in silent))
      if now - self._since > self._stuck:
        self._give_up(f"this host has been at '{self._point}' for {now - self._since:.0f} s")

  def _give_up(self, reason: str) -> None:
    # The main thread may be held in C++, where no exception reaches it.
    logging.error("Host %d at '%s' gives up: %s. Run the same command again on all hosts.", self.host, self._point, reason)
    logging.flush()
    sys.stderr.flush()
    os._exit(HOST_LOST)

  def __enter__(self) -> "Pod":
    return self

  def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
    if kind is None or (issubclass(kind, (TrainerError, DataError)) and kind is not HostLost):
      try:
        self.leave()
      except HostLost:  # the error is this host's alone, and is what must be said
        if kind is None:
          raise
    elif self.hosts > 1 and kind is not HostLost:
      logging.error("Host %d at '%s': %s. Looking whether another host is lost ...", self.host, self._point,
                    str(error).splitlines()[0][:200])
      self._wait_for_verdict()

  def _wait_for_verdict(self) -> None:
    """After an error that another host's end may explain: returns when every host has been heard since."""
    began = time.monotonic()
    while any(heard <= began for heard, _ in self._heard.values()):
      time.sleep(self._timeout / _TICKS)

  def leave(self) -> None:
    """Leaves together with the others; nobody listens any more."""
    if self.hosts > 1:
      self.at("end")
      self.gather("end", "")
      self._left.set()
      self._thread.join()
      jax.distributed.shutdown()
