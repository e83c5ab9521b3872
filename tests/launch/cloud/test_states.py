"""The decisions in every state of the service and of the hosts, by the clock of the test."""

import dataclasses
import json

import pytest

from launch.cloud import states
from launch.cloud import world as world_lib
from launch.cloud.settings import Place, Settings
from launch.cloud.world import Memory, Node, Queued, World

SETTINGS = Settings(
  Place("run", "project", "us-west4-a", "gs://bucket"),
  owner="me",
  type="v5litepod-16",
  capacity="spot",
  max_seconds=10 * 3600,
)


def host(*arguments, **fields):
  """Returns the report of a host whose guard can remove the slice."""
  return world_lib.Report(*arguments, guard=states.ABLE, **fields)


class Life:
  """A run as its launcher sees it; `see` is one turn of the loop."""

  def __init__(self, **changes):
    self.settings = dataclasses.replace(SETTINGS, **changes)
    self.memory, self.now, self.beat = Memory(), 1e9, None

  def see(self, queued=None, nodes=None, reports=(), seconds=60.0, **queued_fields):
    """Lets time pass, looks, and does what is decided."""
    self.now += seconds
    if queued == "ACTIVE" and nodes is None:
      nodes = [Node("run", "READY", hosts=2)]
    world = World(
      self.now,
      Queued(queued, **queued_fields) if queued else None,
      tuple(nodes or ()),
      tuple(reports),
      self.beat,
    )
    # As in run.json between any two turns.
    self.memory = Memory.from_json(json.loads(json.dumps(self.memory.to_json())))
    states.remember(world, self.memory, self.settings)
    action = states.decide(world, self.memory, self.settings)
    states.acted(action, self.memory, self.settings, self.now)
    return action

  def hosts(self, phase="running", codes=(None, None), step=None, **fields):
    """Returns what two hosts say of the newest attempt."""
    phases = ["running" if phase == "ended" and code is None else phase for code in codes]
    return [
      host(0, worker, self.memory.attempt, phases[worker], code, self.now, step, 1000, **fields)
      for worker, code in enumerate(codes)
    ]

  def last_words(self, removing, age=600):
    """Returns what the guard of the slice left in the bucket."""
    request = self.memory.request
    return {"now": self.now, "attempt": 1, "removing": removing, "age": age, "request": request}

  def train(self, step=100):
    """Brings a run to where it trains."""
    assert self.see().kind == "create"
    assert self.see("ACTIVE", reports=[host(0, 0), host(0, 1)]).kind == "start"
    assert self.see("ACTIVE", reports=self.hosts("installing")).kind == "wait"
    assert self.see("ACTIVE", reports=self.hosts(step=step)).reason == "training"
    return self

  def end(self, *codes, step=100, **fields):
    """Lets the trainers end."""
    return self.see("ACTIVE", reports=self.hosts("ended", codes, step, **fields))


def test_a_quiet_life():
  life = Life()
  assert life.see().kind == "create"
  for state in ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING"):
    assert life.see(state).kind == "wait"
  assert life.see("ACTIVE", nodes=[]).kind == "wait"
  assert life.see("ACTIVE", nodes=[Node("run", "CREATING", hosts=2)]).kind == "wait"
  assert life.see("ACTIVE").reason == "0 of 2 hosts answer"
  assert life.see("ACTIVE", reports=[host(0, 1)]).reason == "1 of 2 hosts answer"
  start = life.see("ACTIVE", reports=[host(0, 0), host(0, 1)])
  assert (start.kind, life.memory.attempt) == ("start", 1)
  assert (
    life.see("ACTIVE", reports=life.hosts("installing")).reason == "2 of 2 hosts are installing"
  )
  for step in range(100, 1000, 100):
    assert life.see("ACTIVE", reports=life.hosts(step=step)).reason == "training"
  assert life.end(0, None).kind == "wait"
  done = life.end(0, 0)
  assert (done.kind, done.code) == ("delete", states.DONE)
  assert life.see("DELETING").kind == "wait"
  assert (finish := life.see()).kind == "finish" and finish.code == states.DONE
  # Of 20 turns 17 saw the slice ACTIVE.
  assert life.memory.seconds() == (17 - 1) * 60


# What is decided at the first sight of each state, and after a day in it.
QUEUED = {
  "CREATING": ("wait", "delete"),
  "ACCEPTED": ("wait", "delete"),
  "WAITING_FOR_RESOURCES": ("wait", "delete"),
  "PROVISIONING": ("wait", "delete"),
  "ACTIVE": ("wait", "delete"),
  "SUSPENDING": ("wait", "delete"),
  "DELETING": ("wait", "finish"),
  "SUSPENDED": ("delete", "delete"),
  "FAILED": ("delete", "delete"),
  "A_STATE_OF_TOMORROW": ("wait", "delete"),
}
NODES = (
  dict.fromkeys((*world_lib.COMING, "A_STATE_OF_TOMORROW"), ("wait", "delete"))
  | dict.fromkeys(world_lib.GONE, ("delete", "delete"))
  | {"READY": ("wait", "delete")}
)


def test_the_tables_hold_every_state():
  assert set(world_lib.QUEUED_STATES) < set(QUEUED) and set(world_lib.NODE_STATES) < set(NODES)


@pytest.mark.parametrize("state", QUEUED)
def test_every_state_of_a_queued_resource(state):
  life = Life(max_seconds=None)
  life.see()
  first, later = QUEUED[state]
  assert life.see(state).kind == first
  assert life.see(state, seconds=86400).kind == later


@pytest.mark.parametrize("state", NODES)
def test_every_state_of_a_node(state):
  life = Life(max_seconds=None).train()
  first, later = NODES[state]
  node = [Node("run", state, hosts=2)]
  assert life.see("ACTIVE", nodes=node).kind == first
  assert life.see("ACTIVE", nodes=node, seconds=86400).kind == later


@pytest.mark.parametrize("health", world_lib.HEALTHS)
def test_a_node_that_is_called_ill_is_only_replaced_when_it_is_silent(health):
  life = Life(max_seconds=None).train()
  ill = [Node("run", "READY", health, hosts=2)]
  for step in range(200, 2000, 100):
    assert (
      life.see("ACTIVE", nodes=ill, reports=life.hosts(step=step), seconds=600).reason == "training"
    )
  life.see("ACTIVE", nodes=ill)
  assert life.see("ACTIVE", nodes=ill, seconds=7200).kind == "delete"


@pytest.mark.parametrize("taken", ["SUSPENDING", "SUSPENDED", "ACTIVE"])
def test_a_slice_that_is_taken_away_is_asked_for_again(taken):
  life = Life().train()
  node = [Node("run", "PREEMPTED", hosts=2)]
  while life.see(taken, nodes=node).kind != "delete":
    taken = "SUSPENDED"
  assert life.see(taken, nodes=node, seconds=1).kind == "wait"  # the delete needs a moment to show
  assert life.see("DELETING").kind == "wait"
  create = life.see()
  assert (create.kind, life.memory.attempt) == ("create", 2)
  assert life.see("ACTIVE", reports=[host(0, 0), host(0, 1)]).kind == "start"
  assert life.memory.attempt == 2 and len(life.memory.slices) == 2


def test_a_delete_that_does_not_show_is_sent_again():
  life = Life().train()
  assert life.see("SUSPENDED").kind == "delete"
  assert [life.see("SUSPENDED", seconds=20).kind for _ in range(4)] == [
    "wait",
    "delete",
    "wait",
    "delete",
  ]


def test_a_slice_that_does_not_go():
  life = Life(max_seconds=None).train()
  assert life.end(0, 0).kind == "delete"
  actions = [life.see("DELETING") for _ in range(62)]
  assert [action.kind for action in actions[:-1]] == ["wait"] * 61
  assert "see it in the console" in actions[40].reason
  assert (actions[-1].kind, actions[-1].code) == ("finish", states.ERROR)
  assert "it may still be paid for" in actions[-1].reason


def test_a_slice_that_is_never_granted():
  life = Life(max_wait=3600)
  life.see()
  for _ in range(59):
    assert life.see("WAITING_FOR_RESOURCES").kind == "wait"
  for _ in range(2):
    action = life.see("WAITING_FOR_RESOURCES")
  assert (action.kind, action.code) == ("delete", states.NO_CAPACITY)
  assert life.see().code == states.NO_CAPACITY


@pytest.mark.parametrize(
  "code, message, kind, exit_code",
  [
    (8, "There is no more capacity in the zone", "delete", None),
    (14, "try again", "delete", None),
    (0, "", "delete", None),
    (
      8,
      "Quota limit 'TPUV5sPreemptible' has been exceeded. Limit: 32",
      "delete",
      states.NO_CAPACITY,
    ),
    (3, "Invalid accelerator type", "delete", states.ERROR),
    (7, "Permission denied on resource", "delete", states.ERROR),
  ],
)
def test_a_request_that_failed(code, message, kind, exit_code):
  life = Life()
  life.see()
  action = life.see("FAILED", code=code, message=message)
  assert (action.kind, action.code) == (kind, exit_code)
  assert message in action.reason
  assert life.see("FAILED", code=code, seconds=1).kind == "wait"
  if exit_code is not None:
    assert (last := life.see()).kind == "finish" and last.code == exit_code


def test_pauses_between_requests_double_up_to_ten_times_the_first():
  life, pauses = Life(backoff=60, max_wait=1e9), []
  assert life.see().kind == "create"
  for _ in range(6):
    life.see("FAILED", code=8, message="no capacity")
    start = life.now
    while life.see(seconds=10).kind == "wait":
      pass
    pauses.append(life.now - start)
  assert pauses == [60, 120, 240, 480, 600, 600]
  life.see("ACTIVE")
  assert life.memory.refusals == 0


@pytest.mark.parametrize("codes", [(75, 75), (76, 75), (0, 76), (76, 76)])
def test_codes_that_ask_to_be_run_again(codes):
  life = Life().train()
  action = life.end(*codes)
  assert (action.kind, life.memory.attempt) == ("start", 2)
  assert not life.memory.crashes
  assert life.see("ACTIVE", reports=life.hosts(step=200)).reason == "training"


def test_starts_in_vain_take_another_slice():
  life = Life().train()
  kinds = []
  while "delete" not in kinds:
    kinds.append(life.end(76, 76).kind)
  assert kinds == ["start"] * (states.MAX_IN_VAIN + 1) + ["delete"]
  assert life.see().kind == "create"


@pytest.mark.parametrize("code", [1, -9, 134, None])
def test_crashes(code):
  life = Life(max_seconds=None).train()
  for number in range(states.MAX_CRASHES):
    step = 100 * (number + 1)
    life.see("ACTIVE", reports=life.hosts(step=step))
    reports = life.hosts("ended", (76, 1), step)
    reports[0] = dataclasses.replace(
      reports[0], code=code, ended=life.now - 5, trouble="" if code else "it is gone"
    )
    action = life.see("ACTIVE", reports=reports)
    assert (action.kind, action.blame, action.attempt) == ("start", "0-0", number + 2)
    assert f"at step {step}" in action.reason
  life.see("ACTIVE", reports=life.hosts(step=1000))
  action = life.end(1, 76, step=1000)
  assert (action.kind, action.code) == ("delete", states.CRASHED)
  assert f"after {states.MAX_CRASHES} restarts" in action.reason


@pytest.mark.parametrize("step", [None, 100])
def test_two_crashes_at_the_same_step_end_the_run(step):
  life = Life().train(step)
  assert life.end(1, 76, step=step).kind == "start"
  action = life.end(76, 1, step=step)
  assert (action.kind, action.code, action.blame) == ("delete", states.CRASHED, "0-1")
  assert "for the second time" in action.reason


def test_a_failure_that_a_rerun_does_not_fix():
  life = Life().train()
  action = life.end(76, 2)
  assert (action.kind, action.code, action.blame) == ("delete", states.CRASHED, "0-1")
  life = Life(keep=True).train()
  assert life.end(76, 2).kind == "finish"


def test_one_host_that_does_not_end_is_not_waited_for_for_ever():
  life = Life(exit_grace=300).train()
  assert life.end(75, None).kind == "wait"
  reports = life.hosts("ended", (75, None), 100)
  for _ in range(4):
    assert life.see("ACTIVE", reports=reports).kind == "wait"
  assert life.see("ACTIVE", reports=reports).kind == "start"


def test_a_stall():
  life = Life(stall=900).train(step=100)
  for _ in range(15):
    assert life.see("ACTIVE", reports=life.hosts(step=100)).kind == "wait"
  assert life.see("ACTIVE", reports=life.hosts(step=100)).kind == "stacks"
  restart = life.see("ACTIVE", reports=life.hosts(step=100))
  assert (restart.kind, restart.attempt) == ("start", 2)
  # It resumes from an earlier checkpoint, and stalls at the same step.
  kinds = [life.see("ACTIVE", reports=life.hosts(step=100)).kind for _ in range(18)]
  assert kinds == ["wait"] * 16 + ["stacks", "delete"]
  assert life.memory.ending[0] == states.CRASHED


def test_the_first_step_is_compiled_and_may_take_twice_as_long():
  life = Life(stall=900).train(step=None)
  kinds = [life.see("ACTIVE", reports=life.hosts()).kind for _ in range(30)]
  assert kinds == ["wait"] * 28 + ["stacks", "start"]


def test_steps_that_are_done_again_are_no_stall():
  life = Life(stall=900, max_seconds=None).train(step=1000)
  assert life.end(1, 76, step=1000).kind == "start"
  for step in range(100, 1100, 50):
    assert life.see("ACTIVE", reports=life.hosts(step=step), seconds=600).reason == "training"
  assert life.memory.step == 1050 and life.end(1, 76, step=1050).kind == "start"


def test_one_host_that_is_unreachable_for_a_while():
  life = Life(unreachable=600).train()
  for step in range(200, 4000, 100):  # the others make steps
    assert life.see("ACTIVE", reports=life.hosts(step=step)[:1]).reason == "training"
  assert life.see("ACTIVE", reports=life.hosts(step=4000)).reason == "training"
  assert not life.memory.missing


def test_one_host_that_is_dead():
  life = Life(unreachable=600).train()
  assert life.see("ACTIVE", reports=life.hosts("ended", (76,), 100)).kind == "wait"
  actions = [life.see("ACTIVE", reports=life.hosts("ended", (76,), 100)) for _ in range(20)]
  assert "delete" in [action.kind for action in actions]
  deleted = next(action for action in actions if action.kind == "delete")
  assert "host 0-1 did not answer for" in deleted.reason


def test_when_no_host_answers_the_bucket_is_believed():
  life = Life(unreachable=600).train()
  for _ in range(60):
    life.beat = {"now": life.now, "attempt": 1, "step": 200}
    assert life.see("ACTIVE").kind == "wait"
  life.beat = {"now": life.now, "attempt": 1}
  kinds = [life.see("ACTIVE").kind for _ in range(11)]
  assert kinds[:9] == ["wait"] * 9 and kinds[-1] == "delete"


def test_hosts_that_never_answer_end_it():
  life = Life(start_limit=1800)
  life.see()
  kinds = [life.see("ACTIVE").kind for _ in range(32)]
  assert kinds == ["wait"] * 31 + ["delete"] and life.memory.ending[0] == states.ERROR


def test_a_slice_that_nobody_could_reach_is_not_bought_again_and_again():
  life = Life()
  life.see()
  for _ in range(20):
    assert life.see("ACTIVE").kind == "wait"
  life.beat = life.last_words("idle", age=1210)
  action = life.see()
  assert (action.kind, action.code) == ("finish", states.ERROR)
  assert "no host answers ssh" in action.reason and life.memory.seconds() == 1210


def test_slices_of_which_one_is_gone():
  life = Life(slices=2)
  life.see()
  two = [Node("run-0", "READY"), Node("run-1", "READY")]
  assert life.see("ACTIVE", nodes=two, reports=[host(0, 0), host(1, 0)]).kind == "start"
  both = [host(0, 0, 1, "running"), host(1, 0, 1, "running")]
  assert life.see("ACTIVE", nodes=two, reports=both).reason == "training"
  kinds = [life.see("ACTIVE", nodes=two[:1], reports=both[:1]).kind for _ in range(4)]
  assert kinds == ["wait", "wait", "wait", "delete"]


def test_the_cost_limit_lets_the_trainer_save():
  life = Life(max_seconds=3600).train()
  kinds = []
  while "delete" not in kinds:
    kinds.append(life.see("ACTIVE", reports=life.hosts(step=100 * len(kinds) + 200)).kind)
  assert kinds == ["wait"] * 55 + ["stop", "wait", "delete"]
  assert life.see().code == states.COST
  assert life.memory.seconds() == 3600


def test_the_cost_limit_counts_all_attempts():
  life = Life(max_seconds=3600, provision_limit=1e9)
  for _ in range(10):
    life.memory.slices.append([0.0, 347.0])
  assert life.see().kind == "create"
  assert life.see("WAITING_FOR_RESOURCES").kind == "wait"
  assert life.see("ACTIVE").kind == "wait"
  assert life.see("ACTIVE").code == states.COST


def test_what_ended_when_nobody_looked():
  life = Life().train()
  life.beat = life.last_words("idle", age=7200)
  action = life.see(reports=life.hosts("ended", (0, 0), 1000), seconds=86400)
  assert (action.kind, action.code) == ("finish", states.DONE)
  # The slice lived until its guard removed it.
  assert life.memory.seconds() == 7200


@pytest.mark.parametrize(
  "codes, removing, kind, code",
  [
    ((75, 75), "idle", "create", None),
    ((1, 76), "idle", "create", None),
    ((2, 76), "idle", "finish", states.CRASHED),
    ((75, 75), "deadline", "finish", states.COST),
    ((), "deadline", "finish", states.COST),
    ((), "idle", "create", None),
    ((), None, "finish", states.ERROR),
  ],
)
def test_a_slice_that_is_suddenly_gone(codes, removing, kind, code):
  life = Life().train()
  life.beat = life.last_words(removing)
  action = life.see(reports=life.hosts("ended", codes, 100) if codes else ())
  assert (action.kind, action.code) == (kind, code)
  if kind == "create":
    assert life.memory.attempt == 2


def test_a_stop_ends_the_launcher_and_keeps_the_slice():
  life = Life().train()
  action = life.end(75, 75, stop_requested=True)
  assert (action.kind, action.code) == ("finish", states.DONE)


def test_machines_that_are_about_to_be_taken_are_waited_for():
  life = Life().train()
  assert life.end(75, 75, preempted=True).kind == "wait"
  assert life.see("SUSPENDING").kind == "wait"


def test_no_attempt_starts_while_a_host_is_silent_that_may_still_run_the_one_before():
  life = Life(unreachable=600).train()
  before = life.hosts(step=100)
  assert life.end(1, 76).kind == "start"
  assert life.see("ACTIVE", reports=before[:1]).kind == "wait"
  assert life.see("ACTIVE", reports=before).kind == "start"
  kinds = [life.see("ACTIVE", reports=before[:1]).kind for _ in range(30)]
  assert "start" not in kinds and "delete" in kinds


def test_a_launcher_without_memory_adopts_what_it_finds():
  life = Life()
  hosts = [host(0, 0, 7, "running", step=500), host(0, 1, 7, "running", step=500)]
  assert life.see("ACTIVE", reports=hosts).reason == "training"
  assert life.memory.attempt == 7
  assert life.see("SUSPENDED").kind == "delete"
  assert life.see().attempt == 8


def test_a_host_that_did_not_hear_of_the_start_is_told_again():
  life = Life().train()
  late = [*life.hosts(step=100)[:1], host(0, 1)]
  for _ in range(3):
    action = life.see("ACTIVE", reports=late)
    assert (action.kind, action.attempt) == ("start", 1)
  assert life.see("ACTIVE", reports=late, seconds=7200).kind == "delete"
