"""What a checkpoint holds, when one is taken, and how a run is restored from it.

A checkpoint is a folder `WORKDIR/checkpoints/STEP` that Orbax writes in the background and renames
into place once it is whole; in a bucket, where folders cannot be renamed at once, a last object
`commit_success.txt` marks it whole. Its items are the non-empty parts of the state (`_ITEMS`) and
`meta`: step, position in the data, config, clocks, best result, and a hash of every leaf. Orbax
does not notice a flipped bit, so the hashes are computed on the devices before each save, and again
after each restore.
"""

from collections.abc import Sequence
from concurrent import futures
import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import shutil
import time
from typing import Any

from absl import flags, logging
from etils import epath
import flax
import jax
import ml_collections
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, CustomSteps, LatestN

from trainer import config as config_lib
from trainer.errors import CheckpointError, ConfigError, StorageError
from trainer.pod.pod import Pod
from trainer.reporting.screen import SCREEN
from trainer.state import TrainState, Tree, fingerprints
from trainer.workdir import storage
from trainer.workdir.files import read_json
from trainer.workdir.paths import Workdir

FORMAT = 1
_ROOM_FOR_FILES = 4 << 20  # bytes of Orbax's own files beside the arrays
# Parts of the state that are items of a checkpoint, unless they are absent or empty. The step is in
# `meta`.
_ITEMS = ("params", "batch_stats", "others", "opt_state", "ema", "masks")

# What damaged checkpoints were seen to raise when they are read. Any other error (no memory, no
# permission, no network) proves nothing about the checkpoint, which then must not be set aside.
_DAMAGE = (ValueError, KeyError, TypeError, FileNotFoundError, NotADirectoryError)


class Checkpointer:
  """Saves and restores the state of one workdir."""

  def __init__(
    self, pod: Pod, workdir: epath.Path, config: ml_collections.ConfigDict, every_steps: int
  ):
    """Open the checkpoints of a workdir.

    Args:
      pod: this host among the others.
      workdir: folder of the run.
      config: validated config of the run.
      every_steps: steps between periodic checkpoints; 0 for none by steps.

    Raises:
      StorageError: if they cannot be listed.
    """
    self._pod = pod
    self._workdir = Workdir(workdir)
    self._config = config
    self._every_steps = every_steps
    if pod.hosts > 1:
      # By default Orbax synchronises hosts by collectives of the devices, without a time limit and
      # only in step with the training loop. With this flag it uses JAX's coordination service, from
      # any thread and with a time limit.
      flags.FLAGS["experimental_orbax_use_distributed_barrier"].value = True
    # The newest N and the best. Not by Orbax's BestN: a checkpoint is saved before its evaluation,
    # so its metric is unknown when it is written.
    self._preserved = [LatestN(config.checkpoint.keep_last), CustomSteps([])]
    self._directory = self._workdir.checkpoints
    try:
      self._manager = self._open_manager()
    except Exception as error:
      if not storage.is_failure(error):
        raise
      # A later try finds what is left: host 0 may remove the only save, a torn one, from a bucket
      # while this host lists it.
      trouble = storage.Problem.of(error)
      lasting = trouble.lasting and not isinstance(error, storage.MISSING)
      raise trouble._replace(lasting=lasting).ends(f"{self._directory} cannot be read") from error
    self._newest = self._manager.latest_step()  # of the checkpoints that are whole
    self._thread = futures.ThreadPoolExecutor(1, thread_name_prefix="save")
    self._in_flight: tuple[int, futures.Future[float]] | None = None
    self._broken = False  # whether the manager has failed, and with it the last save
    self._failed = False  # whether any save has failed
    self._problem: storage.Problem | None = None  # of the last save that has failed
    self._began = False  # whether the start of the run has written its files
    self._waits = False  # whether the run ends with the save under way
    self._last_time = time.monotonic()
    self._retry_time: float | None = None

  def _open_manager(self) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=AnyPreservationPolicy(self._preserved), cleanup_tmp_directories=True
      ),
    )

  def set_best(self, step: int) -> None:
    """Keep the checkpoint of this step, beside the newest N, until another is the best."""
    if self._config.checkpoint.keep_best:
      self._preserved[1] = CustomSteps([step])

  def due(self, step: int) -> bool:
    """Whether a periodic save is due after this step; the same on all hosts."""
    return bool(self._every_steps and step % self._every_steps == 0)

  def wanted(self) -> bool:
    """Whether a save is due by the clock of this host: the last was long ago, or has failed."""
    now, every = time.monotonic(), 60 * self._config.checkpoint.every_minutes
    if self._retry_time is not None:
      return now >= self._retry_time
    return bool(every and now - self._last_time >= every)

  def save(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
    """Start an asynchronous save; return once the state may be donated.

    The caller waits for the hashes and for a copy of the state on the devices. A thread does the
    rest, including Orbax's own preparations, which take most of the time that Orbax blocks.

    A save that fails is logged and tried again after `config.checkpoint.retry_seconds`; it never
    ends the run.

    Args:
      step: steps taken; nothing happens if this step is already saved.
      state: what to save.
      meta: JSON-able facts of the run to save with it, such as the clocks and the best result.
    """
    self.poll(wait=True)
    items = items_of(state)
    if not self._ready(step, items):
      return
    next_step = step + meta.get("offset", 0)
    meta = meta | {
      "format": FORMAT,
      "step": step,
      "data": {
        "next_step": next_step,
        "examples_seen": next_step * self._config.global_batch_size,
      },
      "config": config_lib.flatten(self._config),
      "fingerprints": fingerprints(items),
      "versions": {"jax": jax.__version__, "flax": flax.__version__, "orbax": ocp.__version__},
    }
    meta["digest"] = _digest(meta)
    self._in_flight = step, self._thread.submit(self._write, step, meta, _copy(items))

  def _write(self, step: int, meta: dict[str, Any], items: dict[str, Tree]) -> float:
    """Write a checkpoint; return the seconds that it has taken."""
    start = time.monotonic()
    self._manager.save(
      step,
      force=True,
      args=ocp.args.Composite(
        meta=ocp.args.JsonSave(meta),
        **{name: ocp.args.StandardSave(item) for name, item in items.items()},
      ),
    )
    del items  # Orbax has its own copy now, on the host
    self._manager.wait_until_finished()
    if self._failed and storage.in_bucket(self._directory):
      self._clear_late_objects()
    return time.monotonic() - start

  def _ready(self, step: int, items: dict[str, Tree]) -> bool:
    """Whether to save: the step is not saved already, and every host can write.

    Otherwise the hosts that can write would wait in Orbax for the one that cannot, and a disk that
    fills up during a save leaves threads of Orbax that flood the log.
    """
    problem = None
    if storage.in_bucket(self._directory):
      if self._broken:
        problem = storage.problem(self._directory)
    else:
      problem = self._want_of_room(items)
    hosts = self._pod.gather(f"save of step {step}", [self._broken, problem])
    problem = _first_problem({host: theirs for host, (_, theirs) in hosts.items()})
    if any(broken for broken, _ in hosts.values()) and not problem:
      self._broken, mine = True, None  # if any host failed, all hosts reopen
      self._close_manager()
      try:
        self._manager = self._open_manager()
        self._newest = self._manager.latest_step()
      except Exception as error:
        mine = storage.Problem.of(error)
      problem = _first_problem(self._pod.gather(f"checkpoints reopened for step {step}", mine))
      self._broken = bool(problem)
    if step in self._manager.all_steps():
      return False
    self._last_time, self._retry_time = time.monotonic(), None
    if not storage.in_bucket(self._directory):
      self._clear_torn()
    if problem:
      self._save_failed(step, problem)
    return not problem

  def _want_of_room(self, items: dict[str, Tree]) -> storage.Problem | None:
    """Return why the disk cannot take a checkpoint, if it cannot."""
    if self._is_gone():
      return self._gone()
    try:
      free = shutil.disk_usage(self._directory).free
    except FileNotFoundError:
      return self._gone()
    except OSError as error:
      return storage.Problem.of(error)
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(items)) + _ROOM_FOR_FILES
    if free >= needed:
      return None
    sizes = f"{free / 2**20:.0f} MiB free, {needed / 2**20:.0f} needed"
    return storage.Problem(f"{os.strerror(errno.ENOSPC)}: {sizes}", True)

  def _is_gone(self) -> bool:
    """Whether the folder of a disk has lost all that the start of the run has written.

    A save under way makes the folders that it misses, on whatever disk is there without the mount.
    """
    there = any(file.exists() for file in self._workdir.of_start)
    self._began |= there
    return self._began and not there

  def _gone(self) -> storage.Problem:
    self._newest = None
    return storage.Problem("the folder was removed, renamed or unmounted under this run", True)

  def poll(self, wait: bool = False) -> None:
    """Note how the save in flight ended, if it has; with `wait`, wait until it has."""
    if self._in_flight is None or not (wait or self._in_flight[1].done()):
      return
    (step, written), self._in_flight = self._in_flight, None
    try:
      seconds = written.result()
      if not storage.in_bucket(self._directory) and self._is_gone():
        self._broken = self._failed = True
        self._save_failed(step, self._gone())
        return
      self._newest = step
      logging.info("Checkpoint %d is saved, in %.1f s beside the steps.", step, seconds)
    except Exception as error:  # errors of buckets are of many kinds
      self._broken = self._failed = True
      self._save_failed(step, storage.Problem.of(error))

  def _save_failed(self, step: int, problem: storage.Problem) -> None:
    self._problem = problem
    self._retry_time = time.monotonic() + self._config.checkpoint.retry_seconds
    if self._waits:  # it is tried once more, or is the error that ends the run
      logging.warning("The checkpoint of step %d could not be saved (%s).", step, problem.words)
    else:
      logging.error(
        "The checkpoint of step %d could not be saved (%s). Training goes on; the next try is in "
        "%g s. %s",
        step,
        problem.words,
        self._config.checkpoint.retry_seconds,
        self._in_words(),
      )

  def _in_words(self) -> str:
    """Return which checkpoint a resume would take, as a sentence."""
    if self._newest is None:
      return "There is no whole checkpoint."
    return f"The newest whole checkpoint is that of step {self._newest}."

  def _clear_torn(self) -> None:
    """Remove what failed saves left on a disk, to free its space; no save may be in flight."""
    if self._pod.host == 0:
      for torn in self._directory.glob("*.orbax-checkpoint-tmp*"):
        torn.rmtree(missing_ok=True)

  def _clear_late_objects(self) -> None:
    """Remove torn checkpoints from a bucket; no save may be in flight.

    The first error of a save ends it, but other writers of TensorStore may retry for minutes, and
    succeed after Orbax has removed what the save had left.
    """
    if self._pod.host != 0:
      return
    try:
      whole = set(ocp.utils.checkpoint_steps(self._directory))
      for folder in self._directory.iterdir():
        if folder.name.isdigit() and int(folder.name) not in whole:
          folder.rmtree()
    except Exception as error:
      if not storage.is_failure(error):
        raise
      logging.warning("What failed saves left is still there: %s", storage.first_line(error))

  def save_and_wait(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
    """Save this step unless it is saved already, and return once the checkpoint is whole.

    Raises:
      StorageError: if it could not be written.
    """
    self._waits = True
    with SCREEN.doing(f"saving checkpoint {step}"):
      for _ in range(2):  # a save that has just failed is worth another try: none will come later
        self.save(step, state, meta)
        self.poll(wait=True)
    self._waits = False
    assert self._newest == step or self._problem
    mine = None if self._newest == step else self._problem
    problem = _first_problem(self._pod.gather(f"step {step} is saved", mine))
    if problem:
      advice = "Mend that, then run the same command" if problem.lasting else "Run the same command"
      raise StorageError(
        f"The checkpoint of step {step} could not be written to {self._directory} "
        f"({problem.words}). {self._in_words()} {advice} again.",
        problem.lasting,
      )

  def restore_newest(self, abstract_state: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
    """Restore the newest checkpoint that is whole and true, and set newer, damaged ones aside.

    Args:
      abstract_state: shapes, dtypes and shardings of the state.

    Returns:
      The state, placed as asked, and its meta, with `changes`: in which fields the config of this
      run differs from that of the checkpoint. None if there is no checkpoint.

    Raises:
      ConfigError: if the checkpoint belongs to another config.
      StorageError: if the storage cannot be read now.
    """
    for step in sorted(self._manager.all_steps(), reverse=True):
      self._pod.at(f"restore of step {step}")
      damage = ""
      try:
        state, meta = self._restore(step, abstract_state)
      except Exception as error:
        damage = self._damage(step, error)
      # All hosts resume from the same step, so if any host found damage, none uses this one.
      damage = next(filter(None, self._pod.gather(f"step {step} is restored", damage).values()), "")
      if damage:
        self._set_aside(step, damage)
        continue
      if meta.get("best"):
        self.set_best(meta["best"]["step"])
      return state, meta
    return None

  def restore(
    self, abstract_state: TrainState, which: str
  ) -> tuple[TrainState, dict[str, Any]] | None:
    """Restore the newest checkpoint, as `restore_newest` does, or the best, or that of a step.

    Raises:
      CheckpointError: if there is no such checkpoint, or it is damaged.
      StorageError: if the storage cannot be read.
    """
    if which == "newest":
      return self.restore_newest(abstract_state)
    steps = sorted(self._manager.all_steps())
    best = self._best(steps)
    step = best if which == "best" else int(which) if which.isdecimal() else None
    if step is None or step not in steps:
      there = f"it holds {', '.join(map(str, steps))}" if steps else "it holds none"
      there += f", of which {best} is the best" if best in steps else ""
      raise CheckpointError(
        f"--checkpoint={which}: {self._workdir.path} holds no such checkpoint; {there}."
      )
    try:
      return self._restore(step, abstract_state)
    except Exception as error:
      raise CheckpointError(
        f"Checkpoint {self._directory / str(step)} is damaged: {self._damage(step, error)}; choose "
        "another by --checkpoint=STEP."
      ) from error

  def _damage(self, step: int, error: Exception) -> str:
    """Return how a checkpoint is damaged, by the error of reading it; raise any other error."""
    if lost := storage.lost(error):
      what = f"Checkpoint {self._directory / str(step)} cannot be read"
      raise storage.failed(what, lost) from error
    cause = storage.cause_of(error)
    if not isinstance(cause, _DAMAGE):
      raise error
    return storage.first_line(cause)

  def _best(self, steps: Sequence[int]) -> int | None:
    """Return the step of the best evaluation that the newest checkpoint has in its meta."""
    if not steps:
      return None
    args = ocp.args.Composite(meta=ocp.args.JsonRestore())
    try:
      best = self._manager.restore(steps[-1], args=args)["meta"].get("best")
    except Exception as error:
      raise CheckpointError(
        f"Which checkpoint is the best stands in {self._directory / str(steps[-1])}, which is "
        f"damaged: {self._damage(steps[-1], error)}; choose one by --checkpoint=STEP."
      ) from error
    # The evaluation of the newest step comes after its checkpoint.
    best = (read_json(self._workdir.final) or {}).get("best") or best
    return best["step"] if best else None

  def _restore(self, step: int, abstract_state: TrainState) -> tuple[TrainState, dict[str, Any]]:
    meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    if meta.get("digest") != _digest(meta):
      raise ValueError("its meta item does not match its digest")
    if meta["format"] != FORMAT:
      raise ConfigError(
        f"{self._directory / str(step)} has format {meta['format']}, this version reads {FORMAT}."
      )
    meta["changes"] = config_lib.check_same_run(
      meta["config"], self._config, str(self._workdir.path)
    )
    items = dict(
      self._manager.restore(
        step,
        args=ocp.args.Composite(
          **{
            name: ocp.args.StandardRestore(item) for name, item in items_of(abstract_state).items()
          }
        ),
      )
    )
    found = fingerprints(items)
    wrong = [name for name, value in meta["fingerprints"].items() if found.get(name) != value]
    if wrong or len(found) != len(meta["fingerprints"]):
      raise ValueError(
        f"the hash of {wrong[0] if wrong else 'a leaf'} is not the one that was saved "
        f"({len(wrong)} of {len(found)} leaves differ)"
      )
    step_array = jax.device_put(jax.numpy.int32(step), abstract_state.step.sharding)
    return dataclasses.replace(abstract_state, step=step_array, **items), meta

  def _set_aside(self, step: int, reason: str) -> None:
    source, target = (
      self._directory / str(step),
      self._workdir.damaged / f"{step}-{int(time.time())}",
    )
    if self._pod.host == 0:
      try:
        storage.move_folder(source, target)
      except Exception as error:
        if not storage.is_failure(error):
          raise
        what = f"Checkpoint {source} is damaged ({reason}) and could not be set aside as {target}"
        raise storage.failed(what, error) from error
    self._pod.gather(f"step {step} set aside", "")
    self._manager.reload()
    self._newest = self._manager.latest_step()
    logging.error(
      "Checkpoint %s is damaged: %s. It is set aside as %s; the one before it is tried.",
      source,
      reason,
      target,
    )

  def close(self) -> None:
    """Wait for the save in flight, and end Orbax's threads."""
    self.poll(wait=True)
    self._thread.shutdown()
    self._close_manager()

  def _close_manager(self) -> None:
    # A manager raises the error of a failed save again when it is closed; it has been logged.
    with contextlib.suppress(Exception) if self._broken else contextlib.nullcontext():
      self._manager.close()


def items_of(state: TrainState) -> dict[str, Tree]:
  """Return the parts of a state that are saved; what is absent or empty needs no item."""
  trees = {name: getattr(state, name) for name in _ITEMS}
  return {name: tree for name, tree in trees.items() if jax.tree.leaves(tree)}


@jax.jit
def _copy(tree: Tree) -> Tree:
  return jax.tree.map(jax.numpy.copy, tree)


def _digest(meta: dict[str, Any]) -> str:
  content = {key: value for key, value in meta.items() if key != "digest"}
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _first_problem(by_host: dict[int, list[Any] | None]) -> storage.Problem | None:
  """Return the problem of the first host that has one, as JSON brings them."""
  for host, found in by_host.items():
    if found:
      words, lasting = found
      return storage.Problem(f"host {host}: {words}" if len(by_host) > 1 else words, lasting)
  return None
