"""Learning from another net, the teacher: `config.distill`.

Both nets see the same images, mixed and erased as `config.augment` says, so that the student learns
the function that the teacher is (arXiv:2106.05237). The teacher computes as in evaluation. Its
weights are an argument of the training step, never part of the state: a checkpoint holds their
digest alone. They are read by trainer/weights/teacher.py.
"""

from collections.abc import Callable
import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
import ml_collections
import optax

from trainer import mesh as mesh_lib
from trainer import models
from trainer.losses import Loss
from trainer.state import Model, Variables

# The temperature-scaled divergence from the teacher, and the share of examples, as the step has
# mixed them, for which both nets find the same class the most probable.
METRICS = ("distill_loss", "agreement")

# (logits, targets, images that the student has seen, weights of the teacher)
# -> loss of each example, and METRICS of a run with a teacher.
Learn = Callable[
  [jax.Array, jax.Array, jax.Array, Variables | None], tuple[jax.Array, dict[str, jax.Array]]
]


@dataclasses.dataclass(frozen=True)
class Teacher:
  """A net to learn from.

  Attributes:
    origin: where its weights are from, as in the config.
    config: of the run that made it, with the image size of the student.
    model: without its arrays.
    variables: its weights, in the memory of this host.
    classes: their names by label, or nothing.
    digest: SHA-256 of the weights.
  """

  origin: str
  config: ml_collections.ConfigDict
  model: Model
  variables: Variables
  classes: tuple[str, ...]
  digest: str

  def __str__(self) -> str:
    family = models.family_of(self.config.model)
    name = family.describe(models.own_fields(self.config.model))
    count = sum(leaf.size for leaf in jax.tree.leaves(self.variables.params))
    return f"{name}, {count:,} parameters, {self.config.model.dtype}, from {self.origin}"

  def abstract(self, config: ml_collections.ConfigDict, mesh: Mesh) -> Variables:
    """Return shapes, dtypes and shardings of the weights: parameters as those of the student."""
    return jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
      self.variables,
      mesh_lib.state_shardings(config, mesh, self.variables),
    )

  def place(self, config: ml_collections.ConfigDict, mesh: Mesh) -> Variables:
    """Return the weights on the devices, where `abstract` says."""
    return jax.tree.map(
      lambda x, like: jax.make_array_from_callback(x.shape, like.sharding, x.__getitem__),
      self.variables,
      self.abstract(config, mesh),
    )

  def logits(
    self, variables: Variables, images: jax.Array, data: ml_collections.ConfigDict, mesh: Mesh
  ) -> jax.Array:
    """Return logits [N, classes].

    Args:
      variables: the weights, on the devices.
      images: normalised by `data`, [N, H, W, 3].
      data: `config.data` of the student.
      mesh: of the run.
    """
    whole = jax.lax.with_sharding_constraint(variables.params, mesh_lib.replicated(mesh))
    own = self.config.data
    if (tuple(own.mean), tuple(own.std)) != (tuple(data.mean), tuple(data.std)):
      wide = jnp.promote_types(images.dtype, jnp.float32)
      mean, std, own_mean, own_std = (
        jnp.asarray(x, wide) for x in (data.mean, data.std, own.mean, own.std)
      )
      images = (images.astype(wide) * std + mean - own_mean) / own_std
    net = self.model.merge(variables._replace(params=whole), None)
    logits: jax.Array = net(images.astype(self.config.model.dtype))
    return logits


def divergence(logits: jax.Array, teacher_logits: jax.Array, temperature: float) -> jax.Array:
  """Return T^2 KL(teacher || student) of each example, [N], in the dtype of the logits.

  The distributions are softmax(logits / T). The factor keeps the size of the gradient as T grows
  (arXiv:1503.02531, section 2; big_vision's evaluators/proj/distill/distance.py has it as well).
  """
  student, teacher = (
    jax.nn.log_softmax(x.astype(logits.dtype) / temperature) for x in (logits, teacher_logits)
  )
  return temperature**2 * optax.losses.kl_divergence_with_log_targets(student, teacher)


def make_loss(
  config: ml_collections.ConfigDict, labels_loss: Loss, mesh: Mesh, teacher: Teacher | None
) -> Learn:
  """Return the loss of a training step.

  Args:
    config: a validated config.
    labels_loss: what `config.loss` names.
    mesh: of the run.
    teacher: None without `config.distill.weight`.

  Raises:
    ValueError: if the config and `teacher` contradict each other.
  """
  weight, temperature = config.distill.weight, config.distill.temperature
  if bool(weight) != (teacher is not None):
    raise ValueError(f"config.distill.weight is {weight:g}, and the step is given {teacher}.")

  def learn(
    logits: jax.Array, targets: jax.Array, images: jax.Array, variables: Variables | None
  ) -> tuple[jax.Array, dict[str, jax.Array]]:
    if teacher is None:
      return labels_loss(logits, targets), {}
    assert variables is not None, "a step with a teacher takes its weights"
    theirs = teacher.logits(variables, images, config.data, mesh)
    loss = found = divergence(logits, theirs, temperature)
    if weight < 1:
      loss = weight * found + (1 - weight) * labels_loss(logits, targets)
    same = jnp.argmax(logits, -1) == jnp.argmax(theirs, -1)
    values = found.mean(), jnp.mean(same, dtype=logits.dtype)
    return loss, dict(zip(METRICS, values, strict=True))

  return learn
