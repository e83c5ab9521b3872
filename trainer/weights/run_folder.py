"""Weights of a workdir: read from its checkpoints, or written as the first one of a new run."""

from collections.abc import Mapping
import contextlib
import dataclasses
import json
from typing import Any

from absl import logging
from etils import epath
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import orbax.checkpoint as ocp

from trainer import config as config_lib
from trainer import mesh
from trainer import program as program_lib
from trainer.errors import TrainerError
from trainer.pod.pod import Pod
from trainer.reporting.clock import WallClock
from trainer.state import Tree, Variables, fingerprints
from trainer.weights import net as net_lib
from trainer.weights.about import About
from trainer.weights.errors import WeightsError, unreadable
from trainer.workdir import storage
from trainer.workdir.checkpoint import Checkpointer
from trainer.workdir.files import open_workdir, read_json, write_json
from trainer.workdir.paths import Workdir

_COLLECTIONS = ("params", "batch_stats", "others")


def is_one(path: epath.Path) -> bool:
  """Whether a path is a folder, and so the workdir of a run."""
  return path.is_dir()


def read(path: str, averaged: bool) -> tuple[net_lib.Net, net_lib.Leaves, About]:
  """Return the model of a workdir, its leaves at the newest whole checkpoint, and what is known.

  Args:
    path: folder, local or gs://.
    averaged: whether averages over steps are taken where the run keeps them.

  Raises:
    WeightsError: if there is no checkpoint that can be read, or their storage is silent.
    NoDevices: if JAX cannot use the devices that it is asked for.
  """
  mesh.device_count()
  workdir = Workdir(storage.path_of(path))
  try:
    steps = sorted(_steps(workdir.checkpoints), reverse=True)
  except Exception as error:
    if not storage.is_failure(error):
      raise
    raise unreadable(path, error) from error
  if not steps:
    raise WeightsError(
      f"{path} holds no checkpoint; give the --workdir of a run that has saved one, or a file."
    )
  for step in steps:
    try:
      return _read_step(workdir, step, averaged)
    except TrainerError:
      raise
    # What Orbax raises on damaged checkpoints; it wraps errors of TensorStore in a bare Exception.
    except Exception as error:
      if lost := storage.lost(error):  # which says nothing about the checkpoint
        raise unreadable(path, lost) from error
      reason = storage.first_line(error.__cause__ or error)
      logging.warning("Checkpoint %s cannot be read: %s.", workdir.checkpoints / str(step), reason)
  raise WeightsError(
    f"None of the checkpoints of {path} can be read ({reason}); see python -m trainer.report {path}"
  )


def _steps(checkpoints: epath.Path) -> list[int]:
  if not checkpoints.is_dir():
    return []
  return [int(entry.name) for entry in checkpoints.iterdir() if entry.name.isdigit()]


def _read_step(
  workdir: Workdir, step: int, averaged: bool
) -> tuple[net_lib.Net, net_lib.Leaves, About]:
  folder = workdir.checkpoints / str(step)
  meta = json.loads((folder / "meta" / "metadata").read_text())
  items: dict[str, Tree] = {
    name: _item(folder / name) for name in (*_COLLECTIONS, "ema") if (folder / name).exists()
  }
  wrong = [
    name for name, value in fingerprints(items).items() if meta["fingerprints"].get(name) != value
  ]
  if wrong or not items.get("params"):
    raise ValueError(f"the hash of {wrong[0] if wrong else 'params'} is not the one that was saved")
  averages = items.pop("ema", None) if averaged else None
  items.pop("ema", None)
  collections = {name: items.get(name, {}) for name in _COLLECTIONS} | (averages or {})
  leaves = net_lib.flatten(Variables(*[collections[name] for name in _COLLECTIONS]))
  net = net_lib.build(net_lib.config_of(meta["config"]))
  if leaves.keys() != net.leaves.keys():
    raise WeightsError(
      f"{folder} holds other leaves than {net.describe()} has; it is of another version."
    )
  classes = read_json(workdir.classes, {"classes": list}) or {}
  facts = About(
    classes=tuple(map(str, classes.get("classes", ()))),
    config=meta["config"],
    step=step,
    weights="ema" if averages else "raw",
    top1=_top1(workdir, meta, step),
  )
  return net, {name: jax.device_get(leaf) for name, leaf in leaves.items()}, facts


def _item(path: epath.Path) -> Tree:
  """Return a tree of a checkpoint in the memory of this host, whatever mesh has written it."""
  handler = ocp.StandardCheckpointHandler()
  with contextlib.closing(handler):
    shapes = jax.tree.map(
      lambda leaf: np.empty(leaf.shape, leaf.dtype), handler.metadata(path).tree
    )
    return handler.restore(path, args=ocp.args.StandardRestore(shapes))


def _top1(workdir: Workdir, meta: Mapping[str, Any], step: int) -> float | None:
  """Return the accuracy of a step, if it was evaluated and is written down."""
  results = [read_json(workdir.evaluation), read_json(workdir.final), meta.get("best")]
  return next((r["top1"] for r in results if r and r.get("step") == step and "top1" in r), None)


def write(
  path: str,
  config: ml_collections.ConfigDict,
  net: net_lib.Net,
  leaves: Mapping[str, Any],
  classes: tuple[str, ...],
) -> None:
  """Write a workdir whose only checkpoint is of step 0 and has these leaves.

  `python -m trainer --mode=eval` evaluates it. A training that is started in it begins with these
  weights, at step 0 and with a new optimizer.

  Args:
    path: folder, local or gs://, without checkpoints.
    config: validated config of the run.
    net: its model.
    leaves: by path.
    classes: names by label, or nothing.

  Raises:
    WeightsError: if there are checkpoints already, or this one could not be written.
  """
  with Pod(config.pod, host=0, hosts=1) as pod:  # alone, also on a host of a slice
    folder = Workdir(open_workdir(path, pod))
    if _steps(folder.checkpoints):
      raise WeightsError(f"{path} holds checkpoints already; give another --workdir.")
    program = _program(config)
    like = Variables(*[getattr(program.abstract_state, name) for name in _COLLECTIONS])
    variables = jax.tree.map(lambda x, y: jnp.asarray(x, y.dtype), net.variables(leaves), like)
    # Not by `program.init`, which would be compiled to draw weights that nobody wants.
    state = dataclasses.replace(
      program.abstract_state,
      step=jnp.int32(0),
      **variables._asdict(),
      opt_state=jax.jit(program.optimizer.init)(variables.params),
      ema=program.abstract_state.ema and _averages(program.abstract_state.ema, variables),
    )
    if program.sparse:
      masks = program.sparse.of_weights(state.params)
      state = program.sparse.started(state, program.optimizer, masks)
    checkpointer = Checkpointer(pod, folder.path, config, every_steps=0)
    try:
      checkpointer.save_and_wait(
        0,
        state,
        {
          "best": None,
          "wall_seconds": WallClock().read(),
          "positions": None,
          "offset": 0,
          "history": [],
        },
      )
    finally:
      checkpointer.close()
    write_json(folder.config, config.to_dict())
    if classes:
      write_json(folder.classes, {"classes": list(classes)})


def _averages(shapes: dict[str, Any], variables: Variables) -> dict[str, Any]:
  """Return averages that begin with these variables; what else there is begins at zero."""
  zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
  return {name: getattr(variables, name, value) for name, value in zeros.items()}


def _program(config: ml_collections.ConfigDict) -> program_lib.Program:
  """Return the program of a config on one device; the length of the run plays no part in it."""
  short = ml_collections.ConfigDict(config.to_dict())
  short.mesh.data = short.mesh.fsdp = short.mesh.space = 1
  short.sharding.params = short.sharding.opt_state = "replicated"
  if "scan" in short.model:
    short.model.scan = False  # each leaf by itself, as in a checkpoint
  short.optimizer.warmup_epochs, short.optimizer.warmup_steps = 0.0, 0
  short.total_epochs, short.total_steps = 0.0, 1_000_000
  config_lib.validate(short)
  return program_lib.build(short, 1000 * short.global_batch_size, jax.devices()[:1])
