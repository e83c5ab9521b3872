"""What a checkpoint holds, when one is taken, and how a run comes back from it.

A checkpoint is a folder `WORKDIR/checkpoints/STEP` that Orbax writes in the background and renames into place when it
is whole; in a bucket, where no folder can be renamed at once, it gets a last object `commit_success.txt` instead.
Its items are `params`, `batch_stats`, `opt_state`, `ema` where there is one, and `meta`: step, position in the data,
config, clocks, best result, and a hash of every leaf. Orbax restores a flipped bit without a word, so the hashes are
computed on the devices before the save, and again after each restore.
"""

from collections.abc import Sequence
from concurrent import futures
import contextlib
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

from trainer import config as config_lib
from trainer.errors import CheckpointError, ConfigError, StorageError
from trainer.pod.pod import Pod
from trainer.state import TrainState, fingerprints
from trainer.workdir import storage
from trainer.workdir.paths import Workdir

FORMAT = 1
_ROOM_FOR_FILES = 4 << 20  # bytes of Orbax's own files beside the arrays
_ITEMS = ("params", "batch_stats", "opt_state", "ema")

# What reading a damaged checkpoint was seen to raise. Anything else (no memory, no permission, no network) says nothing
# about the checkpoint, which then must not be set aside.
_DAMAGE = (ValueError, KeyError, TypeError, FileNotFoundError, NotADirectoryError)
_LOST = (FileNotFoundError, NotADirectoryError)
_UNREACHABLE = ("PERMISSION_DENIED", "UNAVAILABLE", "DEADLINE_EXCEEDED", "UNAUTHENTICATED")


class _KeepLatestAndBest:
  """Orbax preservation policy: the newest N and the best one, which Orbax's own `best_fn` does not combine."""

  def __init__(self, keep_last: int):
    self.keep_last = keep_last
    self.best_step: int | None = None

  def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
    del context
    oldest_kept = len(checkpoints) - self.keep_last
    return [i >= oldest_kept or info.step == self.best_step for i, info in enumerate(checkpoints)]


class Checkpointer:
  """Saves and restores the state of one workdir."""

  def __init__(
    self, pod: Pod, workdir: epath.Path, config: ml_collections.ConfigDict, every_steps: int
  ):
    """Opens the checkpoints of a workdir.

    Args:
      pod: this host among the others.
      workdir: folder of the run.
      config: validated config of the run.
      every_steps: steps between periodic checkpoints; 0 is none by steps.
    """
    self._pod = pod
    self._workdir = Workdir(workdir)
    self._config = config
    self._every_steps = every_steps
    if pod.hosts > 1:
      # Orbax's hosts wait for each other in collectives of the devices, for ever and only in step with the training loop;
      # with this flag they do so in JAX's coordination service, from any thread and for a limited time.
      flags.FLAGS.experimental_orbax_use_distributed_barrier = True
    self._policy = _KeepLatestAndBest(config.checkpoint.keep_last)
    self._directory = self._workdir.checkpoints
    try:
      self._manager = self._open_manager()
    except Exception as error:
      if not storage.is_failure(error):
        raise
      # In a bucket also where host 0 clears away the only save, a torn one, while this host lists it.
      raise StorageError(
        f"{self._directory} cannot be read now ({storage.first_line(error)}); run the same command "
        "again."
      ) from error
    self._newest = self._manager.latest_step()  # of the checkpoints that are whole
    self._thread = futures.ThreadPoolExecutor(1, thread_name_prefix="save")
    self._in_flight: tuple[int, futures.Future[None]] | None = None
    self._broken = False  # whether the manager has failed, and with it the last save
    self._last_time = time.monotonic()
    self._retry_time: float | None = None

  def _open_manager(self) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=self._policy, cleanup_tmp_directories=True
      ),
    )

  def set_best(self, step: int) -> None:
    """Tells which step must outlive the newest N."""
    if self._config.checkpoint.keep_best:
      self._policy.best_step = step

  def due(self, step: int) -> bool:
    """Tells whether a periodic save belongs after this step; the same on all hosts."""
    return bool(self._every_steps and step % self._every_steps == 0)

  def wanted(self) -> bool:
    """Tells whether the clock of this host asks for a save: the last was long ago, or one has failed."""
    now, every = time.monotonic(), 60 * self._config.checkpoint.every_minutes
    if self._retry_time is not None:
      return now >= self._retry_time
    return bool(every and now - self._last_time >= every)

  def save(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
    """Starts an asynchronous save; returns when the state may be donated.

    The loop stands still for the hashes and for a copy of the state on the devices. All else is done by a thread, Orbax's
    own preparations too, which are most of the time that it keeps a caller.

    A save that fails is logged and tried again after `config.checkpoint.retry_seconds`; it never ends the run.

    Args:
      step: steps taken; a step that is already saved is left alone.
      state: what to save.
      meta: JSON-able facts of the run to keep beside it: the clocks and the best result.
    """
    self.poll(wait=True)
    items = {name: getattr(state, name) for name in _ITEMS if getattr(state, name) is not None}
    if not self._ready(step, items):
      return
    meta = meta | {
      "format": FORMAT,
      "step": step,
      "data": {"next_step": step, "examples_seen": step * self._config.global_batch_size},
      "config": config_lib.flatten(self._config),
      "fingerprints": fingerprints(items),
      "versions": {"jax": jax.__version__, "flax": flax.__version__, "orbax": ocp.__version__},
    }
    meta["digest"] = _digest(meta)
    self._in_flight = step, self._thread.submit(self._write, step, meta, _copy(items))

  def _write(self, step: int, meta: dict[str, Any], items: dict[str, Any]) -> None:
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

  def _ready(self, step: int, items: dict[str, Any]) -> bool:
    """Tells whether to save: not what is saved already, and not where a host cannot.

    One that could not would keep the others waiting in Orbax. And a full disk that Orbax itself finds, midway, leaves
    threads that fill the log.
    """
    problem = None
    if storage.in_bucket(self._directory):
      if self._broken:
        problem = storage.problem(self._directory)
    else:
      needed = sum(leaf.nbytes for leaf in jax.tree.leaves(items)) + _ROOM_FOR_FILES
      free = shutil.disk_usage(self._directory).free
      if free < needed:
        problem = (
          f"{os.strerror(errno.ENOSPC)}: {free / 2**20:.0f} MiB free, {needed / 2**20:.0f} needed"
        )
    hosts = self._pod.gather(f"save of step {step}", [self._broken, problem])
    problem = _first_problem({host: theirs for host, (_, theirs) in hosts.items()})
    if any(broken for broken, _ in hosts.values()) and not problem:
      self._broken, mine = True, None  # of one, of all: they open new managers together
      self._close_manager()
      try:
        self._manager = self._open_manager()
        self._newest = self._manager.latest_step()
      except Exception as error:
        mine = storage.first_line(error)
      problem = _first_problem(self._pod.gather(f"checkpoints opened again for step {step}", mine))
      self._broken = bool(problem)
    if step in self._manager.all_steps():
      return False
    self._last_time, self._retry_time = time.monotonic(), None
    if not storage.in_bucket(self._directory):
      self._clear_torn()
    if problem:
      self._save_failed(step, problem)
    return not problem

  def poll(self, wait: bool = False) -> None:
    """Takes note of how the save in flight ended, if it has; with `wait`, when it has."""
    if self._in_flight is None or not (wait or self._in_flight[1].done()):
      return
    (step, written), self._in_flight = self._in_flight, None
    try:
      written.result()
      self._newest = step
    except Exception as error:  # those of a bucket are of many kinds
      self._broken = True
      self._save_failed(step, storage.first_line(error))

  def _save_failed(self, step: int, reason: str) -> None:
    self._retry_time = time.monotonic() + self._config.checkpoint.retry_seconds
    logging.error(
      "The checkpoint of step %d could not be saved (%s). Training goes on and tries again in %g s; "
      "the newest whole checkpoint is that of step %s.",
      step,
      reason,
      self._config.checkpoint.retry_seconds,
      self._newest,
    )

  def _clear_torn(self) -> None:
    """Removes what failed saves left on a disk, for its room; called when none is in flight."""
    if self._pod.host == 0:
      for torn in self._directory.glob("*.orbax-checkpoint-tmp*"):
        torn.rmtree(missing_ok=True)

  def save_and_wait(self, step: int, state: TrainState, meta: dict[str, Any]) -> None:
    """Saves unless this step is saved already, and returns when the checkpoint is whole.

    Raises:
      CheckpointError: if it could not be written.
    """
    for _ in range(2):  # one that has just failed is worth another try, as nothing comes after it
      self.save(step, state, meta)
      self.poll(wait=True)
    if self._newest != step:
      raise CheckpointError(
        f"The checkpoint of step {step} could not be written to {self._directory}; the newest whole "
        f"one is that of step {self._newest}. Make room or mend the folder, then run again."
      )

  def restore_newest(self, abstract_state: TrainState) -> tuple[TrainState, dict[str, Any]] | None:
    """Restores the newest checkpoint that is whole and true, setting aside those that are not.

    Args:
      abstract_state: shapes, dtypes and shardings of the state.

    Returns:
      The state, placed as asked, and its meta; None if there is no checkpoint.

    Raises:
      ConfigError: if the checkpoint belongs to another config.
      StorageError: if the storage cannot be read at all.
    """
    for step in sorted(self._manager.all_steps(), reverse=True):
      self._pod.at(f"restore of step {step}")
      damage = ""
      try:
        state, meta = self._restore(step, abstract_state)
      except ConfigError:
        raise
      except Exception as error:
        cause = error.__cause__ or error  # Orbax wraps what TensorStore says in a bare Exception
        unreachable = storage.is_failure(cause) or any(word in str(cause) for word in _UNREACHABLE)
        if not isinstance(cause, _DAMAGE) and not unreachable:
          raise
        if unreachable and not isinstance(cause, _LOST):
          raise StorageError(
            f"Checkpoint {self._directory / str(step)} cannot be read now: "
            f"{storage.first_line(cause)}."
          ) from error
        damage = storage.first_line(cause)
      # Good on one host is not good enough: all go on from the same step.
      damage = next(filter(None, self._pod.gather(f"step {step} is restored", damage).values()), "")
      if damage:
        self._set_aside(step, damage)
        continue
      if meta.get("best"):
        self.set_best(meta["best"]["step"])
      return state, meta
    return None

  def _restore(self, step: int, abstract_state: TrainState) -> tuple[TrainState, dict[str, Any]]:
    meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
    if meta.get("digest") != _digest(meta):
      raise ValueError("its meta item does not match its digest")
    if meta["format"] != FORMAT:
      raise ConfigError(
        f"{self._directory / str(step)} has format {meta['format']}, this version reads {FORMAT}."
      )
    config_lib.check_same_run(meta["config"], self._config, str(self._workdir.path))
    abstract = {
      name: getattr(abstract_state, name)
      for name in _ITEMS
      if getattr(abstract_state, name) is not None
    }
    items = dict(
      self._manager.restore(
        step,
        args=ocp.args.Composite(
          **{name: ocp.args.StandardRestore(item) for name, item in abstract.items()}
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
    return abstract_state.replace(step=step_array, **items), meta

  def _set_aside(self, step: int, reason: str) -> None:
    source, target = (
      self._directory / str(step),
      self._workdir.damaged / f"{step}-{int(time.time())}",
    )
    if self._pod.host == 0:
      storage.move_folder(source, target)
    self._pod.gather(f"step {step} set aside", "")
    self._manager.reload()
    self._newest = self._manager.latest_step()
    logging.error(
      "Checkpoint %s is damaged: %s. It is set aside as %s; the one before it is taken.",
      source,
      reason,
      target,
    )

  def close(self) -> None:
    """Waits for the save in flight and frees Orbax's threads."""
    self.poll(wait=True)
    self._thread.shutdown()
    self._close_manager()

  def _close_manager(self) -> None:
    # What once failed in its background a manager raises again on close; `_save_failed` has told it.
    with contextlib.suppress(Exception) if self._broken else contextlib.nullcontext():
      self._manager.close()


@jax.jit
def _copy(tree: Any) -> Any:
  return jax.tree.map(jax.numpy.copy, tree)


def _digest(meta: dict[str, Any]) -> str:
  content = {key: value for key, value in meta.items() if key != "digest"}
  return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _first_problem(by_host: dict[int, str | None]) -> str | None:
  host, problem = next(((host, problem) for host, problem in by_host.items() if problem), (0, None))
  return f"host {host}: {problem}" if problem and len(by_host) > 1 else problem
