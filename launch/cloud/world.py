"""What is seen of a run, what is remembered of it, and what may be done next."""

from __future__ import annotations

import dataclasses
from typing import Any, TypedDict

QUEUED = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES")
LEAVING = ("SUSPENDING", "DELETING")
QUEUED_STATES = (*QUEUED, "PROVISIONING", "ACTIVE", *LEAVING, "SUSPENDED", "FAILED")
COMING = ("CREATING", "STARTING", "RESTARTING", "REIMAGING", "REPAIRING", "UNHIDING")
GONE = ("PREEMPTED", "TERMINATED", "STOPPED", "STOPPING", "DELETING", "HIDDEN", "HIDING")
NODE_STATES = ("READY", *COMING, *GONE)
UNHEALTHY = ("TIMEOUT", "UNHEALTHY_TENSORFLOW", "UNHEALTHY_MAINTENANCE")
HEALTHS = ("HEALTHY", *UNHEALTHY)


@dataclasses.dataclass(frozen=True)
class Queued:
  """A queued resource, as the service reports it."""

  state: str
  code: int = 0  # of failedData.error, by google.rpc.Code
  message: str = ""
  owner: str = ""  # label
  run: str = ""  # label


@dataclasses.dataclass(frozen=True)
class Node:
  """A slice, as the service reports it."""

  name: str
  state: str
  health: str = "HEALTHY"
  hosts: int = 1
  created: float | None = None  # seconds since 1970
  maintenance: str = ""  # what is announced, and for when


@dataclasses.dataclass(frozen=True)
class Report:
  """What the agent of a host reports, or left in the bucket; see launch/host/."""

  slice: int
  worker: int
  attempt: int | None = None
  phase: str = "none"  # none | installing | running | ended
  code: int | None = None
  ended: float | None = None
  step: int | None = None
  total: int | None = None
  progress: str = ""
  stop_requested: bool = False
  preempted: bool = False  # the cloud has announced that it takes the machine away
  trouble: str = ""
  hostname: str = ""
  guard: str = ""  # "able" once its guard has proven that it can remove the slice, else why not
  removing: str = ""  # why its guard is about to remove the slice: "deadline" or "idle"
  age: float | None = None  # seconds since the creation of the slice, by the clock of the cloud

  @property
  def name(self) -> str:
    return f"{self.slice}-{self.worker}"


@dataclasses.dataclass(frozen=True)
class World:
  """Everything that is seen at one time.

  Attributes:
    now: seconds since 1970, by the clock of the cloud.
    queued: None if it does not exist.
    nodes: those of the queued resource; empty unless it is ACTIVE.
    reports: of the hosts that answered; where the slice is gone, those that hosts of the newest
      attempt left in the bucket.
    heartbeat: what host 0 last left in the bucket, if it was read: `age`, `step`, `removing`.
    trouble: why something could not be seen, in a sentence.
  """

  now: float
  queued: Queued | None
  nodes: tuple[Node, ...] = ()
  reports: tuple[Report, ...] = ()
  heartbeat: dict[str, Any] | None = None
  trouble: str = ""


class Crash(TypedDict):
  """A crash of the trainer; `step` is None before the first one."""

  attempt: int
  step: int | None
  code: int | None
  host: str


@dataclasses.dataclass
class Memory:
  """What decisions need to remember; times are seconds since 1970."""

  attempt: int = 1
  started: float | None = None  # first request to start the trainers of this attempt
  request: str = ""  # name of the last create
  requested: float | None = None  # last create, while the queued resource should exist
  deleting: float | None = None
  waiting_since: float | None = None  # for a slice
  state: str = ""
  state_since: float = 0.0
  seen: float = 0.0  # when the state was last seen
  not_before: float = 0.0  # of the next request
  refusals: int = 0  # in a row, for want of capacity
  # [creation, last seen, request] of each slice, by the clock of the cloud
  slices: list[list[Any]] = dataclasses.field(default_factory=list)
  active: bool = False  # whether the last of them still is
  guarded: bool = False  # whether every host has proven that it can remove it
  unguarded_since: float | None = None  # since when hosts answer without that
  answered: bool = False  # whether any host of the last one requested has answered
  hosts: int = 0  # its number of hosts
  # host -> since when it does not answer
  missing: dict[str, float] = dataclasses.field(default_factory=dict)
  unready_since: float | None = None  # since when some node is not READY and HEALTHY
  ended_since: float | None = None  # since when some trainer has ended
  step: int | None = None  # the highest of all attempts
  step_now: int | None = None  # the highest of this attempt, which may resume from an earlier one
  step_at: float = 0.0  # when step_now changed
  stacks_at: float | None = None
  stopped_at: float | None = None  # when the cost limit stopped the trainers
  crashes: list[Crash] = dataclasses.field(default_factory=list)
  in_vain: int = 0  # starts in a row that reached no new step
  in_vain_step: int | None = None
  ending: list[Any] | None = None  # [exit code, reason] of a run that ends when its slice is gone

  def to_json(self) -> dict[str, Any]:
    return dataclasses.asdict(self)

  @classmethod
  def from_json(cls, value: dict[str, Any]) -> Memory:
    known = {field.name for field in dataclasses.fields(cls)}
    return cls(**{name: entry for name, entry in value.items() if name in known})

  def seconds(self) -> float:
    """Return how long slices have existed, as the cloud bills it."""
    return sum(entry[1] - entry[0] for entry in self.slices)

  def seconds_before(self) -> float:
    """Return the same without the slice that exists now."""
    return sum(entry[1] - entry[0] for entry in self.slices[: -1 if self.active else None])


@dataclasses.dataclass(frozen=True)
class Action:
  """The next thing to do.

  Attributes:
    kind: wait | create | delete | start (trainers) | stacks | stop (trainers) | finish.
    reason: for a person.
    code: exit code of a finish, or of a delete that ends the run.
    attempt: number of the attempt from now on; None leaves it.
    crash: a crash to remember.
    capacity: whether the delete is for lack of capacity.
    blame: the host whose last lines show the cause.
  """

  kind: str
  reason: str
  code: int | None = None
  attempt: int | None = None
  crash: Crash | None = None
  capacity: bool = False
  blame: str | None = None
