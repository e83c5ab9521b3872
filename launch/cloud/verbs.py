"""What each verb does; `up` and `watch` are the work of the driver."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from typing import Any

from launch.cloud import bundle, checks, commands, doctor, preflight, states
from launch.cloud.driver import Driver, begin, follow, leave
from launch.cloud.gcloud import Gcloud, GcloudError
from launch.cloud.look import Looker, nodes_of_run, queued_of
from launch.cloud.run import Run, Store, TakenOver, note, state_folder
from launch.cloud.screen import Screen, View
from launch.cloud.settings import LAUNCHER, Place, Settings, UsageError, describe_seconds
from launch.cloud.world import LEAVING

_GONE_SECONDS = 900.0  # for a deletion to complete
_STOP_SECONDS = 600.0  # for a trainer to save and end


@dataclasses.dataclass(frozen=True)
class LogRequest:
  """Which lines of which hosts: `worker` a number or "all", `attempt` None for the newest."""

  worker: str
  slice: int
  attempt: int | None
  lines: int
  follow: bool


def _gcloud(limit: float = 120.0) -> Gcloud:
  return Gcloud(limit, lambda line: print(line, file=sys.stderr))


def _screen(place: Place, as_json: bool) -> Screen:
  return Screen(state_folder() / f"{place.run}.log", as_json)


def _read(place: Place, gcloud: Gcloud) -> Run:
  run = Store(gcloud, place).read()
  if run is None:
    raise UsageError(f"There is no run {place.run} in {place.bucket}; launch/tpu up starts one.")
  return run


def _same_owner(run: Run, owner: str) -> None:
  if run.settings.owner != owner:
    raise UsageError(
      f"The run {run.settings.run} in {run.settings.place.bucket} belongs to "
      f"{run.settings.owner}; use another name, or pass --owner={run.settings.owner}."
    )


@dataclasses.dataclass(frozen=True)
class Up:
  """How `up` goes about it."""

  as_json: bool = False
  take_over: bool = False
  no_watch: bool = False
  no_check: bool = False
  preflight: bool = False


def up(settings: Settings, how: Up) -> int:
  """Start a run, or continue it."""
  gcloud = _gcloud(settings.call_limit)
  store, tree, screen = (
    Store(gcloud, settings.place),
    bundle.look(),
    _screen(settings.place, how.as_json),
  )
  screen.lines([f"Reading {store.url} ..."])
  checks.shipped(tree, settings.argv)
  run = store.read()
  if run:
    _same_owner(run, settings.owner)
    _same_slice(gcloud, run.settings, settings)
    result = run.result
    if result and result.get("complete") and run.settings.argv == settings.argv:
      screen.lines(
        [
          (
            f"{settings.run} has been complete since {time.ctime(result['time'])}; its results are "
            f"in {settings.place.url}."
          )
        ]
      )
      return states.DONE
    if run.code != tree.tree and run.memory.active:
      print(
        f"The code here ({tree.tree}) differs from that of the run ({run.code}); the next attempt "
        f"uses it. To use it now: launch/tpu stop {settings.run}, then this command again.",
        file=sys.stderr,
      )
  known = run and (run.code, run.settings.argv) == (tree.tree, settings.argv)
  if not known and not how.no_check:
    screen.lines(filter(None, [checks.trainer_accepts(settings.argv)]))
  if how.preflight and not preflight.run(settings):
    return preflight.DOES_NOT_FIT
  if run is None or run.settings.service_account != settings.service_account:
    unknown = doctor.check_removal(settings.place, settings.service_account, gcloud)
    screen.lines(filter(None, [unknown]))
  note(settings)
  run = run or Run(settings)
  return _drive(gcloud, store, run, settings, screen, how.take_over, tree, how.no_watch)


def _same_slice(gcloud: Gcloud, before: Settings, now: Settings) -> None:
  """Refuse to lose track of a slice of another kind or place, which would be paid for for ever."""

  def slices(settings: Settings) -> str:
    place = settings.place
    return (
      f"{settings.slices} x {settings.type} {settings.capacity} in {place.zone} of {place.project}"
    )

  if slices(before) == slices(now):
    return
  try:
    gcloud.json(commands.describe(before.place))
  except GcloudError as error:
    if error.kind != "not_found":
      raise
    return
  raise UsageError(
    f"{now.run} still has {slices(before)}; first: launch/tpu down {now.run} "
    f"--project={before.place.project} --zone={before.place.zone}"
  )


def watch(place: Place, owner: str, as_json: bool, take_over: bool) -> int:
  """Resume watching over a run with the settings of its `up`."""
  gcloud, screen = _gcloud(), _screen(place, as_json)
  store = Store(gcloud, place)
  run = store.read()
  if run is None:
    raise UsageError(f"There is no run {place.run} in {place.bucket}; launch/tpu up starts one.")
  _same_owner(run, owner)
  if run.result:
    screen.lines(
      [f"{place.run} has ended: {run.result['reason']}. launch/tpu up starts another attempt."]
    )
    return run.result["code"]
  gcloud.limit = run.settings.call_limit
  return _drive(gcloud, store, run, run.settings, screen, take_over)


def _drive(
  gcloud: Gcloud,
  store: Store,
  run: Run,
  settings: Settings,
  screen: Screen,
  take_over: bool,
  code: bundle.Bundle | None = None,
  no_watch: bool = False,
) -> int:
  while True:
    other = None if take_over else store.other_driver(run)
    try:
      if other:
        screen.lines(
          [f"{other} drives {settings.run}; this one only shows it (--take-over: drive it here)."]
        )
        result = follow(store, run, screen, time.sleep)
        if result is not None:
          return result
        screen.lines(["That launcher is gone; this one takes over."])
      begin(run, settings, store.clock())
      result = Driver(gcloud, store, run, screen).drive(code, no_watch)
      if run.result:
        screen.lines([f"{settings.run}: {run.result['reason']}.", *_what_next(run, run.result)])
      else:
        screen.lines(leave(run, store))
      return result
    except TakenOver as error:
      again = store.read()
      if again is None or again.wanted == "down":
        screen.lines([f"{settings.run} was taken down by another command."])
        return states.ERROR
      screen.lines([f"{error} has written to the run."])
      run, take_over = again, False
    except KeyboardInterrupt:
      screen.lines(
        leave(run, store) if not other else ["Left; the other launcher still drives the run."]
      )
      return 130
    except (GcloudError, UsageError):
      screen.lines(leave(run, store))
      raise


def _what_next(run: Run, result: dict[str, Any]) -> list[str]:
  place, code = run.settings.place, result["code"]
  lines = (
    [f"  logs of all hosts: {place.url}/logs/attempt-{run.memory.attempt}/"]
    if run.memory.started
    else []
  )
  if run.memory.active:
    lines.append(f"  the slice is still there: launch/tpu down {place.run}")
  if code == states.CRASHED:
    lines.append("  once fixed, the same command resumes from the last checkpoint")
  return lines


def status(place: Place, owner: str, as_json: bool) -> int:
  """Show the run as it is now, and change nothing."""
  del owner  # anybody may see it
  gcloud = _gcloud()
  run = _read(place, gcloud)
  memory = run.memory
  world = Looker(gcloud, run.settings).world(memory)
  states.remember(world, memory, run.settings)
  view = View.of(run, world, None)
  if as_json:
    print(
      json.dumps(
        view.to_json()
        | {
          "reports": [dataclasses.asdict(report) for report in world.reports],
          "driver": run.driver,
          "wanted": run.wanted,
        }
      )
    )
    return states.DONE
  print("\n".join(view.block()))
  if world.trouble:
    print(f"  hosts that do not answer: {world.trouble}")
  if memory.active and not memory.guarded and world.reports:
    print("  the slice has not proven that it can remove itself")
  for report in world.reports:
    code = f", code {report.code}" if report.code is not None else ""
    print(
      f"  host {report.name}: attempt {report.attempt} {report.phase}{code}, step {report.step}"
      f"{f': {report.trouble}' if report.trouble else ''}"
    )
  driver = Store(gcloud, place).other_driver(run)
  print(
    f"  {driver or 'no launcher'} watches over it"
    + (f"; ended: {run.result['reason']}" if run.result else "")
  )
  return states.DONE


def stop(place: Place, owner: str, as_json: bool) -> int:
  """Let the trainer save and end, and keep the slice."""
  gcloud = _gcloud()
  store = Store(gcloud, place)
  run = store.read()
  if run is None:
    raise UsageError(f"There is no run {place.run} in {place.bucket}.")
  _same_owner(run, owner)
  looker, screen = Looker(gcloud, run.settings), Screen(as_json=as_json)
  world = looker.world(run.memory)
  if not world.reports:
    screen.lines([f"No host of {place.run} answers, so there is nothing to stop. {world.trouble}"])
    return states.ERROR
  hosts = sum(node.hosts for node in world.nodes)
  deadline, verb = time.monotonic() + _STOP_SECONDS, "stop"
  while True:
    reports, trouble = looker.ask(verb)
    left = [report.name for report in reports if report.phase not in ("ended", "none")]
    if not left and len(reports) == hosts:
      break
    if time.monotonic() > deadline:
      names = ", ".join(left) or "none"
      screen.lines(
        [
          (
            f"{len(reports)} of {hosts} hosts answer; not ended within {_STOP_SECONDS:g} s: "
            f"{names}. {trouble}"
          )
        ]
      )
      return states.ERROR
    verb = "status" if len(reports) == hosts else "stop"
    time.sleep(min(5.0, run.settings.poll))
  step = max((report.step or 0 for report in reports), default=0)
  while run and not store.other_driver(run) and run.result is None:
    states.remember(dataclasses.replace(world, reports=reports), run.memory, run.settings)
    run.result = {
      "code": states.DONE,
      "reason": f"stopped at step {step}; the slice is kept",
      "time": time.time(),
    }
    try:
      store.write(run, driving=False)
    except TakenOver:  # by a launcher that has just started, or that has just left
      run = store.read()
  screen.lines(
    [
      (
        f"{place.run}: saved and stopped at step {step}. The slice is kept and paid for "
        f"({View.chips_text(looker.settings)})."
      ),
      f"  launch/tpu down {place.run}   removes it",
      "  launch/tpu up ...    the same command as before resumes",
    ]
  )
  return states.DONE


def logs(place: Place, request: LogRequest) -> int:
  """Print the log of hosts, or its copy in the bucket if they are gone or have a newer attempt."""
  gcloud = _gcloud()
  run = _read(place, gcloud)
  worker = None if request.worker == "all" else int(request.worker)
  queued = None
  if request.attempt is None:
    try:
      queued = queued_of(gcloud.json(commands.describe(place)))
    except GcloudError as error:
      if error.kind != "not_found":
        raise
  if queued and queued.state == "ACTIVE" and run.memory.started:
    Looker(gcloud, run.settings).ship_agent()
    words = ("follow" if request.follow else "tail", str(request.lines))
    line = commands.ssh(
      run.settings,
      commands.agent(place, bundle.agent_name(), bundle.agent_sha(), *words),
      None if worker is None else request.slice,
      worker,
    )
    try:
      return gcloud.attach(line)
    except KeyboardInterrupt:
      return states.DONE
  attempt = request.attempt or run.memory.attempt
  hosts = "*" if worker is None else f"{request.slice}-{worker}"
  folder = f"{place.url}/logs/attempt-{attempt}"
  for url in gcloud.run(commands.list_objects(place, f"{folder}/host-{hosts}.log")).split():
    name = url.rsplit("/host-", 1)[-1].removesuffix(".log")
    for text in gcloud.run(commands.read(place, url)).splitlines()[-request.lines :]:
      print(f"[{name}] {text}")
  return states.DONE


def down(place: Place, owner: str, everything: bool, as_json: bool) -> int:
  """Remove the slices of a run, or all of an owner in a zone, and wait until they are gone."""
  gcloud, screen = _gcloud(), Screen(as_json=as_json)
  if not everything:
    _mark_down(gcloud, place, owner)
  deadline, removing = time.monotonic() + _GONE_SECONDS, set()
  while True:
    queued, nodes = _what_is_there(gcloud, place, owner, everything)
    if not queued and not nodes:
      screen.lines([f"Nothing of {'yours' if everything else place.run} is left in {place.zone}."])
      return states.DONE
    for name, state in queued.items():
      if state not in LEAVING and name not in removing:
        screen.lines([f"removing the queued resource {name} ({state})"])
        removing.add(name)
        _delete(gcloud, commands.delete(dataclasses.replace(place, run=name)))
    if not queued:
      for name, state in nodes.items():
        if state != "DELETING" and name not in removing:
          screen.lines([f"removing the node {name} ({state}), which no queued resource holds"])
          removing.add(name)
          _delete(gcloud, commands.delete_node(place, name))
    if time.monotonic() > deadline:
      screen.lines(
        [
          (
            f"Still there after {describe_seconds(_GONE_SECONDS)}: {', '.join([*queued, *nodes])}. "
            "See the console; the same command tries again."
          )
        ]
      )
      return states.ERROR
    time.sleep(3.0)


def _mark_down(gcloud: Gcloud, place: Place, owner: str) -> None:
  """Record that the run is not wanted, so that no launcher takes a new slice for it."""
  for _ in range(5):
    store = Store(gcloud, place)
    run = store.read()
    if run is None:
      return
    _same_owner(run, owner)
    run.wanted, run.driver = "down", None
    run.result = run.result or {"code": states.ERROR, "reason": "taken down", "time": time.time()}
    try:
      store.write(run, driving=False)
      return
    except TakenOver:
      continue  # its launcher has just written a sign of life
  raise UsageError(f"The launcher of {place.run} keeps writing; end it, and try again.")


def _delete(gcloud: Gcloud, line: commands.Line) -> None:
  try:
    gcloud.run(line)
  except GcloudError as error:
    if error.kind != "not_found":
      raise


def _what_is_there(
  gcloud: Gcloud, place: Place, owner: str, everything: bool
) -> tuple[dict[str, str], dict[str, str]]:
  """Returns queued resources and nodes to remove, by name, with their states."""
  listed, nodes = (
    gcloud.json(commands.list_queued(place)) or [],
    gcloud.json(commands.list_nodes(place)) or [],
  )
  queued = {}
  for value in listed:
    name, one = value["name"].rsplit("/", 1)[-1], queued_of(value)
    if everything and one.owner == owner and _labels(value).get("launcher") == LAUNCHER:
      queued[name] = one.state
    elif not everything and name == place.run:
      if one.owner not in ("", owner):
        raise UsageError(f"The queued resource {name} belongs to {one.owner}.")
      queued[name] = one.state
  if everything:
    mine = [
      node
      for node in nodes
      if node.get("labels", {}).get("owner") == owner
      and node.get("labels", {}).get("launcher") == LAUNCHER
    ]
  else:
    mine = [
      node
      for node in nodes_of_run(nodes, place.run)
      if node.get("labels", {}).get("owner", owner) == owner
    ]
  return queued, {node["name"].rsplit("/", 1)[-1]: node.get("state", "UNKNOWN") for node in mine}


def _labels(value: dict[str, Any]) -> dict[str, str]:
  specs = value.get("tpu", {}).get("nodeSpec", [])
  return specs[0].get("node", {}).get("labels", {}) if specs else {}


def listing(place: Place, as_json: bool) -> int:
  """List the slices of a zone, and which of them are left over."""
  gcloud = _gcloud()
  rows, held = [], set()
  for value in gcloud.json(commands.list_queued(place)) or []:
    name, one, labels = value["name"].rsplit("/", 1)[-1], queued_of(value), _labels(value)
    specs = value.get("tpu", {}).get("nodeSpec", [])
    node = specs[0].get("node", {}) if specs else {}
    note = (
      "dead, but counts against quota: launch/tpu down"
      if one.state in ("SUSPENDED", "FAILED")
      else ""
    )
    rows.append(
      {
        "kind": "queued resource",
        "name": name,
        "state": one.state,
        "type": node.get("acceleratorType", ""),
        "owner": one.owner,
        "attempt": labels.get("attempt", ""),
        "created": value.get("createTime", ""),
        "note": note,
      }
    )
    held.add(name)
  for value in gcloud.json(commands.list_nodes(place)) or []:
    name, labels = value["name"].rsplit("/", 1)[-1], value.get("labels", {})
    holder = (value.get("queuedResource") or "").rsplit("/", 1)[-1] or labels.get("run", name)
    rows.append(
      {
        "kind": "node",
        "name": name,
        "state": value.get("state", ""),
        "type": value.get("acceleratorType", ""),
        "owner": labels.get("owner", ""),
        "attempt": labels.get("attempt", ""),
        "created": value.get("createTime", ""),
        "note": "" if holder in held else "no queued resource holds it: launch/tpu down",
      }
    )
  if as_json:
    print("\n".join(json.dumps(row) for row in rows))
    return states.DONE
  columns = list(rows[0]) if rows else []
  widths = {
    column: max(len(column), *(len(str(row[column])) for row in rows)) for column in columns
  }
  for row in [{column: column for column in columns}, *rows] if rows else []:
    print("  ".join(str(row[column]).ljust(widths[column]) for column in columns).rstrip())
  print(f"{len(rows)} in {place.zone}" if rows else f"nothing in {place.zone}")
  return states.DONE
