"""What launch.preflight compares: collectives with the config, a checkpoint with the run, programs.

Imported where JAX has been set up for the compiler of TPUs.
"""

from collections.abc import Iterator, Mapping
import contextlib
import logging
import re
from typing import Any
import warnings

from etils import epath
import jax
import ml_collections
import orbax.checkpoint as ocp

from configs.names import counted
from launch.preflight_text import mib
from trainer import config as config_lib
from trainer import mesh as mesh_lib
from trainer import program as program_lib
from trainer.errors import ConfigError
from trainer.state import Tree, path_name
from trainer.workdir.checkpoint import FORMAT, items_of
from trainer.workdir.paths import Workdir

# With fewer images of a micro-batch on a chip a step takes two to three times as long for the same
# arithmetic: launch/estimates.md, "Recipes".
_FEW = 8
_GATHERED = 0.1  # share of the parameters from which an all-gather is one of theirs
_KEY_PART = re.compile(r"hash of serialized (.+): (\w+)$")


def advice(config: ml_collections.ConfigDict, mode: str, chips: int) -> str:
  """Return what to change where a step does not fit.

  Args:
    config: of the run.
    mode: of the step, "train" or "eval".
    chips: that compute it.
  """
  if mode == "eval":
    return f"Use more chips or a smaller config.eval.batch_size than {config.eval.batch_size}."
  at_once = config.global_batch_size // config.accumulation_steps // chips
  few = at_once < 2 * _FEW
  ways = ["use more chips", "halve config.global_batch_size"]
  if at_once > 1:
    ways.append("double config.accumulation_steps")
  if config.model.get("remat") == "none":
    ways.insert(0 if few else len(ways), "set config.model.remat=blocks")
  words = f"{', '.join(ways[:-1])} or {ways[-1]}; --find_batch finds the largest batch that fits."
  if few:
    words += (
      f" A chip has {counted(at_once, 'image')} of a micro-batch: with fewer than {_FEW} a step "
      "takes two to three times as long."
    )
  return words[0].upper() + words[1:]


def as_asked(step: Mapping[str, Any], program: program_lib.Program) -> list[dict[str, Any]]:
  """Compare the collectives of a training step with the groups and shardings of the config.

  Args:
    step: its report; see trainer.tools.estimate.step.
    program: of the run.

  Returns:
    For each thing: what, asked and found in words, and whether they agree, `as_asked`.
  """
  results = []
  config, mesh = program.config, program.mesh
  if "bn_group" in config.model:
    devices = _norm_devices(config, mesh)
    found = step["norm_groups"]
    over = ", ".join(f"{count} over {number} devices" for number, count in found.items())
    results.append(
      {
        "what": "batch norm",
        "asked": f"model.bn_group={config.model.bn_group}: "
        + (f"sums over {devices} devices" if devices > 1 else "nothing crosses devices"),
        "found": f"collectives: {over or 'none'}",
        "as_asked": set(map(int, found)) == ({devices} if devices > 1 else set()),
      }
    )
  sharded = [
    name
    for name, leaves in (
      ("params", program.abstract_state.params),
      ("opt_state", program.abstract_state.opt_state),
    )
    if any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(leaves))
  ]
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(program.abstract_state.params))
  gathered = sum(each["bytes"] for each in step["collectives"] if each["kind"] == "all-gather")
  results.append(
    {
      "what": "sharding",
      "asked": f"{' and '.join(sharded) or 'nothing'} in shards",
      "found": f"{mib(gathered)} gathered in a step, of {mib(size)} of parameters",
      "as_asked": bool(sharded) == (gathered > _GATHERED * size),
    }
  )
  return results


def _norm_devices(config: ml_collections.ConfigDict, mesh: jax.sharding.Mesh) -> int:
  """Return the devices that share a group of batch norm."""
  shards, group = mesh_lib.batch_shards(mesh), config.model.bn_group
  examples = config.global_batch_size // config.accumulation_steps
  if group == "device":
    parts = 1
  else:
    parts = shards if group == "global" else max(1, int(group) * shards // examples)
  return parts * mesh.shape["space"]


def checkpoint(workdir: str, program: program_lib.Program) -> dict[str, Any]:
  """Compare the newest checkpoint of a workdir with the run, by its names, shapes and config.

  No array is read, and nothing in the workdir is changed.

  Args:
    workdir: local or gs://.
    program: of the run.

  Returns:
    workdir, step, steps of the whole run, and the changes that config.resume.allow lets through.

  Raises:
    ConfigError: if there is none, or it would not restore.
  """
  folder = Workdir(epath.Path(workdir).expanduser()).checkpoints
  items = items_of(program.abstract_checkpoint)
  wanted = {f"{item}/{name}": shape for item in items for name, shape in _shapes(items[item])}
  with _quiet(logging.getLogger("absl")):  # Orbax warns of what it does not change
    options = ocp.CheckpointManagerOptions(read_only=True)
    with contextlib.closing(ocp.CheckpointManager(folder, options=options)) as manager:
      step = manager.latest_step()
      if step is None:
        raise ConfigError(f"--from_checkpoint={workdir} holds no checkpoint.")
      meta = manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    if meta["format"] != FORMAT:
      raise ConfigError(f"{folder / str(step)} has format {meta['format']}, this version {FORMAT}.")
    changes = config_lib.check_same_run(meta["config"], program.config, workdir)
    reader = ocp.StandardCheckpointer()
    saved = {
      f"{item}/{name}": shape
      for item in items
      if (folder / str(step) / item).exists()
      for name, shape in _shapes(reader.metadata(folder / str(step) / item).item_metadata.tree)
    }
  different = [name for name in sorted({*wanted, *saved}) if wanted.get(name) != saved.get(name)]
  if different:
    name = different[0]
    there, here = (
      f"shape {list(leaves[name])}" if name in leaves else "none" for leaves in (saved, wanted)
    )
    raise ConfigError(
      f"--from_checkpoint={workdir} does not restore: step {step} has {name} with {there}, this "
      f"config with {here} ({len(different)} of {len(wanted)} leaves differ)."
    )
  return {
    "workdir": workdir,
    "step": step,
    "of": program.lengths.total,
    "leaves": len(wanted),
    "changes": {name: list(pair) for name, pair in changes.items()},
  }


def _shapes(tree: Tree) -> list[tuple[str, tuple[int, ...]]]:
  return [(path_name(path), tuple(leaf.shape)) for path, leaf in jax.tree.leaves_with_path(tree)]


@contextlib.contextmanager
def _quiet(logger: logging.Logger, level: int = logging.ERROR) -> Iterator[None]:
  """Set the level of a logger while the body runs."""
  before = logger.level
  logger.setLevel(level)
  try:
    yield
  finally:
    logger.setLevel(before)


@contextlib.contextmanager
def kept(folder: str | None) -> Iterator[dict[str, Any]]:
  """Keep the programs that the body compiles in a folder, under the keys of the trainer's cache.

  Args:
    folder: local or gs://; None to keep none.

  Yields:
    What is filled at the end: the folder; files, the bytes of each; and key, the parts of their
    keys, as JAX hashes them: what part -> that of each program.
  """
  result: dict[str, Any] = {}
  if not folder:
    yield result
    return
  parts: dict[str, list[str]] = {}

  class Parts(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
      if found := _KEY_PART.search(record.getMessage()):
        parts.setdefault(found[1], []).append(found[2][:16])

  logger, handler = logging.getLogger("jax._src.cache_key"), Parts()
  propagates = logger.propagate
  path = epath.Path(folder).expanduser()
  path.mkdir(parents=True, exist_ok=True)
  program_lib.keep_compiled(str(path))
  logger.addHandler(handler)
  logger.propagate = False
  try:
    with _quiet(logger, logging.DEBUG), warnings.catch_warnings():
      # The compiler alone, without a TPU, writes programs and reads none.
      warnings.filterwarnings("ignore", "Error reading persistent compilation cache")
      yield result
  finally:
    jax.config.update("jax_compilation_cache_dir", None)
    logger.removeHandler(handler)
    logger.propagate = propagates
  files = {file.name: file.stat().length for file in sorted(path.iterdir())}
  result |= {"folder": str(path), "files": files, "key": parts}
