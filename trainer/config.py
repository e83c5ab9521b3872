"""Checks a config once at start, and turns durations into steps in one place."""

from collections.abc import Iterator
import dataclasses
import difflib
import json
import re
from typing import Any

import jax
import ml_collections

from configs import base
from input_pipeline import sources
from trainer import models
from trainer.errors import ConfigError

_AT_LEAST_0 = (lambda v: v >= 0, "must be 0 or more")
_COUNT_OR_AUTO = (lambda v: v >= -1, "must be 0 or more, or -1 to choose by the machine")
_AT_LEAST_1 = (lambda v: v >= 1, "must be 1 or more")
_POSITIVE = (lambda v: v > 0, "must be positive")
_SHARE = (lambda v: 0 <= v < 1, "must be in [0, 1)")


def _one_of(*names: str):
  return (lambda v: v in names, f"must be one of {', '.join(names)}")


_RANGES = {
  "seed": (lambda v: 0 <= v < 2**32, "must be in [0, 2**32)"),
  "global_batch_size": _AT_LEAST_1,
  "accumulation_steps": _AT_LEAST_1,
  "label_smoothing": _SHARE,
  "mesh.data": (lambda v: v == -1 or v >= 1, "must be 1 or more, or -1 for all that is left"),
  "mesh.fsdp": _AT_LEAST_1,
  "mesh.space": _AT_LEAST_1,
  "sharding.params": _one_of("replicated", "fsdp"),
  "sharding.opt_state": _one_of("replicated", "data"),
  "model.width": _POSITIVE,
  "model.num_classes": (lambda v: v >= 2, "must be 2 or more"),
  "model.dtype": _one_of("bfloat16", "float32", "float64"),
  "model.bn_momentum": _SHARE,
  "model.bn_epsilon": _POSITIVE,
  "model.bn_group": (
    lambda v: re.fullmatch("global|device|[1-9][0-9]*", v),
    "must be global, device or a number of examples",
  ),
  "data.kind": _one_of("auto", *sources.KINDS),
  "data.image_size": _AT_LEAST_1,
  "data.eval_image_size": _AT_LEAST_1,
  "data.eval_resize": _AT_LEAST_1,
  "data.crop_area": (
    lambda v: len(v) == 2 and 0 < v[0] <= v[1] <= 1,
    "must be (min, max) in (0, 1]",
  ),
  "data.crop_aspect": (
    lambda v: len(v) == 2 and 0 < v[0] <= v[1],
    "must be (min, max), both positive",
  ),
  "data.mean": (lambda v: len(v) == 3, "must have one number for each of R, G, B"),
  "data.std": (
    lambda v: len(v) == 3 and min(v) > 0,
    "must have one positive number for each of R, G, B",
  ),
  "data.workers": _COUNT_OR_AUTO,
  "data.threads": _COUNT_OR_AUTO,
  "data.prefetch_batches": _AT_LEAST_1,
  "data.hf_streams": _AT_LEAST_1,
  "data.hf_window": _AT_LEAST_1,
  "data.stream_lanes": _AT_LEAST_1,
  "data.stream_block": _AT_LEAST_1,
  "data.stream_window": _AT_LEAST_1,
  "data.stream_ahead_steps": _AT_LEAST_1,
  "data.stream_requests": _AT_LEAST_1,
  "data.stream_timeout_seconds": _POSITIVE,
  "data.stream_hedge_seconds": _POSITIVE,
  "data.stream_give_up_seconds": _POSITIVE,
  "data.max_bad_fraction": _SHARE,
  "data.synthetic_examples": _AT_LEAST_1,
  "optimizer.name": _one_of("sgd", "adamw"),
  "optimizer.lr_per_256": _POSITIVE,
  "optimizer.final_lr_fraction": (lambda v: 0 <= v <= 1, "must be in [0, 1]"),
  "optimizer.momentum": _SHARE,
  "optimizer.b1": _SHARE,
  "optimizer.b2": _SHARE,
  "optimizer.eps": _POSITIVE,
  "optimizer.weight_decay": _AT_LEAST_0,
  "optimizer.clip_norm": _AT_LEAST_0,
  "optimizer.ema_decay": _SHARE,
  "eval.batch_size": _AT_LEAST_1,
  "checkpoint.every_minutes": _AT_LEAST_0,
  "checkpoint.keep_last": _AT_LEAST_1,
  "checkpoint.retry_seconds": _AT_LEAST_0,
  "pod.start_seconds": _AT_LEAST_1,
  "pod.timeout_seconds": _AT_LEAST_1,
  "pod.stuck_seconds": _AT_LEAST_1,
  "log.every_steps": _AT_LEAST_1,
  "log.profile_step": _AT_LEAST_0,
  "log.profile_steps": _AT_LEAST_1,
}

_DURATIONS = ("total", "optimizer.warmup", "eval.every", "checkpoint.every")

# What may differ between a workdir's checkpoints and the run that goes on from them: none of it changes what the
# saved numbers mean or which batch comes next.
_MAY_CHANGE = (
  "compilation_cache",
  "mesh.",
  "sharding.",
  "data.path",
  "data.kind",
  "data.workers",
  "data.threads",
  "data.prefetch_batches",
  "data.stream_ahead_steps",
  "data.stream_requests",
  "data.stream_timeout_seconds",
  "data.stream_hedge_seconds",
  "data.stream_give_up_seconds",
  "data.max_bad_fraction",
  "data.eval_",
  "eval.",
  "checkpoint.",
  "pod.",
  "log.",
)


@dataclasses.dataclass(frozen=True)
class Durations:
  """The durations of a config in steps.

  Attributes:
    total: steps of the whole run.
    warmup: steps of the linear warm-up.
    eval_every: steps between evaluations; 0 is only at the end.
    checkpoint_every: steps between periodic checkpoints; 0 is none by steps.
    per_epoch: steps of an epoch, a fraction where the batch does not divide the examples.
  """

  total: int
  warmup: int
  eval_every: int
  checkpoint_every: int
  per_epoch: float


def flatten(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Returns {'model.depth': 50, ...} with tuples as lists, as JSON would give them back."""

  def walk(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
      if isinstance(value, dict):
        yield from walk(value, f"{prefix}{key}.")
      else:
        yield prefix + key, value

  return dict(walk(json.loads(json.dumps(config.to_dict())), ""))


def validate(config: ml_collections.ConfigDict) -> None:
  """Refuses a config that can run nowhere; touches no device.

  Raises:
    ConfigError: naming the first field that is unknown, missing, of another type than in `configs/base.py`, or out of
      its range.
  """
  values, defaults = flatten(config), flatten(base.get_config())
  for field in sorted(values.keys() - defaults.keys()):
    close = difflib.get_close_matches(field, defaults, n=1)
    raise ConfigError(
      f"config.{field} is not a field of configs/base.py"
      + (f"; did you mean config.{close[0]}?" if close else ".")
    )
  for field, default in defaults.items():
    if field not in values:
      raise ConfigError(
        f"config.{field} is missing; build the config on configs.base.get_config()."
      )
    _check_type(field, values[field], default)
    in_range, rule = _RANGES.get(field, (lambda v: True, ""))
    if not in_range(values[field]):
      raise ConfigError(f"config.{field} {rule}; it is {values[field]!r}.")
  for name in _DURATIONS:
    epochs, steps = values[f"{name}_epochs"], values[f"{name}_steps"]
    if epochs < 0 or steps < 0:
      raise ConfigError(f"config.{name}_epochs and config.{name}_steps must not be negative.")
    if epochs and steps:
      raise ConfigError(
        f"config.{name}_epochs is {epochs} and config.{name}_steps is {steps}; set one of them to 0."
      )
  if not values["total_epochs"] and not values["total_steps"]:
    raise ConfigError("config.total_epochs and config.total_steps are both 0; set one of them.")
  if values["model.dtype"] == "float64" and not jax.config.jax_enable_x64:
    raise ConfigError(
      "config.model.dtype is float64, for which JAX must be started with JAX_ENABLE_X64=1."
    )
  try:
    models.check(config.model)
  except ValueError as error:
    raise ConfigError(str(error)) from error


def mesh_shape(mesh: ml_collections.ConfigDict, num_devices: int) -> tuple[int, int, int]:
  """Returns the number of devices along (data, fsdp, space) that `config.mesh` asks for.

  Raises:
    ConfigError: if they do not make up `num_devices`.
  """
  data = num_devices // (mesh.fsdp * mesh.space) if mesh.data == -1 else mesh.data
  if data * mesh.fsdp * mesh.space != num_devices:
    raise ConfigError(
      f"config.mesh.data, config.mesh.fsdp and config.mesh.space are {mesh.data}, {mesh.fsdp} and "
      f"{mesh.space}, which do not make up the {num_devices} devices."
    )
  return data, mesh.fsdp, mesh.space


def check_split(config: ml_collections.ConfigDict, *, num_devices: int) -> None:
  """Refuses batches, images and BN groups that do not split evenly over the devices.

  Args:
    config: a validated config.
    num_devices: devices of all hosts.

  Raises:
    ConfigError: naming the field, and the nearest value that fits where there is one.
  """
  data, fsdp, space = mesh_shape(config.mesh, num_devices)
  if config.sharding.params == "fsdp" and fsdp == 1:
    raise ConfigError("config.sharding.params is fsdp, which needs config.mesh.fsdp above 1.")
  for field in ("image_size", "eval_image_size"):
    if config.data[field] % space:
      raise ConfigError(
        f"config.data.{field} is {config.data[field]}, which config.mesh.space = {space} does not divide."
      )
  shards, steps = data * fsdp, config.accumulation_steps
  for field, size, parts in (
    ("global_batch_size", config.global_batch_size, shards * steps),
    ("eval.batch_size", config.eval.batch_size, shards),
  ):
    if size % parts:
      what = f"{num_devices} devices" + (
        f" (config.mesh.space = {space} share an example)" if space > 1 else ""
      )
      what += f" times config.accumulation_steps = {steps}" if parts != shards else ""
      raise ConfigError(
        f"config.{field} is {size}, which {what} do not divide; the nearest that fits is "
        f"{max(1, round(size / parts)) * parts}."
      )
  if config.model.bn_group.isdigit():
    examples, group = config.global_batch_size // steps, int(config.model.bn_group)
    if examples % group:
      raise ConfigError(
        f"config.model.bn_group is {group}, which does not divide the {examples} examples of a "
        f"{'micro-' if steps > 1 else ''}batch."
      )
    groups = examples // group
    if max(groups, shards) % min(groups, shards):
      raise ConfigError(
        f"config.model.bn_group is {group}, which makes {groups} groups that do not lie evenly on the "
        f"{shards} parts that the batch is split in over config.mesh.data and config.mesh.fsdp."
      )


def _check_type(field: str, value: Any, default: Any) -> None:
  expected = (int, float) if isinstance(default, float) else type(default)
  if isinstance(value, bool) != isinstance(default, bool) or not isinstance(value, expected):
    raise ConfigError(
      f"config.{field} must be of type {type(default).__name__}; "
      f"it is {value!r} of type {type(value).__name__}."
    )
  if isinstance(default, list) and not all(isinstance(v, (int, float)) for v in value):
    raise ConfigError(f"config.{field} must hold numbers; it is {value!r}.")


def durations(config: ml_collections.ConfigDict, num_examples: int) -> Durations:
  """Turns every `*_epochs` and `*_steps` of the config into steps.

  Args:
    config: a validated config.
    num_examples: examples of the training split.

  Raises:
    ConfigError: if the run would have no step, or a warm-up longer than itself.
  """
  per_epoch = num_examples / config.global_batch_size

  def steps(section: ml_collections.ConfigDict, name: str) -> int:
    epochs = section[f"{name}_epochs"]
    return max(1, round(epochs * per_epoch)) if epochs else section[f"{name}_steps"]

  result = Durations(
    total=steps(config, "total"),
    warmup=steps(config.optimizer, "warmup"),
    eval_every=steps(config.eval, "every"),
    checkpoint_every=steps(config.checkpoint, "every"),
    per_epoch=per_epoch,
  )
  if result.warmup >= result.total:
    raise ConfigError(
      f"config.optimizer.warmup_* makes {result.warmup} steps, the whole run has {result.total}; "
      "the warm-up must be shorter."
    )
  return result


def check_same_run(saved: dict[str, Any], config: ml_collections.ConfigDict, workdir: str) -> None:
  """Refuses to go on from checkpoints of a config that means something else.

  Args:
    saved: `flatten` of the config that wrote the checkpoints.
    config: the config of this run.
    workdir: named in the message.

  Raises:
    ConfigError: with every differing field that would change the meaning of the saved state or the order of data.
  """
  values = flatten(config)
  differ = [
    field
    for field in sorted(saved.keys() | values.keys())
    if saved.get(field) != values.get(field) and not field.startswith(_MAY_CHANGE)
  ]
  orders = [sources.order_of(v.get("data.kind"), v.get("data.path")) for v in (saved, values)]
  if orders[0] != orders[1]:
    then, now = (sources.ORDERS.get(order, order) for order in orders)
    raise ConfigError(
      f"{workdir} holds checkpoints of a run whose examples are {then}; those of this config are "
      f"{now}. Give the --config.data.kind and --config.data.path of that run, or another --workdir."
    )
  if differ:
    changes = ", ".join(
      f"config.{field}: {saved.get(field)!r} -> {values.get(field)!r}" for field in differ
    )
    raise ConfigError(
      f"{workdir} holds checkpoints of another config ({changes}); "
      "use another --workdir, or the config that this one was started with."
    )
