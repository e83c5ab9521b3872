"""The scalars of metrics.jsonl for Weights & Biases, where `config.log.wandb` names a project.

`wandb` comes with the extra [wandb] and is imported by process 0 of such a run alone. Its own
variables count: WANDB_MODE=offline keeps everything in WORKDIR/wandb, for `wandb sync` later.
"""

from collections.abc import Mapping
import importlib.util
from typing import Any
import uuid

from absl import logging
import ml_collections

from trainer.reporting.json_lines import ScalarWriter, grouped
from trainer.workdir import storage
from trainer.workdir.files import read_json, write_json
from trainer.workdir.paths import Workdir

_SECONDS = 30.0  # to begin a run, and to upload what is left at its end


def problem() -> str:
  """Return why wandb cannot be used on this host, in one sentence; "" if it can."""
  if importlib.util.find_spec("wandb") is None:
    return "config.log.wandb needs the package wandb; run: pip install -e '.[wandb]'"
  import wandb

  online = wandb.setup(wandb.Settings(silent=True)).settings.mode == "online"
  if online and not wandb.login(prompt=False, verify=False):
    return (
      "config.log.wandb has no key; run: wandb login, or set WANDB_API_KEY, or WANDB_MODE=offline."
    )
  return ""


class WandbWriter(ScalarWriter):
  """Adds the scalars of each step to a run of wandb, which a resume continues.

  Of steps that a resumed run takes again, wandb keeps what it has; those of an offline run are in
  the files of both starts. What goes wrong in wandb ends no run: it is logged, and nothing more is
  added.
  """

  def __init__(self, workdir: Workdir, config: ml_collections.ConfigDict):
    """Wait for the first scalars: a server that is silent must not hold up the start.

    Args:
      workdir: keeps the id of the run.
      config: of the run, with a project in `log.wandb`.
    """
    self._workdir, self._config = workdir, config
    self._run: Any = None
    self._ended = False

  def _begin(self) -> Any:
    import wandb

    words, folder = self._config.log.wandb, self._workdir.path
    entity, _, project = words.rpartition("/")
    found = read_json(self._workdir.wandb, {"id": str})
    if found is None or found.get("project") != words:
      found = {"project": words, "id": uuid.uuid4().hex[:8]}
      write_json(self._workdir.wandb, found)
    run = wandb.init(
      entity=entity or None,
      project=project,
      id=found["id"],
      resume="allow",
      name=folder.name,
      dir=None if storage.in_bucket(folder) else str(folder),
      config=self._config.to_dict(),
      allow_val_change=True,  # by a resume
      reinit="create_new",  # beside runs of the program that calls train()
      settings=wandb.Settings(
        silent=True, console="off", init_timeout=_SECONDS, finish_timeout=_SECONDS
      ),
    )
    logging.info("Weights & Biases: %s", run.dir if run.offline else run.url)
    return run

  def write_scalars(self, step: int, scalars: Mapping[str, Any]) -> None:
    """Add the scalars of a step."""
    values = grouped(scalars)
    if not values or self._ended:
      return
    try:
      self._run = self._run or self._begin()
      self._run.log(values, step=int(step))
    # As in BucketFile: whatever kind of error it is.
    except Exception as error:
      logging.warning("Weights & Biases gets nothing more: %s", storage.first_line(error))
      self._ended = True

  def close(self) -> None:
    """Upload what is left."""
    if self._run:
      try:
        self._run.finish()
      except Exception as error:  # likewise
        logging.warning("Weights & Biases lacks the last scalars: %s", storage.first_line(error))
