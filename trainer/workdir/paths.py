"""What the folder of a run holds: every name in it, once."""

import dataclasses

from etils import epath


@dataclasses.dataclass(frozen=True)
class Workdir:
  """The folder of a run and the paths in it, whether or not anything is there yet.

  Attributes:
    path: the folder itself.
  """

  path: epath.Path

  @property
  def config(self) -> epath.Path:
    """The config of the newest start."""
    return self.path / "config.json"

  @property
  def overview(self) -> epath.Path:
    """What the newest start is, with every parameter and its sharding, as text."""
    return self.path / "overview.txt"

  @property
  def metrics(self) -> epath.Path:
    """The curves as lines of JSON; see trainer.reporting.json_lines."""
    return self.path / "metrics.jsonl"

  @property
  def wandb(self) -> epath.Path:
    """Which run of Weights & Biases it is; see trainer.reporting.wandb_writer."""
    return self.path / "wandb.json"

  @property
  def owner(self) -> epath.Path:
    """Who writes to this folder now; see trainer.workdir.lease."""
    return self.path / "owner.json"

  @property
  def data(self) -> epath.Path:
    """What the data of the newest start are; see trainer.data."""
    return self.path / "data.json"

  @property
  def starts(self) -> epath.Path:
    """When the run was first started, and how often since."""
    return self.path / "starts.json"

  @property
  def environment(self) -> epath.Path:
    """Where and with which versions the newest start runs."""
    return self.path / "environment.json"

  @property
  def of_start(self) -> tuple[epath.Path, ...]:
    """Files that each start writes, and nothing but a start."""
    return self.config, self.starts, self.data, self.environment

  @property
  def ended(self) -> epath.Path:
    """Why the newest start ended without a result, if it was by a failure."""
    return self.path / "ended.json"

  @property
  def samples(self) -> epath.Path:
    """Some images of the first batch; see trainer.reporting.examples."""
    return self.path / "samples.json"

  @property
  def mistakes(self) -> epath.Path:
    """The most confident mistakes; see trainer.reporting.examples."""
    return self.path / "mistakes.json"

  @property
  def classes(self) -> epath.Path:
    """The names of the classes by label, and what they mean where the data say so."""
    return self.path / "classes.json"

  @property
  def final(self) -> epath.Path:
    """The result of a finished run."""
    return self.path / "final.json"

  @property
  def evaluation(self) -> epath.Path:
    """The result of the newest evaluation by `--mode=eval`."""
    return self.path / "eval.json"

  @property
  def eval_classes(self) -> epath.Path:
    """The result of the newest evaluation by class, with `config.eval.per_class`."""
    return self.path / "eval_classes.json"

  @property
  def report(self) -> epath.Path:
    """The report of the run as one page."""
    return self.path / "report.html"

  @property
  def events(self) -> epath.Path:
    """Folder of TensorBoard event files."""
    return self.path / "events"

  @property
  def checkpoints(self) -> epath.Path:
    """Folder of whole checkpoints, each in a folder named by its step."""
    return self.path / "checkpoints"

  @property
  def damaged(self) -> epath.Path:
    """Folder of checkpoints that were set aside."""
    return self.path / "damaged"

  @property
  def compiled(self) -> epath.Path:
    """Folder of compiled programs."""
    return self.path / "compiled"

  def probe(self, host: int, token: str) -> epath.Path:
    """File that a host writes to find out whether the folder can be written; short-lived."""
    return self.path / f".probe-{host}-{token}"
