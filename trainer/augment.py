"""What happens to images on the device, inside the jitted step."""

import jax
import jax.numpy as jnp
import ml_collections


def normalize(images: jax.Array, data: ml_collections.ConfigDict, dtype: jnp.dtype) -> jax.Array:
  """Turns uint8 [N, H, W, 3] into `dtype` [N, H, W, 3] with the channel means and deviations of `config.data`.

  Images cross the wire as uint8, a quarter of the bytes of float32; the arithmetic is at least float32 before the cast.
  """
  wide = jnp.promote_types(dtype, jnp.float32)
  mean, std = jnp.asarray(data.mean, wide), jnp.asarray(data.std, wide)
  return ((images.astype(wide) - mean) / std).astype(dtype)
