"""What --dry-run prints: the lines of a verb in the order of an undisturbed run, ready to paste."""

from __future__ import annotations

from collections.abc import Iterable
import dataclasses
import hashlib
import json
import pathlib
import tempfile

from launch.cloud import boot, bundle, commands, doctor, verbs
from launch.cloud.commands import Line
from launch.cloud.driver import attempt_spec
from launch.cloud.run import Run, noted
from launch.cloud.settings import Place, Settings


def show(lines: Iterable[Line]) -> int:
  """Prints lines and returns 0."""
  for line in lines:
    print(commands.shell(line))
  return 0


def _settings(place: Place) -> Settings:
  """Returns the settings of the last `up` on this machine: nothing else is read."""
  known = noted(place.run)
  return dataclasses.replace(known, place=place) if known else Settings(place, owner="", type="")


def _agent(settings: Settings, *words: str) -> Line:
  return commands.ssh(
    settings, commands.agent(settings.place, bundle.agent_name(), bundle.agent_sha(), *words)
  )


def _read_run(place: Place) -> list[Line]:
  url = f"{place.url}/run.json"
  return [commands.object_generation(place, url), commands.read(place, url)]


def _turn(settings: Settings) -> list[Line]:
  place = settings.place
  return [commands.describe(place), commands.list_nodes(place), _agent(settings, "status")]


def up(settings: Settings) -> list[Line]:
  """From nothing to a complete run without slices; makes the files that the lines need."""
  place, tree, launch = settings.place, bundle.look(), f"{settings.place.url}/launch"
  folder = pathlib.Path(tempfile.mkdtemp(prefix=f"tpu-{place.run}-"))
  run = Run(settings, code=tree.tree, commit=tree.commit, dirty=tree.dirty)
  (folder / "run.json").write_text(json.dumps(run.to_json()))
  spec = json.dumps(attempt_spec(run))
  (folder / "attempt-1.json").write_text(spec)
  agent = bundle.pack_agent(folder)
  shipped = [
    commands.upload(place, str(path), f"{launch}/{path.name}") for path in bundle.pack(tree, folder)
  ]
  return [
    *_read_run(place),
    *doctor.removal_lines(place, settings.service_account),
    commands.upload(place, str(folder / "run.json"), f"{place.url}/run.json", "0"),
    commands.upload(place, str(agent), f"{launch}/{agent.name}"),
    *shipped,
    commands.describe(place),
    commands.create(settings, 1, settings.max_wait, str(boot.write(settings, run.memory, folder))),
    *_turn(settings),
    commands.upload(place, str(folder / "attempt-1.json"), f"{launch}/attempt-1.json"),
    *([commands.copy_environment(settings)] if settings.env_file else []),
    _agent(settings, "start", "1", hashlib.sha256(spec.encode()).hexdigest()),
    *_turn(settings),
    commands.delete(place),
  ]


def watch(place: Place) -> list[Line]:
  """One turn; what follows depends on what is seen, and is among the lines of `up`."""
  return [*_read_run(place), *_turn(_settings(place))]


def status(place: Place) -> list[Line]:
  """One turn."""
  return watch(place)


def stop(place: Place) -> list[Line]:
  """Ask every trainer to stop, and wait until all have ended."""
  settings = _settings(place)
  return [*_read_run(place), *_turn(settings), _agent(settings, "stop"), _agent(settings, "status")]


def logs(place: Place, request: verbs.LogRequest) -> list[Line]:
  """From the hosts, and from the bucket if they are gone."""
  worker = None if request.worker == "all" else int(request.worker)
  words = ("follow" if request.follow else "tail", str(request.lines))
  folder = f"{place.url}/logs/attempt-{request.attempt or 1}"
  hosts = "*" if worker is None else f"{request.slice}-{worker}"
  agent = bundle.pack_agent(pathlib.Path(tempfile.mkdtemp(prefix=f"tpu-{place.run}-")))
  live = [
    commands.describe(place),
    commands.upload(place, str(agent), f"{place.url}/launch/{agent.name}"),
    commands.ssh(
      _settings(place),
      commands.agent(place, bundle.agent_name(), bundle.agent_sha(), *words),
      None if worker is None else request.slice,
      worker,
    ),
  ]
  return [
    *_read_run(place),
    *([] if request.attempt else live),
    commands.list_objects(place, f"{folder}/host-{hosts}.log"),
    commands.read(place, f"{folder}/host-{'0-0' if worker is None else hosts}.log"),
  ]


def down(place: Place, everything: bool) -> list[Line]:
  """List what there is, and remove it."""
  there = [commands.list_queued(place), commands.list_nodes(place)]
  if everything:
    return there
  return [*_read_run(place), *there, commands.delete(place), commands.delete_node(place, place.run)]


def listing(place: Place) -> list[Line]:
  """List what there is."""
  return [commands.list_queued(place), commands.list_nodes(place)]
