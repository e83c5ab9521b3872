"""Losses by name: each takes (logits, targets) and returns one value per example.

Targets are class numbers (hard) or a distribution over the classes (soft, smoothed or mixed); a
loss that needs the latter asks `distribution` for it. To add a loss, write its function and a line
in LOSSES, or name one from elsewhere in the config: `config.loss = "package.module:function"`. Its
keyword-only parameters are options: "sigmoid_cross_entropy(reduction='sum', threshold=0.2)".
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import optax

from configs import names

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


def sigmoid_cross_entropy(
  logits: jax.Array,
  targets: jax.Array,
  *,
  reduction: str = "mean",
  threshold: float | None = None,
) -> jax.Array:
  """Binary cross entropy of each class (arXiv:2110.00476, section 3.2).

  Args:
    logits: [N, C].
    targets: int [N] or [N, C].
    reduction: over the classes. mean | sum, C times as large: SGD at a usual rate needs the sum.
    threshold: classes with a larger share of the target than this count as present in full, the
      others as absent, after smoothing and mixing; None leaves the shares.
  """
  if reduction not in ("mean", "sum"):
    raise ValueError(
      f"config.loss: reduction of sigmoid_cross_entropy must be one of mean, sum; it is "
      f"{reduction!r}."
    )
  shares = distribution(targets, logits)
  if threshold is not None:
    if not 0 <= threshold < 1:
      raise ValueError(
        f"config.loss: threshold of sigmoid_cross_entropy must be None or in [0, 1); it is "
        f"{threshold!r}."
      )
    shares = (shares > threshold).astype(shares.dtype)
  of_classes = optax.sigmoid_binary_cross_entropy(logits, shares)
  return of_classes.mean(-1) if reduction == "mean" else of_classes.sum(-1)


LOSSES: Mapping[str, Callable[..., jax.Array]] = {
  "softmax_cross_entropy": softmax_cross_entropy,
  "sigmoid_cross_entropy": sigmoid_cross_entropy,
}


def make_loss(text: str) -> Loss:
  """Return the function that `config.loss` names, with its options.

  Raises:
    ValueError: one sentence, if it names none or several, an option that is not known or out of
      range, or what does not return one value per example.
  """
  calls = names.find_calls(LOSSES, text, "config.loss")
  if len(calls) != 1:
    raise ValueError(f"config.loss is {text!r}; it must name one loss.")
  (loss,) = calls
  logits = jax.ShapeDtypeStruct((3, 2), jnp.float32)
  try:
    result = jax.eval_shape(loss, logits, logits)
  except TypeError as error:
    raise ValueError(f"config.loss is {text!r}: {error}.") from error
  if not isinstance(result, jax.ShapeDtypeStruct) or result.shape != (3,):
    raise ValueError(f"config.loss is {text!r}, which does not return one value per example.")
  return loss
