"""Checks a config once at start, and turns durations into steps in one place."""

from collections.abc import Mapping
import dataclasses
from typing import Any

import jax
import ml_collections

from configs import base, checks, image_sizes, trial
from configs.fields import ASK, NO, YES, Field
from input_pipeline import augment as host_augment
from input_pipeline import sources
from input_pipeline.errors import DataError
from input_pipeline.sources import slices
from trainer import augment, averages, losses, models, optimizer, schedules
from trainer.errors import ConfigError
from trainer.sparse import method as sparse_lib
from trainer.state import Tree

# Changes of a config against that of a checkpoint: {field: [before, now]}.
Changes = dict[str, list[Any]]
flatten = checks.flatten
_MOST_CLASSES = 4096  # whose pairs are counted: 64 MiB on each device


@dataclasses.dataclass(frozen=True)
class Durations:
  """The durations of a config in steps of its batch size.

  Attributes:
    total: steps of the whole run.
    warmup: steps of the linear warm-up.
    eval_every: steps between evaluations; 0 is only at the end.
    checkpoint_every: steps between periodic checkpoints; 0 is none by steps.
    per_epoch: steps of an epoch, a fraction where the batch does not divide the examples.
    ema_start: steps before which averaged weights are copies.
    uncut_warmup: what the config asks for, where that is longer than the run; else 0.
    augment: steps until images are augmented on the devices; 0 is the whole run.
    offset: added to the steps taken, gives the steps that all of the above count: where a resume
      has changed the batch size, earlier steps were of another size.
    sizes: (step, size of training images in pixels from it on), rising from step 0.
  """

  total: int
  warmup: int
  eval_every: int
  checkpoint_every: int
  per_epoch: float
  augment: int = 0
  offset: int = 0
  sizes: tuple[tuple[int, int], ...] = ()
  ema_start: int = 0
  uncut_warmup: int = 0

  @property
  def last(self) -> int:
    """The steps taken at the end of the run."""
    return self.total - self.offset

  @property
  def augment_until(self) -> int | None:
    """The steps taken from which on images are not augmented on the devices; None is never."""
    return self.augment - self.offset if self.augment else None

  def epoch(self, step: int) -> float:
    """Return the epochs after `step` steps taken."""
    return (step + self.offset) / self.per_epoch

  def image_size(self, step: int) -> int:
    """Return the size of the images of the batch that follows `step` steps taken."""
    return image_sizes.at(self.sizes, step + self.offset)

  def is_evaluated(self, step: int) -> bool:
    """Whether an evaluation is due after `step` steps taken."""
    periodic = self.eval_every and (step + self.offset) % self.eval_every == 0
    return bool(periodic) or step >= self.last

  def evaluations_after(self, step: int) -> int:
    """Return how many evaluations are due after more than `step` steps taken."""
    if step >= self.last:
      return 0
    every = self.eval_every or self.total
    return (self.total - 1) // every - (step + self.offset) // every + 1


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> Changes:
  """Return the fields in which two configs differ, both as `to_dict()` or JSON give them."""
  return _changes(*(flatten(ml_collections.ConfigDict(config)) for config in (before, now)))


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> Changes:
  pairs = {name: [old.get(name), new.get(name)] for name in sorted(old.keys() | new.keys())}
  return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def in_words(changes: Changes) -> str:
  """Return changes as 'config.seed: 0 -> 3, config.loss: ...'."""
  return ", ".join(f"config.{name}: {old!r} -> {new!r}" for name, (old, new) in changes.items())


def fields_of(config: ml_collections.ConfigDict) -> dict[str, Field]:
  """Return every field that the config may have, by its model family.

  Raises:
    ConfigError: if there is no such family.
  """
  try:
    models.family_of(config.model)
    return base.all_fields(config.model.name)
  except (AttributeError, ValueError) as error:
    raise ConfigError(str(error)) from error


def validate(config: ml_collections.ConfigDict) -> None:
  """Refuse a config that can run nowhere; touches no device.

  Raises:
    ConfigError: naming the first field that is unknown, missing, of another type than its default,
      or out of its range, or the fields that do not fit together.
  """
  fields, values = fields_of(config), flatten(config)
  try:
    checks.check(config)
  except ValueError as error:
    raise ConfigError(str(error)) from error
  if values["model.dtype"] == "float64" and not jax.config.read("jax_enable_x64"):
    raise ConfigError(
      "config.model.dtype is float64, for which JAX must be started with JAX_ENABLE_X64=1."
    )
  _check_evaluation(values)
  for name in allowed_names(values["resume.allow"]):
    _check_allowed(name, fields, config.model.name)
  try:
    models.check(config.model)
    losses.make_loss(config.loss)
    optimizer.check(config)
    schedules.check(config)
    averages.check(config)
    sparse_lib.check(config)
    augment.check(config)
    sources.check_kind(config.data.kind)
    image_sizes.parse(config.data.image_sizes)
    for of, size in _image_sizes(config):
      models.check_image(config.model, name=f"config.data.{of}", size=size, space=config.mesh.space)
    slices.parse(config.data.train_split, "config.data.train_split")
    slices.several(config.data.eval_split, "config.data.eval_split")
    host_augment.parse(config.data.operations)
  except (ValueError, DataError) as error:
    raise ConfigError(str(error)) from error


def _image_sizes(config: ml_collections.ConfigDict) -> list[tuple[str, int]]:
  """Return (field of config.data, pixels) of all sizes of images."""
  train = "image_sizes" if config.data.image_sizes else "image_size"
  sizes = [(train, size) for size in image_sizes.distinct(config.data)]
  return [*sizes, ("eval_image_size", config.data.eval_image_size)]


def _check_evaluation(values: Mapping[str, Any]) -> None:
  averaged = values["optimizer.ema_decay"]
  if values["eval.raw"] and not averaged:
    raise ConfigError(
      "config.eval.raw is True, but no weights are averaged; set config.optimizer.ema_decay, or "
      "config.eval.raw to False."
    )
  if values["eval.per_class"] and values["model.num_classes"] > _MOST_CLASSES:
    raise ConfigError(
      f"config.eval.per_class counts all pairs of at most {_MOST_CLASSES} classes; "
      f"config.model.num_classes is {values['model.num_classes']}: set it to False."
    )
  count, batch = values["eval.precise_bn_examples"], values["eval.batch_size"]
  if count % batch:
    raise ConfigError(
      f"config.eval.precise_bn_examples is {count}, which must be a multiple of "
      f"config.eval.batch_size = {batch}; the nearest is {max(1, round(count / batch)) * batch}."
    )
  if count and averaged and values["optimizer.ema_batch_stats"]:
    raise ConfigError(
      f"config.eval.precise_bn_examples is {count}, but config.optimizer.ema_batch_stats averages "
      "the BN statistics that it would replace; set ema_batch_stats to False, or the other to 0."
    )


def allowed_names(allow: str) -> list[str]:
  """Return the fields and sections that `config.resume.allow` names."""
  return [name.strip().removeprefix("config.") for name in allow.split(",") if name.strip()]


def _check_allowed(name: str, fields: Mapping[str, Field], family: str) -> None:
  section = [field for key, field in fields.items() if key.startswith(f"{name}.")]
  if not section and name not in fields:
    raise ConfigError(
      f"config.resume.allow names {name}, which {checks.not_a_field(name, fields, family)}"
    )
  if not section and fields[name].resume == NO:
    raise ConfigError(
      f"config.resume.allow names {name}, which no resume may change: the saved numbers would mean "
      "something else, or not fit."
    )


def mesh_shape(mesh: ml_collections.ConfigDict, num_devices: int) -> tuple[int, int, int]:
  """Return the number of devices along (data, fsdp, space) that `config.mesh` asks for.

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
  """Refuse batches, images and fields of the model that do not split evenly over the devices.

  Args:
    config: a validated config.
    num_devices: devices of all hosts.

  Raises:
    ConfigError: naming the field, and the nearest value that fits where there is one.
  """
  data, fsdp, space = mesh_shape(config.mesh, num_devices)
  if config.sharding.params == "fsdp" and fsdp == 1:
    raise ConfigError("config.sharding.params is fsdp, which needs config.mesh.fsdp above 1.")
  for field, size in _image_sizes(config):
    if size % space:
      has = "has" if field == "image_sizes" else "is"
      raise ConfigError(
        f"config.data.{field} {has} {size}, which config.mesh.space = {space} does not divide."
      )
  shards, steps = data * fsdp, config.accumulation_steps
  for field, size, parts in (
    ("global_batch_size", config.global_batch_size, shards * steps),
    ("eval.batch_size", config.eval.batch_size, shards),
  ):
    if size % parts:
      factors = [f"{num_devices} devices"] if num_devices > 1 else []
      if space > 1:
        factors[0] += f" (config.mesh.space = {space} share an example)"
      if parts != shards:
        factors.append(f"config.accumulation_steps = {steps}")
      do = "do" if num_devices > 1 else "does"
      raise ConfigError(
        f"config.{field} is {size}, which {' times '.join(factors)} {do} not divide; the nearest "
        f"that fits is {max(1, round(size / parts)) * parts}."
      )
  try:
    models.family_of(config.model).check_split(
      models.own_fields(config.model), examples=config.global_batch_size // steps, shards=shards
    )
  except ValueError as error:
    raise ConfigError(str(error)) from error


def check_precise_bn(
  config: ml_collections.ConfigDict, train_source: sources.Source, batch_stats: Tree
) -> None:
  """Refuse precise BN that the examples or the model cannot have.

  Args:
    config: a validated config.
    train_source: what the run is trained on.
    batch_stats: of the model; may be abstract.

  Raises:
    ConfigError: naming the field.
  """
  count = config.eval.precise_bn_examples
  if not count:
    return
  field = f"config.eval.precise_bn_examples is {count}"
  paths = [path for path, _ in jax.tree.leaves_with_path(batch_stats)]
  if not paths or {str(path[-1].key) for path in paths} != {"mean", "var"}:
    raise ConfigError(
      f"{field}, but the model family {config.model.name} has no batch norm; set it to 0."
    )
  if count > len(train_source):
    raise ConfigError(
      f"{field}, more than the {len(train_source)} examples of config.data.train_split; set it to "
      f"{len(train_source) // config.eval.batch_size * config.eval.batch_size} or less."
    )
  if not train_source.indexed:
    raise ConfigError(
      f"{field}, which needs data that can be read in batches of any examples, and parquet cannot; "
      "set it to 0, or make shards with `python -m input_pipeline.prepare --from`."
    )


def durations(config: ml_collections.ConfigDict, num_examples: int, offset: int = 0) -> Durations:
  """Turn every `*_epochs` and `*_steps` of the config into steps.

  Args:
    config: a validated config.
    num_examples: examples of the training split.
    offset: see Durations.

  A run whose length is in steps may be shorter than a warm-up in epochs, as a trial of a few steps
  is: its warm-up is then a tenth of it.

  Raises:
    ConfigError: if the run would have no step, or a warm-up longer than itself.
  """
  per_epoch = num_examples / config.global_batch_size

  def of_epochs(epochs: float) -> int:
    return max(1, round(epochs * per_epoch)) if epochs else 0

  def steps(section: ml_collections.ConfigDict, name: str) -> int:
    return of_epochs(section[f"{name}_epochs"]) or section[f"{name}_steps"]

  result = Durations(
    total=steps(config, "total"),
    warmup=steps(config.optimizer, "warmup"),
    eval_every=steps(config.eval, "every"),
    checkpoint_every=steps(config.checkpoint, "every"),
    per_epoch=per_epoch,
    augment=of_epochs(config.augment_until_epochs),
    offset=offset,
    # Of two points that fall on one step the later counts.
    sizes=tuple(
      {round(epoch * per_epoch): size for epoch, size in image_sizes.of(config.data)}.items()
    ),
    ema_start=round(config.optimizer.ema_start_epochs * per_epoch),
  )
  first, count = config.log.profile_step, config.log.profile_steps
  if first and first + count - 1 > result.total:
    raise ConfigError(
      f"config.log.profile_step is {first} and config.log.profile_steps {count}, which ends at "
      f"step {first + count - 1}; the run has only {result.total} steps."
    )
  if result.warmup >= result.total and config.total_steps and config.optimizer.warmup_epochs:
    return dataclasses.replace(
      result, warmup=result.total // trial.WARMUP, uncut_warmup=result.warmup
    )
  if result.warmup >= result.total:
    raise ConfigError(
      f"config.optimizer.warmup_* makes {result.warmup} steps, the whole run has {result.total}; "
      "the warm-up must be shorter."
    )
  return result


def check_same_run(
  saved: dict[str, Any], config: ml_collections.ConfigDict, workdir: str
) -> Changes:
  """Refuse to resume from checkpoints of a config that means something else.

  A field that the saved config lacks, because it was written by an earlier version, had its default
  then.

  Args:
    saved: `flatten` of the config that wrote the checkpoints.
    config: the config of this run.
    workdir: named in the message.

  Returns:
    What differs by leave of `config.resume.allow`.

  Raises:
    ConfigError: with every other field that differs and would change the meaning of the saved state
      or the order of data.
  """
  fields, values = fields_of(config), flatten(config)
  defaults = flatten(base.get_config(config.model.name))
  known = {name: defaults[name] for name in values if name in defaults} | saved
  changes = _changes(known, values)
  orders = [sources.order_of(v["data.kind"], v["data.path"]) for v in (saved, values)]
  if orders[0] != orders[1]:
    then, now = (sources.ORDERS.get(order, order) for order in orders)
    raise ConfigError(
      f"{workdir} holds checkpoints of a run whose examples are {then}; those of this config are "
      f"{now}. Give the config.data.kind and config.data.path of that run, or another --workdir."
    )
  rules = {name: fields[name].resume if name in fields else NO for name in changes}
  allowed = tuple(allowed_names(config.resume.allow))
  asked = [
    name
    for name, rule in rules.items()
    if rule == ASK and not any(name == a or name.startswith(f"{a}.") for a in allowed)
  ]
  never = [name for name, rule in rules.items() if rule == NO]
  if asked or never:
    listed = in_words({name: changes[name] for name in [*never, *asked]})
    advice = "use another --workdir, or the config that this one was started with"
    if not never:
      advice += f"; to make another run of it from here on: --config.resume.allow={','.join(asked)}"
    raise ConfigError(f"{workdir} holds checkpoints of another config ({listed}); {advice}.")
  largest = [_largest_image(config) for config in (known, values)]
  if largest[0] != largest[1] and not models.same_leaves(config.model, *largest):
    raise ConfigError(
      f"{workdir} holds checkpoints of images of {largest[0]} px; for {largest[1]} px the family "
      f"{config.model.name} has leaves of other shapes: begin another run, with "
      f"config.init_from={workdir}."
    )
  return {name: pair for name, pair in changes.items() if rules[name] != YES}


def _largest_image(values: Mapping[str, Any]) -> int:
  """Return the largest size of training images of a flat config."""
  points = image_sizes.parse(values["data.image_sizes"])
  return max([size for _, size in points] or [values["data.image_size"]])
