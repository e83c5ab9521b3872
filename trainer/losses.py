"""Losses by name: each takes (logits, targets) and returns one value per example.

Targets are class numbers (hard) or a distribution over the classes (soft, smoothed or mixed); a
loss that needs the latter asks `distribution` for it. To add a loss, write its function and a line
in LOSSES, or name one from elsewhere in the config: `config.loss = "package.module:function"`.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

# (logits [N, C], targets int [N] or float [N, C]) -> [N], in the dtype of the logits.
Loss = Callable[[jax.Array, jax.Array], jax.Array]


def distribution(targets: jax.Array, like: jax.Array) -> jax.Array:
  """Return targets as shares of the classes, [N, C] in the shape and dtype of the logits `like`."""
  if jnp.issubdtype(targets.dtype, jnp.integer):
    return jax.nn.one_hot(targets, like.shape[-1], dtype=like.dtype)
  return targets.astype(like.dtype)


def softmax_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Cross entropy between the targets and the softmax of the logits."""
  return optax.softmax_cross_entropy(logits, distribution(targets, logits))


def sigmoid_cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
  """Mean over classes of the binary cross entropy of each (arXiv:2110.00476, section 3.2)."""
  return optax.sigmoid_binary_cross_entropy(logits, distribution(targets, logits)).mean(-1)


LOSSES: Mapping[str, Loss] = {
  "softmax_cross_entropy": softmax_cross_entropy,
  "sigmoid_cross_entropy": sigmoid_cross_entropy,
}
