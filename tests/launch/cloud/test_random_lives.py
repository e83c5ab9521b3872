"""Random lives against a model of the cloud: nothing is paid for without end, and nothing twice.

Each is a sequence of states, refusals, silent hosts, jumps of the laptop's clock, launchers that
are killed between any two of their actions, and launchers that begin. The decisions are the real
ones; the slice removes itself as launch/host/guard.py does.
"""

import dataclasses
import json
import random

import pytest

from launch.cloud import boot, states
from launch.cloud.driver import begin
from launch.cloud.run import Run
from launch.cloud.settings import Place, Settings
from launch.cloud.world import Memory, Node, Queued, Report, World

SETTINGS = Settings(
  Place("run", "project", "us-west4-a", "gs://bucket"),
  owner="me",
  type="v5litepod-16",
  capacity="spot",
  max_seconds=4 * 3600.0,
  max_wait=2 * 3600.0,
)
BEAT = 60.0  # seconds between two heartbeats
POLLS = 10.0  # two of the guard
PATH = ("CREATING", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")


class Killed(Exception):
  """The launcher is gone."""


@dataclasses.dataclass
class Slice:
  """A queued resource, from its request to its end."""

  limits: dict
  request: str
  state: str = "CREATING"
  created: float | None = None  # of its node
  idle_since: float = 0.0
  phase: str = "none"
  code: int | None = None
  attempt: int | None = None
  step: int = 0
  leaving: float | None = None  # when it will be gone


class Life:
  """The cloud, and at most one launcher that drives."""

  def __init__(self, seed):
    self.random = random.Random(seed)
    self.able = self.random.random() < 0.9
    self.settings = dataclasses.replace(SETTINGS, keep=self.random.random() < 0.1)
    self.now, self.skew = 1e9, 0.0
    self.slice = None
    self.stored = json.dumps(Run(self.settings).to_json())
    self.paid, self.bought = 0.0, []
    self.beat, self.run, self.last_word, self.calm = None, None, None, False

  def chance(self, share):
    return self.random.random() < share

  # The cloud.

  def gone(self, when):
    """The machines of the slice are no longer paid for."""
    if self.slice.created is not None:
      self.paid += when - self.slice.created
      self.slice.created = None

  def heartbeat(self, when, removing=None):
    age = when - self.slice.created
    request, attempt = self.slice.request, self.slice.attempt
    return {"age": age, "request": request, "attempt": attempt, "now": when, "removing": removing}

  def pass_time(self, seconds):
    """Lets time pass: the service, the trainers, and last the guard, to the second."""
    start, self.now = self.now, self.now + seconds
    one = self.slice
    if one is None:
      return
    if one.leaving:
      if self.now >= one.leaving:
        self.gone(one.leaving)
        self.slice = None
      return
    if one.state in PATH[:-1] and self.chance(0.6):
      one.state = PATH[PATH.index(one.state) + 1]
      if one.state == "ACTIVE":
        one.created = one.idle_since = self.now
    elif one.state in PATH[:-1] and self.chance(0.05):
      one.state = "FAILED"
    elif one.state == "ACTIVE":
      self.guard(start)
      if self.slice and one.state == "ACTIVE":
        self.train()

  def guard(self, start):
    one = self.slice
    longest, idle = one.limits["max_seconds"], one.limits["idle"]
    ends = []
    if longest is not None:
      ends.append((one.created + longest, "deadline"))
    if idle and one.phase != "running":
      ends.append((one.idle_since + idle, "idle"))
    when, reason = min(ends, default=(float("inf"), None))
    if self.able and when <= self.now:
      when = max(start, when)
      self.beat = self.heartbeat(when, reason)
      self.gone(when + POLLS)
      self.slice = None
    else:
      self.beat = self.heartbeat(self.now - self.random.random() * BEAT)

  def train(self):
    one = self.slice
    if not self.calm and self.chance(0.03):
      self.gone(self.now)
      one.state = "SUSPENDING" if self.chance(0.5) else "SUSPENDED"
    elif one.phase == "installing":
      one.phase = "running"
    elif one.phase == "running":
      one.step += self.random.randrange(3)
      if not self.calm and self.chance(0.05):
        one.phase, one.idle_since = "ended", self.now
        one.code = self.random.choice([0, 75, 76, 1, 2, -9])

  # What the launcher sees and does.

  def see(self):
    one = self.slice
    if one is None:
      return World(self.now + self.skew, None, heartbeat=self.beat)
    queued = Queued("DELETING" if one.leaving else one.state, code=8)
    if queued.state != "ACTIVE":
      return World(self.now + self.skew, queued, heartbeat=self.beat)
    node = Node("run", "READY", hosts=1, created=one.created)
    reports = ()
    if self.chance(0.9):
      one.idle_since = self.now  # the guard counts a visit
      guard = states.ABLE if self.able else "the service account may not delete queued resources"
      age = self.now - one.created
      reports = (
        Report(0, 0, one.attempt, one.phase, one.code, self.now, one.step, guard=guard, age=age),
      )
    return World(self.now + self.skew, queued, (node,), reports)

  def store(self):
    self.stored = json.dumps(self.run.to_json())

  def die(self, share=0.02):
    if self.chance(share):
      raise Killed

  def turn(self):
    """One turn of launch/cloud/driver.py; returns whether the launcher goes on."""
    if self.chance(0.1):
      return True  # the service did not answer
    memory = self.run.memory
    world = self.see()
    states.remember(world, memory, self.settings)
    action = states.decide(world, memory, self.settings)
    self.die()
    if action.kind == "wait":
      self.store()
      return True
    states.acted(action, memory, self.settings, world.now)
    if action.kind == "finish":
      complete = action.reason.startswith(states.COMPLETE)
      self.run.result = {"code": action.code, "reason": action.reason, "complete": complete}
      self.last_word = action.reason
      self.store()
      return False
    self.store()
    self.die()
    if action.kind == "create":
      return self.create(memory)
    if action.kind == "delete" and self.slice and not self.chance(0.1):
      self.slice.leaving = self.slice.leaving or self.now + self.random.randrange(20, 100)
    elif action.kind == "start" and self.slice and self.slice.attempt != memory.attempt:
      if self.chance(0.9):
        one = self.slice
        assert self.able, "a trainer starts on a slice that cannot remove itself"
        one.attempt, one.phase, one.code = memory.attempt, "installing", None
    elif action.kind == "stop" and self.slice and self.slice.phase == "running":
      self.slice.phase, self.slice.code, self.slice.idle_since = "ended", 75, self.now
    self.die()
    return True

  def create(self, memory):
    if self.chance(0.1):
      states.refused(memory, self.settings, self.now)
      memory.requested = None
      return True
    if self.slice is None:  # else ALREADY_EXISTS
      assert not json.loads(self.stored)["result"], "a slice is bought for a run that has ended"
      self.slice = Slice(boot.limits(self.settings, memory), memory.request)
      self.bought.append(memory.request)
    self.die(0.1)  # after it was done, before it was seen
    return True

  def launch(self):
    """A launcher begins, as `up` and `watch` do."""
    self.run = Run.from_json(json.loads(self.stored))
    self.run.memory = Memory.from_json(json.loads(json.dumps(self.run.memory.to_json())))
    if self.run.result and self.run.result["complete"]:
      self.run = None
      return
    begin(self.run, self.settings, self.now + self.skew)
    self.store()

  def live(self):
    for _ in range(self.random.randrange(20, 120)):
      self.pass_time(self.random.choice([5, 15, 60, 60, 60, 600]))
      if self.run is None and self.chance(0.2):
        self.launch()
      if self.run is not None:
        if self.chance(0.02):
          self.skew = self.random.choice([0.0, 0.0, 86400.0, -86400.0, 3600.0])
        try:
          if not self.turn():
            self.run = None
            self.skew = 0.0
        except Killed:
          self.run = None
    self.run, self.calm = None, True
    for _ in range(400):  # the laptop is closed, and no preemption comes to help
      self.pass_time(60.0)
      if self.slice is None:
        break


def check(seed):
  life = Life(seed)
  life.live()
  one = life.slice
  if one is not None and one.created is not None:
    assert not life.able, f"seed {seed}: paid for without end"
    assert one.phase == "none", f"seed {seed}: a trainer ran on a slice without a guard"
  if life.able:
    slack = len(life.bought) * (BEAT + POLLS + 60.0)
    limit = SETTINGS.max_seconds
    assert life.paid <= limit + slack, f"seed {seed}: {life.paid - limit:.0f} s beyond the limit"
  assert len(set(life.bought)) == len(life.bought), f"seed {seed}: bought twice"


def test_random_lives():
  for seed in range(1000):
    check(seed)


@pytest.mark.slow
def test_ten_thousand_random_lives():
  for seed in range(10_000):
    check(seed)
