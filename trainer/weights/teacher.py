"""Reads the teacher of a run: `config.distill.teacher`; see trainer/distill.py."""

from collections.abc import Sequence

from absl import logging
import ml_collections

from configs import image_sizes
from trainer import config as config_lib
from trainer import data as data_lib
from trainer import models
from trainer.distill import Teacher
from trainer.errors import ConfigError
from trainer.pod.pod import Pod
from trainer.weights import net as net_lib
from trainer.weights import read as read_lib
from trainer.weights import start
from trainer.weights.errors import WeightsError


def read_everywhere(
  config: ml_collections.ConfigDict, classes: Sequence[str], pod: Pod
) -> Teacher | None:
  """Read the teacher on every host; all get the same, or all end.

  Args:
    config: a validated config.
    classes: of the data, names by label.
    pod: this host among the others.

  Returns:
    None if the config has none.

  Raises:
    TrainerError: as `read`, and if its classes are not those of the data.
  """
  if not config.distill.weight:
    return None
  field, origin = "config.distill.teacher", _origin(config)
  teacher = start.on_all_hosts(
    pod, field, origin, lambda: read(config), lambda teacher: teacher.digest
  )
  if not teacher.classes:
    logging.warning("%s=%s has no names of classes; they are not compared.", field, origin)
  elif trouble := data_lib.other_classes(teacher.classes, classes):
    raise ConfigError(
      f"{field}={origin} has learnt other classes than those of the data: {trouble}. Give a "
      "teacher of the same classes in the same order."
    )
  return teacher


def read(config: ml_collections.ConfigDict) -> Teacher:
  """Return the teacher of a config that has one, with averaged weights where there are any.

  A net whose weights follow from the image size, a Vision Transformer, is brought to the one of
  this run.

  Raises:
    TrainerError: one sentence: there is none, it cannot be read, has another number of classes, or
      cannot take the images.
  """
  origin, sizes = _origin(config), image_sizes.distinct(config.data)
  net, leaves, about = read_lib.read_model(origin)
  theirs = ml_collections.ConfigDict(net.config.to_dict())
  theirs.data.image_size, theirs.data.image_sizes = max(sizes), ""
  if theirs.model.num_classes != config.model.num_classes:
    raise WeightsError(
      f"{origin} has {theirs.model.num_classes:,} classes, this run has "
      f"{config.model.num_classes:,}; give a teacher of the same classes."
    )
  family = models.family_of(theirs.model)
  try:
    for size in sizes:
      models.check_image(
        theirs.model, name="config.data.image_size", size=size, space=config.mesh.space
      )
  except ValueError as error:
    raise ConfigError(f"{origin} cannot be the teacher: {error}") from error
  if len(sizes) > 1 and not family.RESIZES and not models.same_leaves(theirs.model, *sizes):
    raise ConfigError(
      f"{origin} has parameters that depend on the image size, which config.data.image_sizes "
      "changes; give one config.data.image_size, or another teacher."
    )
  net = net_lib.build(theirs, theirs.model.dtype)
  fitted = {}
  for name, like in net.leaves.items():
    resized = net.resized(name, leaves[name])
    fitted[name] = leaves[name] if resized is None else resized
    if fitted[name].shape != like.shape:
      raise WeightsError(f"{origin} cannot take images of {max(sizes)} px, for its {name}.")
  return Teacher(
    origin,
    theirs,
    net.model,
    net.variables(fitted),
    about.classes,
    # In an order that a workdir and a file made from it have in common.
    read_lib.digest(dict(sorted(leaves.items()))),
  )


def _origin(config: ml_collections.ConfigDict) -> str:
  """Return where the weights of the teacher are.

  Raises:
    ConfigError: if the config does not say.
  """
  if origin := config.distill.teacher:
    return str(origin)
  raise ConfigError(
    f"config.distill.weight is {config.distill.weight:g}, but config.distill.teacher names no "
    "teacher; give its workdir, or set the weight to 0."
  )


def check_same(
  saved: str | None, teacher: Teacher | None, config: ml_collections.ConfigDict, workdir: str
) -> None:
  """Refuse to resume with other weights of the teacher than the checkpoints were made with.

  Args:
    saved: their digest; None of a run without a teacher.
    teacher: of this start.
    config: of this start.
    workdir: named in the message.

  Raises:
    ConfigError: one sentence.
  """
  allowed = {"distill", "distill.teacher"}.intersection(
    config_lib.allowed_names(config.resume.allow)
  )
  # Whether there is a teacher at all is a matter of config.distill.weight.
  if saved and teacher and saved != teacher.digest and not allowed:
    raise ConfigError(
      f"{workdir} holds checkpoints of a run that learnt from other weights than those that "
      f"config.distill.teacher={teacher.origin} has now; give the same, or another --workdir; to "
      "go on with these: --config.resume.allow=distill.teacher."
    )
