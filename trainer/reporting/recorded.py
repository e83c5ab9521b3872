"""What a run has left in its workdir, for those who look at it: the report and the watch."""

import dataclasses
import os
import time
from typing import Any

from etils import epath
import ml_collections
import numpy as np

from input_pipeline.remote import has_scheme
from trainer import models
from trainer.errors import ConfigError
from trainer.reporting import events
from trainer.workdir import files, storage
from trainer.workdir.paths import Workdir

# Steps, values and wall times by name, as events.read_scalars returns them.
Scalars = dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]

# An owner that has not renewed its lease for so long is taken for gone. Here the clock of another
# machine counts, since nothing but a word depends on it.
_SILENT_SECONDS = 600.0


@dataclasses.dataclass(frozen=True)
class Recorded:
  """The files of a run as far as they exist; None where one does not.

  Attributes:
    run: its folder.
    scalars: its curves.
    config, final, starts, data, environment, ended, eval_classes, owner: as in `Workdir`.
    classes: names by label; empty if they are not known.
    words: what the names mean, by name, where the data said so.
  """

  run: Workdir
  scalars: Scalars
  config: dict[str, Any] | None = None
  final: dict[str, Any] | None = None
  starts: dict[str, Any] | None = None
  data: dict[str, Any] | None = None
  environment: dict[str, Any] | None = None
  ended: dict[str, Any] | None = None
  eval_classes: dict[str, Any] | None = None
  owner: dict[str, Any] | None = None
  classes: tuple[str, ...] = ()
  words: dict[str, str] = dataclasses.field(default_factory=dict)

  @property
  def name(self) -> str:
    """The last part of its path."""
    return self.run.path.name

  @property
  def title(self) -> str:
    """Its model in words."""
    if self.config is None:
      return "Training run"
    model = ml_collections.ConfigDict(self.config["model"])
    try:
      return models.family_of(model).describe(models.own_fields(model))
    except (ValueError, KeyError):  # a family that is not here, or a field of another version
      return str(model.name)

  @property
  def last_step(self) -> int:
    """The last step that has any value."""
    return max((int(steps[-1]) for steps, _, _ in self.scalars.values()), default=0)

  @property
  def history(self) -> list[dict[str, Any]]:
    """Step, time, changes and failure of each start, as far as they were noted."""
    return list((self.starts or {}).get("history", ()))

  @property
  def failure(self) -> str:
    """Why its last process ended without a result; "" if it did not fail, or left no word."""
    if self.final is not None:
      return ""
    if self.ended is not None:
      return str(self.ended["reason"])
    last = self.history[-1].get("failure", {}) if self.history else {}
    return str(last.get("reason", ""))

  @property
  def state(self) -> str:
    """finished | failed | running | stopped."""
    if self.final is not None:
      return "finished"
    if self.owner and time.time() - self.owner.get("renewed", 0) < _SILENT_SECONDS:
      return "running"
    return "failed" if self.failure else "stopped"

  @property
  def epochs_per_step(self) -> float | None:
    """What turns steps into epochs; None if it is not known."""
    if self.final is not None and self.final["step"]:
      return float(self.final["epochs"] / self.final["step"])
    examples = ((self.data or {}).get("train") or {}).get("examples")
    if not examples or self.config is None:
      return None
    return float(self.config["global_batch_size"] / examples)

  def in_words(self, name: str) -> str:
    """Return a class by its words where they are known: 'tench, Tinca tinca (n01440764)'."""
    return f"{self.words[name]} ({name})" if name in self.words else name


def open_run(workdir: str) -> Workdir:
  """Return the folder of a run.

  Raises:
    StorageError: if it is a bucket that cannot be used.
    ConfigError: if it is a file.
  """
  directory = storage.path_of(workdir)
  if not has_scheme(workdir) and os.path.isfile(directory):
    raise ConfigError(f"{workdir} is a file; give the folder of a run.")
  trouble = storage.problem(directory)
  if trouble:
    raise trouble.ends(f"{directory} cannot be read")
  return Workdir(directory)


def read(workdir: str) -> Recorded:
  """Return what a run has left.

  Raises:
    ValueError: if it has logged nothing and failed at nothing, or the folder is no workdir.
    TrainerError: if a bucket cannot be used, or a file cannot be read.
  """
  run = open_run(workdir)
  found = dataclasses.replace(read_files(run), scalars=_scalars(run.events))
  if not found.scalars and not found.failure:
    if not run.path.exists():
      raise ValueError(f"There is no folder {run.path}.")
    raise ValueError(
      f"{run.path} has nothing to report: {run.events} holds no event files with scalars."
    )
  return found


def read_files(run: Workdir) -> Recorded:
  """Return the same without the curves, of a folder that may be empty or absent.

  Raises:
    StorageError: if a file cannot be read.
  """
  return Recorded(
    run,
    {},
    config=files.read_json(run.config, {"model": dict}),
    final=files.read_json(run.final, {"step": int, "wall_seconds": dict}),
    starts=files.read_json(run.starts, {"starts": int}),
    data=files.read_json(run.data),
    environment=files.read_json(run.environment),
    ended=files.read_json(run.ended, {"reason": str}),
    eval_classes=files.read_json(run.eval_classes, {"splits": dict}),
    owner=files.read_json(run.owner),
    **_classes(run),
  )


def _classes(run: Workdir) -> dict[str, Any]:
  found = files.read_json(run.classes, {"classes": list}) or {}
  return {"classes": tuple(found.get("classes", ())), "words": found.get("words", {})}


def _scalars(folder: epath.Path) -> Scalars:
  try:
    return events.read_scalars(folder)
  except FileNotFoundError:
    return {}
