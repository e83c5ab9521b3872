"""The loop of a launcher: see, decide, record, act, until the run has ended or the user leaves."""

from __future__ import annotations

from collections.abc import Callable
import contextlib
import hashlib
import json
import pathlib
import tempfile
import time
from typing import Any

from launch.cloud import boot, bundle, commands, states
from launch.cloud.gcloud import FATAL, Gcloud, GcloudError
from launch.cloud.look import Looker
from launch.cloud.run import Run, Store, TakenOver
from launch.cloud.screen import Screen, View
from launch.cloud.settings import Settings, UsageError, describe_seconds
from launch.cloud.world import Action, World

_SOON = 15.0  # seconds until the next turn after an action
_LAST_LINES = 30
_FIXES = {
  "auth": "type gcloud auth login in another terminal",
  "permission": "launch/tpu doctor prints the command that grants it",
  "not_installed": "put gcloud back on the PATH",
}


class Driver:
  """One launcher that drives one run."""

  def __init__(
    self,
    gcloud: Gcloud,
    store: Store,
    run: Run,
    screen: Screen,
    sleep: Callable[[float], None] = time.sleep,
  ):
    self._gcloud, self._store, self.run, self._screen = gcloud, store, run, screen
    self._clock, self._sleep = store.clock, sleep
    self._looker = Looker(gcloud, run.settings, self._clock)
    self._limits_told = False

  @property
  def settings(self) -> Settings:
    return self.run.settings

  def drive(self, code: bundle.Bundle | None, until_running: bool = False) -> int:
    """Drive the run to its end and return the exit code of the launcher.

    Args:
      code: the code of the attempts that start from now on; None leaves it. It is shipped once, so
        later edits here do not get into an unattended restart.
      until_running: return as soon as all trainers run.

    Raises:
      TakenOver: if another launcher drives the run now.
      GcloudError, UsageError: if continuing is pointless.
    """
    self._store.write(self.run)
    if code:  # before anything costs money
      self._ship_code(code)
    self._looker.ship_agent()
    while True:
      try:
        world = self._looker.world(self.run.memory)
      except GcloudError as error:
        self._endure("the cloud does not answer", error)
        self._sleep(self.settings.poll)
        continue
      states.remember(world, self.run.memory, self.settings)
      action = states.decide(world, self.run.memory, self.settings)
      self._show(world, action)
      try:
        done = self._act(action, world)
      except GcloudError as error:
        # The next turn decides again, from what is there then.
        self._endure(f"{action.kind} failed", error)
        done = None
      if done is not None:
        return done
      running = [report for report in world.reports if report.phase == "running"]
      if until_running and action.kind == "wait" and 0 < self.run.memory.hosts == len(running):
        return states.DONE
      steady = action.kind == "wait" and not any(
        report.phase == "installing" for report in world.reports
      )
      self._sleep(self.settings.poll if steady else min(_SOON, self.settings.poll))

  def _endure(self, what: str, error: GcloudError) -> None:
    """Say what is wrong and continue; raise it if it cannot pass and nothing is paid for.

    While a slice exists or a request waits, nothing ends a launcher but its user: a login expires,
    a right is withdrawn for a minute, a laptop loses its network.
    """
    memory = self.run.memory
    at_stake = memory.active or memory.requested or memory.deleting
    if error.kind in FATAL and not at_stake:
      raise error
    fix = f"; {_FIXES[error.kind]}" if error.kind in _FIXES else ""
    cost = f" Meanwhile the slice costs {View.chips_text(self.settings)}." if memory.active else ""
    self._say(f"{what}: {error}{fix}.{cost}")

  def _act(self, action: Action, world: World) -> int | None:
    """Do one thing: the intent is recorded before, the effect is seen in the next turn."""
    memory, settings = self.run.memory, self.settings
    if action.kind == "wait":
      if world.queued and world.queued.state == "ACTIVE" and memory.started and not memory.missing:
        self._tell_limits()
      self._write()
      return None
    if action.blame:
      self._show_last_lines(action.reason, action.blame)
    states.acted(action, memory, settings, self._clock())
    self.run.event(f"{action.kind}: {action.reason}", self._clock())
    if action.kind == "finish":
      self.run.result = {
        "code": action.code,
        "reason": action.reason,
        "time": round(self._clock(), 1),
        "complete": action.reason.startswith(states.COMPLETE),
      }
      self.run.driver = None
      try:
        self._store.write(self.run, driving=False)
      except GcloudError as error:
        self._screen.lines([f"the result was not written to run.json: {error}"])
      return action.code
    self._write()
    if action.kind == "create":
      return self._create()
    if action.kind == "delete":
      self._delete()
    elif action.kind == "start":
      if self._end_earlier(world):
        self._ask("start", str(memory.attempt), self._ship_attempt())
        self._limits_told = True
    else:
      self._ask(action.kind)
      if action.kind == "stacks":
        self._say(f"the stacks are in {settings.place.url}/logs/attempt-{memory.attempt}/")
    return None

  def _create(self) -> int | None:
    memory, settings = self.run.memory, self.settings
    waited = self._clock() - (memory.waiting_since or self._clock())
    try:
      with tempfile.TemporaryDirectory() as folder:
        script = boot.write(settings, memory, pathlib.Path(folder))
        wait = settings.max_wait - waited
        limit = boot.limits(settings, memory)["max_seconds"]
        line = commands.create(settings, memory.attempt, wait, str(script), limit)
        self._gcloud.run(line, tries=1)
      return None
    except GcloudError as error:
      if error.kind == "exists":  # from our own first try or another launcher: seen next turn
        return None
      self._say(f"the request failed: {error}")
      memory.requested = None
      if error.kind == "quota":
        return self._give_up(
          states.NO_CAPACITY, f"{error}; request more quota, or use another zone or type"
        )
      if error.kind in (*FATAL, "not_found"):
        return self._give_up(states.ERROR, str(error))
      states.refused(memory, settings, self._clock())
      return None

  def _give_up(self, code: int, reason: str) -> int | None:
    return self._act(Action("finish", reason, code), World(self._clock(), None))

  def _delete(self) -> None:
    try:
      self._gcloud.run(commands.delete(self.settings.place), tries=1)
    except GcloudError as error:
      if error.kind != "not_found":
        raise

  def _ask(self, *words: str) -> None:
    reports, trouble = self._looker.ask(*words)
    if trouble or len(reports) < self.run.memory.hosts:
      self._say(f"{words[0]}: {len(reports)} of {self.run.memory.hosts} hosts answered. {trouble}")

  def _end_earlier(self, world: World) -> bool:
    """End earlier attempts on all hosts, since a new trainer would meet an old one elsewhere.

    Returns:
      Whether all of them have ended.
    """
    attempt = self.run.memory.attempt
    if all(
      report.phase in ("none", "ended") or report.attempt == attempt for report in world.reports
    ):
      return True
    reports, trouble = self._looker.ask("end", str(attempt))
    left = [
      report.name
      for report in reports
      if report.phase not in ("none", "ended") and report.attempt != attempt
    ]
    if len(reports) == self.run.memory.hosts and not left:
      return True
    self._say(
      f"attempt {attempt} waits for host {', '.join(left) or '(one that does not answer)'} to end. "
      f"{trouble}"
    )
    return False

  def _ship_attempt(self) -> str:
    """Put the spec of an attempt into the bucket, and secrets onto the hosts only.

    Returns:
      The SHA-256 of the spec.
    """
    place, memory = self.settings.place, self.run.memory
    with tempfile.TemporaryDirectory() as folder:
      path = pathlib.Path(folder, f"attempt-{memory.attempt}.json")
      path.write_text(json.dumps(attempt_spec(self.run)))
      sha = hashlib.sha256(path.read_bytes()).hexdigest()
      self._gcloud.run(commands.upload(place, str(path), f"{place.url}/launch/{path.name}"))
    if self.settings.env_file:
      self._gcloud.run(commands.copy_environment(self.settings))
    return sha

  def _ship_code(self, code: bundle.Bundle) -> None:
    """Put the code into the bucket and record it as that of the run."""
    place = self.settings.place
    with tempfile.TemporaryDirectory() as folder:
      archive, diff = bundle.pack(code, pathlib.Path(folder))
      sha = hashlib.sha256(archive.read_bytes()).hexdigest()
      for path in (archive, diff):
        self._gcloud.run(commands.upload(place, str(path), f"{place.url}/launch/{path.name}"))
    self.run.code, self.run.commit, self.run.dirty = code.tree, code.commit, code.dirty
    self.run.archive = sha
    self._write()

  def _tell_limits(self) -> None:
    """Send the limits of this launcher to hosts whose trainer was started by an earlier one."""
    if not self._limits_told:
      self._limits_told = True
      self._ask("start", str(self.run.memory.attempt), self._ship_attempt())

  def _show_last_lines(self, reason: str, host: str) -> None:
    lines = self._looker.last_lines(host, self.run.memory.attempt, _LAST_LINES)
    self._screen.lines(
      [f"{reason}; the last lines of host {host}:", *(f"  {line}" for line in lines)]
    )

  def _show(self, world: World, action: Action) -> None:
    self._screen.show(View.of(self.run, world, action))

  def _say(self, what: str) -> None:
    self.run.event(what, self._clock())
    self._screen.lines([what])

  def _write(self) -> None:
    try:
      self._store.write(self.run)
    except GcloudError as error:
      self._screen.lines([f"run.json was not written: {error}"])


def attempt_spec(run: Run) -> dict[str, Any]:
  """Returns what hosts need for the next attempt; read by launch/host/."""
  settings, memory = run.settings, run.memory
  return {
    "attempt": memory.attempt,
    "project": settings.place.project,
    "argv": settings.argv,
    "code": run.code,
    "archive": run.archive,
    "secrets": dict(settings.secrets),
    "python": settings.python,
    "limits": boot.limits(settings, memory),
    "request": boot.request(settings, memory),
  }


def begin(run: Run, settings: Settings, now: float) -> None:
  """Prepare a run, which may have ended or lost its launcher, to be driven with these settings."""
  memory = run.memory
  if run.result is not None:
    memory.attempt = states.next_attempt(memory)
    memory.started = None
    memory.crashes, memory.in_vain, memory.in_vain_step = [], 0, None
  run.settings, run.result, run.wanted = settings, None, "run"
  memory.ending = memory.stopped_at = memory.stacks_at = memory.deleting = None
  # What exists is seen in the first turn; time without a launcher does not count as waiting.
  memory.requested = memory.waiting_since = None
  memory.not_before, memory.refusals, memory.missing = 0.0, 0, {}
  memory.state_since = memory.step_at = now
  run.event("a launcher starts", now)


def follow(store: Store, run: Run, screen: Screen, sleep: Callable[[float], None]) -> int | None:
  """Show what another launcher records; return the result, or None if that launcher is gone."""
  shown = -1
  while True:
    other = store.other_driver(run)
    for number, event in enumerate(run.events):
      if number > shown:
        screen.lines([event["what"]], event["time"])
    shown = len(run.events) - 1
    if run.result:
      return run.result["code"]
    if not other:
      return None
    sleep(run.settings.poll)
    read = store.read()
    if read is None:
      raise UsageError(f"{store.url} is gone.")
    run.__dict__.update(read.__dict__)


def leave(run: Run, store: Store) -> list[str]:
  """Stop driving a run that continues; return the lines to show."""
  run.driver = None
  # If it fails, another launcher takes over a little later, when our sign of life is stale.
  with contextlib.suppress(GcloudError, TakenOver):
    store.write(run, driving=False)
  settings, memory, name = run.settings, run.memory, run.settings.run
  if memory.active:
    lines = [f"Left. The slice stays and is paid for ({View.chips_text(settings)})."]
  elif memory.requested:
    lines = [
      "Left. The request stays in the queue, which costs nothing.",
      "If it is granted, its hosts count from then, with this machine off too.",
    ]
  else:
    lines = ["Left. There is no slice and no request, so nothing is paid for."]
  if memory.active or memory.requested:
    lines += [f"It removes itself {_ends(run)}.", *([] if memory.guarded else [_UNPROVEN])]
  return [
    *lines,
    "If the slice is lost, nothing asks for another one until a launcher runs again:",
    f"  launch/tpu watch {name}    watch over it again",
    f"  launch/tpu stop {name}     save, and end the trainer",
    f"  launch/tpu down {name}     remove everything that is paid for",
  ]


_UNPROVEN = (
  "Its hosts have not proven yet that their service account may remove it; launch/tpu doctor "
  "checks that, and launch/tpu down removes it in any case."
)


def _ends(run: Run) -> str:
  """Returns when a slice removes itself."""
  settings = run.settings
  ends = []
  if not settings.keep:
    ends.append(f"after {describe_seconds(settings.idle)} without a trainer and a launcher")
  if settings.max_seconds is not None:
    left = max(0.0, settings.max_seconds - run.memory.seconds())
    ends.append(f"after {describe_seconds(left)} of existing, the limit of --max-hours")
  return ", or ".join(ends)
