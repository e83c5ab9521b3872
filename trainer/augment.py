"""What happens to images on the device, inside the jitted step.

`config.augment` is a chain of functions (key, images, targets, *, options) -> (images, targets), as
in "mixup(alpha=0.2)|package.module:function". Images are normalised, [N, H, W, 3]; targets are
distributions over the classes, [N, C]. All draws come from the key, and those for an example depend
on its place in the micro-batch, never on a device. To add a function, write it, with its options
as keyword-only parameters, and a line in AUGMENTATIONS.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections

from configs import names

Augmentation = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]


def normalize(
  images: jax.Array, data: ml_collections.ConfigDict, dtype: jax.typing.DTypeLike
) -> jax.Array:
  """Turn uint8 [N, H, W, 3] into `dtype` by the channel means and deviations of `data`.

  Images cross the wire as uint8, a quarter of the bytes of float32; the arithmetic is at least
  float32 before the cast.
  """
  wide = jnp.promote_types(dtype, jnp.float32)
  mean, std = jnp.asarray(data.mean, wide), jnp.asarray(data.std, wide)
  return ((images.astype(wide) - mean) / std).astype(dtype)


def mixup(
  key: jax.Array, images: jax.Array, targets: jax.Array, *, alpha: float
) -> tuple[jax.Array, jax.Array]:
  """Mix each example with the next one of its micro-batch (arXiv:1710.09412).

  The share of the example itself is drawn from Beta(alpha, alpha), once for the micro-batch.
  """
  if not alpha > 0:
    raise ValueError(f"config.augment: alpha of mixup must be positive; it is {alpha!r}.")
  share = jax.random.beta(key, alpha, alpha)

  def mix(x: jax.Array) -> jax.Array:
    return (share * x + (1 - share) * jnp.roll(x, -1, axis=0)).astype(x.dtype)

  return mix(images), mix(targets)


AUGMENTATIONS: Mapping[str, Callable[..., Any]] = {"mixup": mixup}


def make_chain(text: str) -> Augmentation:
  """Return `config.augment` as one function; each part gets a key of its own.

  Raises:
    ValueError: one sentence, if a function or an option is not known or out of range.
  """
  chain = names.find_calls(AUGMENTATIONS, text, "config.augment")

  def augment(key: jax.Array, images: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    for number, function in enumerate(chain):
      images, targets = function(jax.random.fold_in(key, number), images, targets)
    return images, targets

  # Traced, so that an option out of its range is refused at the start of the run; on no device.
  jax.eval_shape(lambda: augment(jax.random.key(0), jnp.zeros((2, 8, 8, 3)), jnp.zeros((2, 2))))
  return augment
