"""What somebody adds without touching this project: a model family, a loss, a mix, an optimizer.

The family is a small patch-mixing net (after arXiv:2105.01601): no batch norm, dropout, stochastic
depth, and a variable that is neither a parameter nor a running statistic.
"""

from typing import ClassVar

from flax import nnx
import jax
import jax.numpy as jnp
import optax

from configs import base
from configs.fields import SHARE, Field, Fields, at_least
from trainer.losses import distribution
from trainer.models.family import Family


class Seen(nnx.Variable):
  """Counts examples of training, a collection of its own."""


class Mixer(Family):
  """Patches, two layers that mix them and two that mix channels, mean, head."""

  FIELDS: ClassVar[Fields] = {
    "patch": Field(4, "Side of a patch.", "pixels", at_least(1)),
    "channels": Field(16, "Of each patch.", "channels", at_least(1)),
    "dropout": Field(0.1, "Share of activations that training sets to 0.", "", SHARE),
    "drop_path": Field(0.1, "Share of examples whose branch training skips.", "", SHARE),
  }
  NO_DECAY = ("position",)

  @classmethod
  def check_split(cls, fields, *, examples, shards):
    if fields["channels"] % 2:
      raise ValueError("config.model.channels must be even.")

  @classmethod
  def build(cls, fields, *, num_classes, dtype, image_size, shards, rngs):
    if image_size % fields["patch"]:
      raise ValueError(f"config.model.patch does not divide {image_size} pixels.")
    patches = (image_size // fields["patch"]) ** 2
    return cls(**fields, patches=patches, num_classes=num_classes, dtype=dtype, rngs=rngs)

  def __init__(self, *, patch, channels, dropout, drop_path, patches, num_classes, dtype, rngs):
    wide = jnp.promote_types(dtype, jnp.float32)
    options = {"dtype": dtype, "param_dtype": wide, "rngs": rngs}
    self.patch, self.drop_path = patch, drop_path
    self.embed = nnx.Conv(3, channels, (patch, patch), strides=patch, **options)
    self.position = nnx.Param(jnp.zeros((patches, channels), wide))
    self.mix = nnx.Linear(patches, patches, **options)
    self.norm = nnx.LayerNorm(channels, **options)
    self.widen = nnx.Linear(channels, 2 * channels, **options)
    self.narrow = nnx.Linear(2 * channels, channels, **options)
    self.drop1, self.drop2 = (nnx.Dropout(dropout, rngs=rngs) for _ in range(2))
    self.paths = rngs.drop_path.fork()
    self.head = nnx.Linear(channels, num_classes, dtype=wide, param_dtype=wide, rngs=rngs)
    self.seen = Seen(jnp.zeros((), jnp.int32))
    self.deterministic = False  # the name that nnx.Module.train() and eval() look for

  def __call__(self, x):
    x = self.embed(x)
    x = x.reshape(x.shape[0], -1, x.shape[-1]) + self.position.astype(x.dtype)
    y = self.drop1(nnx.gelu(self.mix(x.swapaxes(1, 2)).swapaxes(1, 2)))
    if not self.deterministic:
      kept = jax.random.bernoulli(self.paths(), 1 - self.drop_path, (x.shape[0], 1, 1))
      y = jnp.where(kept, y / (1 - self.drop_path), 0).astype(x.dtype)
      self.seen.set_value(self.seen.get_value() + x.shape[0])
    x = self.norm(x + y)
    x = x + self.drop2(self.narrow(nnx.gelu(self.widen(x))))
    return self.head(x.mean(1).astype(self.head.dtype))


def squared_error(logits, targets):
  """A loss: the squared distance of the softmax from the targets."""
  return jnp.square(jax.nn.softmax(logits) - distribution(targets, logits)).sum(-1)


def shade(key, images, targets, *, strength):
  """A mix: every example a random brightness of its own."""
  if strength < 0:
    raise ValueError(f"config.augment: strength of shade must be 0 or more; it is {strength}.")
  factor = 1 + strength * jax.random.uniform(key, (images.shape[0], 1, 1, 1), minval=-1)
  return (images * factor).astype(images.dtype), targets


def signs(fields, schedule, mask):
  """An optimizer: the sign of the gradient."""
  return optax.chain(
    optax.add_decayed_weights(fields.weight_decay, mask=mask),
    optax.scale_by_sign(),
    optax.scale_by_learning_rate(schedule),
  )


def halves(span):
  """A schedule: half of the peak in the second half of what follows the warm-up."""
  half = (span.total - span.warmup) // 2
  return span.after_warmup(optax.piecewise_constant_schedule(span.peak, {half: 0.5}))


def get_config():
  """Return the run file of a small net on 16 px images of 6 classes."""
  config = base.get_config("tests.trainer.outside:Mixer")
  config.global_batch_size = config.eval.batch_size = 16
  config.total_epochs, config.total_steps = 0.0, 12
  config.model.num_classes, config.model.dtype = 6, "float32"
  config.data.image_size = config.data.eval_image_size = config.data.eval_resize = 16
  config.data.kind, config.data.synthetic_examples = "synthetic", 64
  config.data.workers = 0
  config.optimizer.name, config.optimizer.lr_per_256 = "adamw", 0.02
  config.optimizer.warmup_epochs = 0.0
  config.eval.every_epochs = 0.0
  config.log.every_steps = 1
  return config
