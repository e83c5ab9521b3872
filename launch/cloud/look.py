"""Reads the service, the hosts and the bucket into the `World` that decisions are made from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
import dataclasses
import datetime
import json
import pathlib
import re
import tempfile
import time
from typing import Any

from launch.cloud import bundle, commands
from launch.cloud.gcloud import Gcloud, GcloudError
from launch.cloud.settings import Settings, UsageError
from launch.cloud.world import Memory, Node, Queued, Report, World


def queued_of(value: dict[str, Any]) -> Queued:
  """Reads a queued resource of the TPU API v2."""
  specs = value.get("tpu", {}).get("nodeSpec", [])
  labels = specs[0].get("node", {}).get("labels", {}) if specs else {}
  state = value.get("state", {})
  error = state.get("failedData", {}).get("error", {})
  return Queued(
    state.get("state", "UNKNOWN"),
    int(error.get("code", 0)),
    error.get("message", ""),
    labels.get("owner", ""),
    labels.get("run", ""),
  )


def node_of(value: dict[str, Any]) -> Node:
  """Reads a node of the TPU API v2."""
  announced = value.get("upcomingMaintenance") or {}
  maintenance = (
    f"{announced.get('type', 'maintenance')} {announced.get('windowStartTime', '')}"
    if announced
    else ""
  )
  return Node(
    value["name"].rsplit("/", 1)[-1],
    value.get("state", "UNKNOWN"),
    value.get("health") or "HEALTHY",
    max(1, len(value.get("networkEndpoints", []))),
    _time(value.get("createTime", "")),
    maintenance.strip(),
  )


def _time(text: str) -> float | None:
  """Reads a time of the API, as in 2026-01-02T03:04:05.678901234Z."""
  try:
    seconds = datetime.datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", text))
  except ValueError:
    return None
  return seconds.timestamp()


def report_of(value: dict[str, Any]) -> Report:
  """Reads the report of an agent; entries of other versions are left out."""
  known = {field.name for field in dataclasses.fields(Report)}
  return Report(
    **{name: entry for name, entry in value.items() if name in known and entry is not None}
  )


def nodes_of_run(listed: Iterable[dict[str, Any]], run: str) -> list[dict[str, Any]]:
  """Returns the nodes of a run, slice 0 first."""
  mine: list[tuple[int, str, dict[str, Any]]] = []
  for value in listed:
    name = value["name"].rsplit("/", 1)[-1]
    found = re.fullmatch(rf"{re.escape(run)}(?:-(\d+))?", name)
    # By label where there is one: a run named "a" must not take the node of a run named "a-1".
    if found and value.get("labels", {}).get("run", run) == run:
      mine.append((int(found[1] or 0), name, value))
  return [value for _, _, value in sorted(mine, key=lambda entry: entry[:2])]


class Looker:
  """What is seen of one run."""

  def __init__(self, gcloud: Gcloud, settings: Settings, clock: Callable[[], float] = time.time):
    self._gcloud, self.settings, self._clock = gcloud, settings, clock
    self._agent = bundle.agent_name(), bundle.agent_sha()
    self._agent_there = False

  def world(self, memory: Memory) -> World:
    """Read the queued resource, and if it is ACTIVE its nodes and hosts: three calls at most.

    Raises:
      GcloudError: if the service does not answer, or refuses.
      UsageError: if the queued resource belongs to another owner or run.
    """
    try:
      return self._world(memory)
    except (AttributeError, KeyError, TypeError, ValueError, IndexError) as error:
      raise GcloudError("unknown", [], f"the answer makes no sense: {error!r}") from error

  def _world(self, memory: Memory) -> World:
    place, trouble = self.settings.place, ""
    try:
      queued = queued_of(self._gcloud.json(commands.describe(place)))
    except GcloudError as error:
      if error.kind != "not_found":
        raise
      queued = None
    if queued and (queued.owner or self.settings.owner, queued.run or place.run) != (
      self.settings.owner,
      place.run,
    ):
      raise UsageError(
        f"The queued resource {place.run} in {place.zone} belongs to {queued.owner}, run "
        f"{queued.run}; use another name."
      )
    if not queued or queued.state != "ACTIVE":
      # A slice may have come and gone while no launcher was running.
      lost = memory.active or (queued is None and bool(memory.request or memory.started))
      return World(
        self._clock(),
        queued,
        heartbeat=self.heartbeat() if lost else None,
        reports=self.left_behind(memory.attempt) if queued is None and memory.started else (),
      )
    # Nodes of an earlier life with more slices may be left over; `down` removes them.
    names = (
      [place.run]
      if self.settings.slices == 1
      else [f"{place.run}-{i}" for i in range(self.settings.slices)]
    )
    listed = map(node_of, nodes_of_run(self._gcloud.json(commands.list_nodes(place)), place.run))
    nodes = tuple(node for node in listed if node.name in names)
    reports: tuple[Report, ...] = ()
    if len(nodes) == self.settings.slices and all(node.state == "READY" for node in nodes):
      reports, trouble = self.ask("status")
    silent = (
      not reports
      and memory.missing
      and self._clock() - min(memory.missing.values()) > self.settings.poll
    )
    return World(
      self._clock(), queued, nodes, reports, self.heartbeat() if silent else None, trouble
    )

  def ship_agent(self) -> None:
    """Put the agent into the bucket, for hosts whose startup script brought another one."""
    if not self._agent_there:
      place = self.settings.place
      with tempfile.TemporaryDirectory() as folder:
        path = bundle.pack_agent(pathlib.Path(folder))
        self._gcloud.run(commands.upload(place, str(path), f"{place.url}/launch/{path.name}"))
      self._agent_there = True

  def ask(self, *words: str) -> tuple[tuple[Report, ...], str]:
    """Run a verb of the agent on all hosts; return the reports, and why others are missing."""
    lines, trouble = self._gcloud.hosts(
      commands.ssh(self.settings, commands.agent(self.settings.place, *self._agent, *words))
    )
    reports, failed = {}, []
    for line in lines:
      if line.startswith('{"') and '"tpu_agent"' in line:
        try:
          report = report_of(json.loads(line))
        except (ValueError, TypeError):  # the lines of two hosts were mixed
          continue
        reports[report.name] = report
      elif line.startswith("tpu-agent-failed"):
        failed.append(line.split()[1:])
    if failed and not self._agent_there:  # `up` shipped the agent of other code than this
      self.ship_agent()
      return self.ask(*words)
    if failed:
      code, name = failed[0][0], failed[0][-1]
      why = commands.AGENT_TROUBLE.get(code) or trouble or f"code {code}"
      several = f" and {len(failed) - 1} more hosts" if len(failed) > 1 else ""
      trouble = f"{name}{several} answers ssh, but its agent failed: {why}"
    return tuple(
      sorted(reports.values(), key=lambda report: (report.slice, report.worker))
    ), trouble

  def last_lines(self, host: str, attempt: int, lines: int) -> list[str]:
    """Returns the last lines of a host's log, or of its copy in the bucket if the host is gone."""
    number, worker = map(int, host.split("-"))
    command = commands.agent(self.settings.place, *self._agent, "tail", str(lines))
    found, _ = self._gcloud.hosts(commands.ssh(self.settings, command, number, worker))
    if found := [line for line in found if line.startswith("[")]:
      return found[-lines:]
    url = f"{self.settings.place.url}/logs/attempt-{attempt}/host-{host}.log"
    try:
      return self._gcloud.run(commands.read(self.settings.place, url), tries=1).splitlines()[
        -lines:
      ]
    except GcloudError as error:
      return [str(error)]

  def heartbeat(self) -> dict[str, Any] | None:
    """Returns the last report of the guard of host 0, of whatever slice."""
    return next(iter(self._objects("heartbeat.json")), None)

  def left_behind(self, attempt: int) -> tuple[Report, ...]:
    """Returns how the trainers of an attempt ended, as far as the bucket has it."""
    return tuple(map(report_of, self._objects(f"logs/attempt-{attempt}/exit-*.json")))

  def _objects(self, pattern: str) -> list[dict[str, Any]]:
    try:
      text = self._gcloud.run(
        commands.read(self.settings.place, f"{self.settings.place.url}/{pattern}")
      )
    except GcloudError as error:
      if error.kind != "not_found":
        raise
      return []
    return [json.loads(line) for line in text.splitlines() if line.startswith("{")]
