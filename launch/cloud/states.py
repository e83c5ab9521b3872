"""The next action of a run, a pure function of what is seen, remembered and allowed.

Each turn of the loop calls `remember` with what is seen now, `decide` for the next action, and
`acted` when the action was done. Everything remembered is in `Memory`, which lives in run.json, so
the loop may be killed between any two of these calls and continue on another machine.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from launch.cloud.settings import Settings, describe_seconds
from launch.cloud.world import (
  GONE,
  LEAVING,
  QUEUED,
  UNHEALTHY,
  Action,
  Crash,
  Memory,
  Queued,
  World,
)

# Exit codes of the launcher; 2 is a wrong argument.
DONE, ERROR, NO_CAPACITY, CRASHED, COST = 0, 1, 3, 4, 5
# Exit codes of the trainer; 0 is done, any other is a crash.
FAILED, PREEMPTED, HOST_LOST = 2, 75, 76
COMPLETE = "the run is complete"
_NO_SSH = "no host answers ssh; is port 22 open, or is --iap needed?"
ABLE = "able"  # of launch/host/guard.py
MAX_CRASHES = 3
MAX_IN_VAIN = 3  # starts in a row without a new step, before the slice is replaced
_LONGEST_TURN = 900.0  # seconds of a turn that count, whatever a clock shows
_DELETE_AGAIN = 30.0  # seconds for a delete to show before it is sent again


def remember(world: World, memory: Memory, settings: Settings) -> None:
  """Update the memory with what is seen."""
  now, state = world.now, world.queued.state if world.queued else "ABSENT"
  if state == memory.state == "DELETING" and memory.slices:  # it is paid for until it is gone
    memory.slices[-1][1] += min(max(0.0, now - memory.seen), _LONGEST_TURN)
  memory.seen = now
  if state != memory.state:
    memory.state, memory.state_since = state, now
  if world.queued and not memory.deleting:
    memory.requested = memory.requested or now
  if state != "ACTIVE":
    memory.waiting_since = memory.waiting_since or now
    if world.heartbeat:
      _bill_unseen(world.heartbeat, memory, now)
    memory.active = memory.guarded = False
    memory.unguarded_since = None
    memory.missing, memory.unready_since, memory.ended_since = {}, None, None
    if state == "ABSENT":
      memory.deleting = None
    return

  if not memory.active:
    memory.active = True
    if not memory.slices or memory.slices[-1][2:] != [memory.request]:
      memory.slices.append([now, now, memory.request])
  ages = [report.age for report in world.reports if report.age is not None]
  ages += [now - node.created for node in world.nodes if node.created is not None and not ages]
  if ages:
    memory.slices[-1][:2] = [now - max(ages), now]
  memory.slices[-1][1] = max(memory.slices[-1][1], now)
  memory.guarded = bool(world.reports) and all(report.guard == ABLE for report in world.reports)
  if world.reports:
    memory.unguarded_since = None if memory.guarded else memory.unguarded_since or now
  memory.waiting_since, memory.refusals = None, 0
  ready = len(world.nodes) >= settings.slices and all(
    node.state == "READY" and node.health not in UNHEALTHY for node in world.nodes
  )
  memory.unready_since = None if ready else memory.unready_since or now
  names = [
    f"{number}-{worker}" for number, node in enumerate(world.nodes) for worker in range(node.hosts)
  ]
  if not names:
    return
  memory.hosts = len(names)
  answers = {report.name for report in world.reports}
  memory.answered = memory.answered or bool(answers)
  memory.missing = {name: memory.missing.get(name, now) for name in names if name not in answers}
  newest = max((report.attempt or 0 for report in world.reports), default=0)
  if newest > memory.attempt:  # a launcher whose memory was lost had started it
    memory.attempt, memory.started = newest, None
  current = [report for report in world.reports if report.attempt == memory.attempt]
  if current and memory.started is None:
    memory.started = memory.step_at = now
  steps = [report.step for report in current if report.step is not None]
  if steps and max(steps) != memory.step_now:
    memory.step_now, memory.step_at = max(steps), now
    memory.step = max(memory.step or 0, max(steps))
  ended = any(report.phase == "ended" for report in current)
  memory.ended_since = (memory.ended_since or now) if ended else None


def _bill_unseen(beat: dict[str, Any], memory: Memory, now: float) -> None:
  """Count the time for which a slice existed unseen, by what its guard left in the bucket."""
  age, name = beat.get("age"), beat.get("request")
  if age is None or name is None:
    return
  entry = next((entry for entry in memory.slices if entry[2:] == [name]), None)
  if entry is None and name == memory.request:
    memory.slices.append([now - age, now, name])
  elif entry is not None and entry[1] - entry[0] < age:
    entry[1] = entry[0] + age


def decide(world: World, memory: Memory, settings: Settings) -> Action:
  """Return the next action."""
  queued, now = world.queued, world.now
  if memory.ending:
    code, reason = memory.ending
    if queued is None:
      return Action("finish", reason, code)
  elif queued is None:
    return _absent(world, memory, settings)
  age = describe_seconds(now - memory.state_since)
  if queued.state in LEAVING:
    return _leaving(queued, world, memory, settings)
  if memory.deleting and now - memory.deleting < _DELETE_AGAIN:
    return Action("wait", "the slice is being removed")
  if memory.ending:
    return Action("delete", memory.ending[1])
  if queued.state == "SUSPENDED":
    return Action("delete", "the slice was taken away")
  if queued.state == "FAILED":
    return _failed(queued)
  if _spent(memory, settings) or any(report.removing == "deadline" for report in world.reports):
    return _end_of_money(world, memory, settings)
  if queued.state in QUEUED:
    waited = now - (memory.waiting_since or now)
    if waited > settings.max_wait:
      return Action(
        "delete", f"no slice within --max-wait, after {describe_seconds(waited)}", NO_CAPACITY
      )
    return Action("wait", f"in the queue ({queued.state}) for {describe_seconds(waited)}")
  if queued.state == "ACTIVE":
    return _active(world, memory, settings)
  # PROVISIONING, and any state of a later version of the service.
  if now - memory.state_since > settings.provision_limit:
    return Action("delete", f"the slice is {queued.state} for {age}", capacity=True)
  return Action("wait", f"the slice is {queued.state} for {age}")


def _leaving(queued: Queued, world: World, memory: Memory, settings: Settings) -> Action:
  """Wait for a slice to go, but not for ever: the service may have lost it."""
  lasted = world.now - memory.state_since
  what = f"the slice is {queued.state} for {describe_seconds(lasted)}"
  if lasted <= settings.provision_limit:
    return Action("wait", what)
  if queued.state == "SUSPENDING" and not (
    memory.deleting and world.now - memory.deleting < settings.provision_limit
  ):
    code, reason = memory.ending or (None, what)
    return Action("delete", reason, code)
  if lasted <= 2 * settings.provision_limit:
    return Action("wait", f"{what}, which is unusual; see it in the console")
  advice = "it may still be paid for: see the console, and ask Google's support to remove it"
  code, reason = memory.ending or (ERROR, "no new slice can be requested under this name")
  return Action("finish", f"{reason}; {what}, {advice}", code or ERROR)


def acted(action: Action, memory: Memory, settings: Settings, now: float) -> None:
  """Update the memory with an action that was done."""
  if action.kind == "start" and action.attempt != memory.attempt and not action.crash:
    memory.in_vain = memory.in_vain + 1 if memory.step == memory.in_vain_step else 0
    memory.in_vain_step = memory.step
  if action.attempt is not None and action.attempt != memory.attempt:
    memory.attempt, memory.started = action.attempt, None
    memory.stacks_at = memory.ended_since = memory.step_now = None
  if action.crash:
    memory.crashes.append(action.crash)
  if action.kind == "create":
    memory.answered = False
    memory.requested, memory.request = now, f"{memory.attempt}-{now:.0f}"
  elif action.kind == "delete":
    memory.requested, memory.deleting, memory.in_vain = None, now, 0
    if action.code is not None:
      memory.ending = [action.code, action.reason]
    if action.capacity:
      refused(memory, settings, now)
  elif action.kind == "start":
    memory.step_at = now
    memory.started = memory.started or now
  elif action.kind == "stacks":
    memory.stacks_at = now
  elif action.kind == "stop":
    memory.stopped_at = now


def refused(memory: Memory, settings: Settings, now: float) -> None:
  """Note a lack of capacity: the pause before the next request doubles, up to tenfold."""
  memory.refusals += 1
  memory.not_before = now + settings.backoff * min(10, 2 ** (memory.refusals - 1))


def next_attempt(memory: Memory) -> int:
  """Return the number of the next attempt that was not started yet."""
  return memory.attempt if memory.started is None else memory.attempt + 1


def _spent(memory: Memory, settings: Settings) -> bool:
  """Whether it is time to save and end, so that nothing is paid for after the limit."""
  if settings.max_seconds is None:
    return False
  return memory.seconds() >= settings.max_seconds - settings.save_seconds


def _cost_reason(memory: Memory) -> str:
  existed = describe_seconds(memory.seconds())
  return f"the slices of this run have existed for {existed}, the limit of --max-hours"


def _end_of_money(world: World, memory: Memory, settings: Settings) -> Action:
  running = any(report.phase != "ended" and report.attempt for report in world.reports)
  if len(world.reports) >= memory.hosts and {report.code for report in world.reports} == {DONE}:
    return _judge(world, memory, settings)
  if running and memory.stopped_at is None:
    return Action("stop", _cost_reason(memory))
  if (
    running
    and memory.stopped_at is not None
    and world.now - memory.stopped_at < min(settings.save_seconds, settings.exit_grace)
  ):
    return Action("wait", "the trainer is saving: " + _cost_reason(memory))
  return Action("delete", _cost_reason(memory), COST)


def _absent(world: World, memory: Memory, settings: Settings) -> Action:
  now, beat = world.now, world.heartbeat or {}
  removing = beat.get("removing") if beat.get("request") == memory.request else None
  # The trainers may have ended while no launcher was running.
  if memory.started and memory.hosts and len(world.reports) >= memory.hosts:
    verdict = _judge(world, memory, settings)
    # A crash may be the effect of a preemption.
    if (
      verdict.code in (DONE, CRASHED)
      and (not verdict.crash or removing == "idle")
      and not _stopped(world)
    ):
      return dataclasses.replace(verdict, kind="finish")
    if verdict.crash and removing == "idle":
      return dataclasses.replace(verdict, kind="create")
  if _spent(memory, settings):
    return Action("finish", _cost_reason(memory), COST)
  if memory.requested:
    if now - memory.requested < 120 and not memory.started:  # it may not be listed yet
      return Action("wait", "the request was sent")
    if removing == "deadline":
      return Action("finish", _cost_reason(memory), COST)
    if removing and not memory.answered:  # another one would be bought in vain
      return Action("finish", f"{_NO_SSH}; the slice has removed itself", ERROR)
    if not removing:
      return Action(
        "finish",
        "the slice is gone, and neither this launcher nor its own guard removed it; "
        "the same command takes a new one",
        ERROR,
      )
  waited = now - (memory.waiting_since or now)
  if waited > settings.max_wait:
    return Action(
      "finish", f"no slice within --max-wait, after {describe_seconds(waited)}", NO_CAPACITY
    )
  if now < memory.not_before:
    return Action(
      "wait", f"no capacity; asking again in {describe_seconds(memory.not_before - now)}"
    )
  return Action("create", "there is no slice", attempt=next_attempt(memory))


def _failed(queued: Queued) -> Action:
  """Distinguish, by google.rpc.Code, a request that may succeed later from one that cannot."""
  message = queued.message or "the request failed"
  if "quota" in message.lower():
    return Action(
      "delete",
      f"{message.rstrip('.')}. Request more quota, or use another zone or type",
      NO_CAPACITY,
    )
  if queued.code in (3, 5, 7, 9, 11, 12, 16):
    return Action("delete", f"the request was refused: {message}", ERROR)
  return Action("delete", f"no capacity: {message}", capacity=True)


def _active(world: World, memory: Memory, settings: Settings) -> Action:
  now = world.now
  gone = [node for node in world.nodes if node.state in GONE]
  if gone:
    return Action("delete", f"{gone[0].name} is {gone[0].state}")
  unready = now - memory.unready_since if memory.unready_since else 0
  if len(world.nodes) < settings.slices:
    if unready > 120:
      return Action(
        "delete", f"{settings.slices - len(world.nodes)} of {settings.slices} slices are gone"
      )
    return Action("wait", world.trouble or "the slices are not listed yet")
  for node in world.nodes:
    if node.state != "READY" or (node.health in UNHEALTHY and not world.reports):
      what = f"{node.name} is {node.state} {node.health} for {describe_seconds(unready)}"
      return Action("delete", what) if unready > settings.start_limit else Action("wait", what)
  if memory.missing:
    action = _missing(world, memory, settings)
    if action:
      return action

  behind = [report for report in world.reports if (report.attempt or 0) < memory.attempt]
  # A silent host may still run an earlier attempt, which would disturb a new one.
  if behind and memory.missing:
    return Action(
      "wait", f"attempt {memory.attempt} waits for host {', '.join(memory.missing)} to answer"
    )
  if behind or memory.started is None:
    waited = now - (memory.started or now)
    trouble = next((f": {report.trouble}" for report in behind if report.trouble), "")
    if waited > settings.start_limit:
      return Action(
        "delete", f"host {behind[0].name} did not start within {describe_seconds(waited)}{trouble}"
      )
    return _unguarded(world, memory, settings) or Action(
      "start",
      f"starting attempt {memory.attempt} on {memory.hosts} host"
      f"{'s' * (memory.hosts != 1)}{trouble}",
      attempt=memory.attempt,
    )
  return _started(world, memory, settings)


def _unguarded(world: World, memory: Memory, settings: Settings) -> Action | None:
  """Returns what to do about a slice that may not be able to remove itself, or None if it is."""
  report = next((report for report in world.reports if report.guard != ABLE), None)
  if report is None:
    return None
  what = f"host {report.name} cannot remove its slice: {report.guard or 'its guard does not run'}"
  if "may not delete" in report.guard:
    fix = "launch/tpu doctor prints the command that grants it"
    return Action("delete", f"{what}; {fix}", ERROR)
  if world.now - (memory.unguarded_since or world.now) > settings.start_limit:
    return Action("delete", what, ERROR)
  return Action(
    "wait", f"waiting for the guard: {what}" if report.guard else "waiting for the guard"
  )


def _missing(world: World, memory: Memory, settings: Settings) -> Action | None:
  """Return what to do about silent hosts, or None to continue with those that answer."""
  now, names = world.now, ", ".join(memory.missing)
  silence = now - min(memory.missing.values())
  what = f"host {names} did not answer for {describe_seconds(silence)}"
  why = f" ({world.trouble})" if world.trouble else ""
  if memory.started is None:
    if silence <= settings.start_limit:
      return Action(
        "wait", f"{memory.hosts - len(memory.missing)} of {memory.hosts} hosts answer{why}"
      )
    if not memory.answered:
      return Action(
        "delete", f"no host answers ssh{why}; is port 22 open, or is --iap needed?", ERROR
      )
    return Action("delete", what)
  if silence <= settings.unreachable:
    return Action("wait", what + why) if not world.reports else None
  if world.heartbeat and now - world.heartbeat["now"] < settings.unreachable:
    return Action("wait", f"{what}{why}, but the slice still writes to the bucket")
  if world.reports and now - memory.step_at < settings.unreachable and not memory.ended_since:
    return None  # the steps of the others include its share
  return Action("delete", what)


def _started(world: World, memory: Memory, settings: Settings) -> Action:
  """Decide when every host has begun this attempt, though some may be silent now."""
  now, started = world.now, memory.started or world.now
  ended = [report for report in world.reports if report.phase == "ended"]
  if ended:
    waited = now - (memory.ended_since or now)
    left = memory.hosts - len(ended)
    if memory.missing:  # a start would be useless
      return Action(
        "wait",
        f"{len(ended)} of {memory.hosts} hosts have ended, and host "
        f"{', '.join(memory.missing)} does not answer",
      )
    if left and waited < settings.exit_grace:
      return Action(
        "wait",
        f"{len(ended)} of {memory.hosts} hosts have ended; waiting for the others to save",
      )
    if any(report.preempted for report in ended) and waited < settings.exit_grace:
      return Action("wait", "the machines are about to be taken away")
    return _judge(world, memory, settings)
  installing = [report.name for report in world.reports if report.phase == "installing"]
  if installing:
    if now - started > settings.start_limit:
      return _crashed(
        memory, settings, installing[0], 1, f"host {installing[0]} is still installing"
      )
    return Action("wait", f"{len(installing)} of {memory.hosts} hosts are installing")
  # Before its first step, a process compiles.
  limit = settings.stall if memory.step_at > started else 2 * settings.stall
  silence = now - memory.step_at
  if silence > limit and world.reports:
    what = f"no new step for {describe_seconds(silence)}"
    if memory.stacks_at is None:
      return Action("stacks", f"{what}; requesting the stacks of every host")
    return _crashed(memory, settings, world.reports[0].name, 0, what)
  return Action("wait", "training")


def _stopped(world: World) -> bool:
  return any(report.stop_requested for report in world.reports)


def _judge(world: World, memory: Memory, settings: Settings) -> Action:
  """Decide by the exit codes of the hosts that have ended."""
  ended = sorted(
    (report for report in world.reports if report.phase == "ended"),
    key=lambda report: report.ended or 0,
  )
  codes = {report.code for report in ended}
  if codes == {0}:
    return _end(settings, DONE, COMPLETE)
  failed = [report for report in ended if report.code == FAILED]
  if failed:
    return _end(
      settings,
      CRASHED,
      f"host {failed[0].name} failed for a reason that a rerun does not fix",
      failed[0].name,
    )
  crashed = [report for report in ended if report.code not in (DONE, PREEMPTED, HOST_LOST)]
  if _stopped(world):
    return Action("finish", f"stopped at step {memory.step}; the slice is kept", DONE)
  if crashed:
    first = crashed[0]
    what = f"host {first.name} was the first to crash, with code {first.code}"
    return _crashed(
      memory,
      settings,
      first.name,
      first.code,
      f"{what}: {first.trouble}" if first.trouble else what,
    )
  if memory.in_vain >= MAX_IN_VAIN:
    return Action(
      "delete", f"{memory.in_vain} starts in a row reached no new step; taking another slice"
    )
  highest = max(code for code in codes if code is not None)
  return Action(
    "start",
    f"the trainer ended with code {highest} and resumes from its last checkpoint",
    attempt=memory.attempt + 1,
  )


def _crashed(memory: Memory, settings: Settings, host: str, code: int | None, what: str) -> Action:
  step = memory.step_now
  crash = Crash(attempt=memory.attempt, step=step, code=code, host=host)
  where = f"at step {step}" if step is not None else "before the first step"
  if any(earlier["step"] == step for earlier in memory.crashes):
    return dataclasses.replace(
      _end(settings, CRASHED, f"{what}, for the second time {where}", host), crash=crash
    )
  if len(memory.crashes) >= MAX_CRASHES:
    return dataclasses.replace(
      _end(settings, CRASHED, f"{what}, {where}, after {MAX_CRASHES} restarts", host), crash=crash
    )
  return Action("start", f"{what}, {where}", attempt=memory.attempt + 1, crash=crash, blame=host)


def _end(settings: Settings, code: int, reason: str, blame: str | None = None) -> Action:
  return Action("finish" if settings.keep else "delete", reason, code, blame=blame)
