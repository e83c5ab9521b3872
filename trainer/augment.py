"""What happens to images on the device, inside the jitted step.

`config.augment` is a chain of functions (key, images, targets, *, options) -> (images, targets), as
in "mix(mixup=0.2, cutmix=1.0, group=256)|random_erasing(p=0.25)". Images are normalised,
[N, H, W, 3]; targets are distributions over the classes, [N, C]; N is a micro-batch. All draws come
from the key, which is a function of seed, step and micro-batch, and those of an example depend on
its place in the micro-batch, never on a device. To add a function, write it, with its options as
keyword-only parameters, and a line in AUGMENTATIONS.
"""

from collections.abc import Callable, Mapping
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_collections

from configs import names

Augmentation = Callable[[jax.Array, jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
# (key, {"image", "label"} of a micro-batch, steps taken) -> (images, targets).
Inputs = Callable[[jax.Array, Mapping[str, jax.Array], jax.Array], tuple[jax.Array, jax.Array]]

_ATTEMPTS = 10  # of random erasing to find a rectangle inside the image, as timm and torchvision


class Mix(NamedTuple):
  """What mixing draws, an entry for each group or each example.

  Attributes:
    share: float32 [n], how much of the target is that of the example itself; the rest is its
      partner's.
    box: int32 [n, 4], top, bottom, left and right of the part of the image that is the partner's;
      empty without cutmix.
    whole: bool [n], pixels are wholly of one of the two: cutmix, or not mixed at all.
  """

  share: jax.Array
  box: jax.Array
  whole: jax.Array


def normalize(
  images: jax.Array, data: ml_collections.ConfigDict, dtype: jax.typing.DTypeLike
) -> jax.Array:
  """Turn uint8 [N, H, W, 3] into `dtype` by the channel means and deviations of `data`.

  Channels of several pixels may follow one another, as in `trainer.models.layers.row_pairs`.
  Images cross the wire as uint8, a quarter of the bytes of float32; the arithmetic is at least
  float32 before the cast.
  """
  wide = jnp.promote_types(dtype, jnp.float32)
  pixels = images.shape[-1] // len(data.mean)
  mean, std = (jnp.asarray(tuple(value) * pixels, wide) for value in (data.mean, data.std))
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

  def mixed(x: jax.Array) -> jax.Array:
    return (share * x + (1 - share) * jnp.roll(x, -1, axis=0)).astype(x.dtype)

  return mixed(images), mixed(targets)


def cutmix(
  key: jax.Array, images: jax.Array, targets: jax.Array, *, alpha: float, group: int = 0
) -> tuple[jax.Array, jax.Array]:
  """Put a box of the partner into each image (arXiv:1905.04899): `mix` without mixup."""
  if not alpha > 0:
    raise ValueError(f"config.augment: alpha of cutmix must be positive; it is {alpha!r}.")
  return mix(key, images, targets, cutmix=alpha, group=group)


def mix(
  key: jax.Array,
  images: jax.Array,
  targets: jax.Array,
  *,
  mixup: float = 0.0,
  cutmix: float = 0.0,
  p: float = 1.0,
  switch: float = 0.5,
  group: int = 0,
  per: str = "group",
  partner: str = "flip",
  box: str = "timm",
  fold: bool = False,
) -> tuple[jax.Array, jax.Array]:
  """Mix examples within groups, by mixup or cutmix, as drawn (arXiv:2110.00476, section 3.2).

  Reference implementations draw once for the batch of one process, 128 to 512 examples; here that
  is a group of so many examples that follow one another in the micro-batch. If the groups of a
  device are its own, which they are if `group` divides its examples, nothing is sent.

  timm's modes are group=N (batch), group=2 (pair) and per="example" (elem); torchvision's law is
  partner="roll", box="torchvision"; big_vision's partner="roll", fold=True. What timm mixes as
  uint8 and rounds is not rounded here.

  Args:
    key: of the micro-batch.
    images: [N, H, W, 3].
    targets: [N, C], shares of the classes.
    mixup: alpha of the Beta distribution of the share of the example; 0 is cutmix only.
    cutmix: alpha of the Beta distribution of the share outside of the box; 0 is mixup only.
    p: probability that a group is mixed at all.
    switch: probability of cutmix where both are set.
    group: examples that share a draw, and of which each has its partner among the others; 0 is the
      whole micro-batch.
    per: "example" draws share, box and choice for each example; partners stay within the group.
    partner: flip, the i-th of the group with the i-th from its end | roll, with the next one, which
      with repeated augmentation may be the same image.
    box: timm | torchvision; they round differently, see `draw_mix`.
    fold: mixup takes the larger share for the example itself.
  """
  n, height, width, _ = images.shape
  size = group or n
  _require(mixup >= 0, "mixup of mix", "0 or more", mixup)
  _require(cutmix >= 0, "cutmix of mix", "0 or more", cutmix)
  _require(mixup > 0 or cutmix > 0, "mixup or cutmix of mix", "positive", 0)
  _require(0 <= p <= 1, "p of mix", "in [0, 1]", p)
  _require(0 <= switch <= 1, "switch of mix", "in [0, 1]", switch)
  _require(isinstance(group, int) and group >= 0, "group of mix", "0 or more examples", group)
  for option, value, words in (
    ("per", per, ("group", "example")),
    ("partner", partner, ("flip", "roll")),
    ("box", box, ("timm", "torchvision")),
  ):
    _require(value in words, f"{option} of mix", f"one of {', '.join(words)}", value)
  if targets.shape[-1] < 2:
    raise ValueError("config.augment: mix needs 2 classes or more; config.model.num_classes is 1.")
  if n % size or size < 2 or (partner == "flip" and size % 2):
    even = "an even number, " if partner == "flip" else ""
    raise ValueError(
      f"config.augment: group of mix makes {size} examples, which must be {even}2 or more, and "
      f"divide the micro-batch of {n} (config.global_batch_size / config.accumulation_steps)."
    )
  count = n // size if per == "group" else n
  drawn = draw_mix(
    key,
    count,
    (height, width),
    mixup=mixup,
    cutmix=cutmix,
    p=p,
    switch=switch,
    box=box,
    fold=fold,
  )
  # By index, and not by broadcasting, so that every device draws for all: the loop that draws from
  # a Beta distribution, split over devices, would ask them all in each round if they are done.
  of_example = jnp.arange(n) // (n // count)
  share, box_of, whole = (x.at[of_example].get(mode="promise_in_bounds") for x in drawn)

  def other(x: jax.Array) -> jax.Array:
    grouped = x.reshape(n // size, size, *x.shape[1:])
    others = jnp.flip(grouped, 1) if partner == "flip" else jnp.roll(grouped, -1, axis=1)
    return others.reshape(x.shape)

  # Not share * x + (1 - share) * other: which of the two products a compiler joins with the sum,
  # and so the last bit, would depend on the layout.
  def blend(x: jax.Array, other: jax.Array) -> jax.Array:
    factor = share.reshape(n, *[1] * (x.ndim - 1))
    return (other + factor * (x - other)).astype(x.dtype)

  others = other(images)
  blended = images if not mixup else blend(images, others)
  if cutmix or p < 1:
    pasted = jnp.where(_inside(box_of, height, width), others, images)
    blended = jnp.where(whole[:, None, None, None], pasted, blended)
  return blended, blend(targets, other(targets))


def draw_mix(
  key: jax.Array,
  count: int,
  size: tuple[int, int],
  *,
  mixup: float,
  cutmix: float,
  p: float,
  switch: float,
  box: str,
  fold: bool,
) -> Mix:
  """Draw `count` times how to mix images of `size` (height, width); see `mix`.

  The area of the box is the share of the partner before the box is clipped to the image; after it,
  the share is corrected. timm (timm.data.mixup) rounds the sides of the box down to whole pixels,
  torchvision (transforms.v2.CutMix) half of each, so that its sides are even.
  """
  keys = jax.random.split(key, 6)
  mixed = jax.random.bernoulli(keys[3], p, (count,))
  cut = jax.random.bernoulli(keys[0], (switch if cutmix else 0.0) if mixup else 1.0, (count,))
  share = jnp.ones(count, jnp.float32)
  if mixup:
    share = jax.random.beta(keys[1], mixup, mixup, (count,), jnp.float32)
    share = jnp.maximum(share, 1 - share) if fold else share
  if cutmix:
    share = jnp.where(cut, jax.random.beta(keys[2], cutmix, cutmix, (count,), jnp.float32), share)
  share = jnp.where(mixed, share, 1.0)
  if not cutmix:
    return Mix(share, jnp.zeros((count, 4), jnp.int32), ~mixed)
  ratio = jnp.sqrt(1 - share)
  edges: list[jax.Array] = []
  for axis, length in enumerate(size):
    centre = jax.random.randint(keys[4 + axis], (count,), 0, length)
    if box == "timm":
      side = (length * ratio).astype(jnp.int32)
      before, after = side // 2, (side + 1) // 2
    else:
      before = after = (0.5 * ratio * length).astype(jnp.int32)
    edges += [jnp.clip(centre - before, 0, length), jnp.clip(centre + after, 0, length)]
  top, bottom, left, right = edges
  area = (bottom - top) * (right - left)
  share = jnp.where(cut, 1 - area / (size[0] * size[1]), share).astype(jnp.float32)
  return Mix(share, jnp.where(cut[:, None], jnp.stack(edges, -1), 0), cut | ~mixed)


def random_erasing(
  key: jax.Array,
  images: jax.Array,
  targets: jax.Array,
  *,
  p: float,
  area: tuple[float, float] = (0.02, 1 / 3),
  aspect: tuple[float, float] = (0.3, 1 / 0.3),
  mode: str = "pixel",
) -> tuple[jax.Array, jax.Array]:
  """Replace a rectangle of an image (arXiv:1708.04896), by timm's law and defaults.

  Args:
    key: of the micro-batch.
    images: [N, H, W, 3], normalised.
    targets: [N, C], left as they are.
    p: probability that an image is erased at all, drawn for each.
    area: of the rectangle as a share of the image, uniform between two bounds.
    aspect: its height over its width, log-uniform between two bounds.
    mode: pixel, noise from N(0, 1) in every pixel and channel | const, 0, the mean colour.
  """
  _require(0 <= p <= 1, "p of random_erasing", "in [0, 1]", p)
  _require(
    len(area) == 2 and 0 < area[0] <= area[1] <= 1,
    "area of random_erasing",
    "(min, max), shares of the image in (0, 1]",
    area,
  )
  _require(
    len(aspect) == 2 and 0 < aspect[0] <= aspect[1],
    "aspect of random_erasing",
    "(min, max), both positive",
    aspect,
  )
  _require(mode in ("pixel", "const"), "mode of random_erasing", "one of pixel, const", mode)
  n, height, width, _ = images.shape
  key_box, key_noise = jax.random.split(key)
  boxes = draw_boxes(key_box, n, (height, width), p=p, area=area, aspect=aspect)
  fill = jnp.zeros((), images.dtype)
  if mode == "pixel":
    fill = jax.random.normal(key_noise, images.shape, jnp.float32).astype(images.dtype)
  return jnp.where(_inside(boxes, height, width), fill, images), targets


def draw_boxes(
  key: jax.Array,
  count: int,
  size: tuple[int, int],
  *,
  p: float,
  area: tuple[float, float],
  aspect: tuple[float, float],
) -> jax.Array:
  """Draw what `random_erasing` erases: int32 [count, 4], top, bottom, left, right.

  A rectangle that does not lie inside the image (`size`, height and width) is drawn again, up to 10
  times; if none does, or the image is not erased, it is empty.
  """
  height, width = size
  keys = jax.random.split(key, 5)
  tries = (count, _ATTEMPTS)
  low, high = area
  target = jax.random.uniform(keys[0], tries, jnp.float32, low, high) * (height * width)
  low, high = map(math.log, aspect)
  ratio = jnp.exp(jax.random.uniform(keys[1], tries, jnp.float32, low, high))
  heights = jnp.round(jnp.sqrt(target * ratio)).astype(jnp.int32)
  widths = jnp.round(jnp.sqrt(target / ratio)).astype(jnp.int32)
  fits = (heights < height) & (widths < width)
  first = jnp.argmax(fits, 1, keepdims=True)
  h, w = (jnp.take_along_axis(x, first, 1)[:, 0] for x in (heights, widths))
  top = jax.random.randint(keys[2], (count,), 0, height - h + 1)
  left = jax.random.randint(keys[3], (count,), 0, width - w + 1)
  erased = fits.any(1) & jax.random.bernoulli(keys[4], p, (count,))
  return jnp.where(erased[:, None], jnp.stack([top, top + h, left, left + w], -1), 0)


def _inside(boxes: jax.Array, height: int, width: int) -> jax.Array:
  """Return which pixels lie in the box of their image, bool [N, H, W, 1]."""
  top, bottom, left, right = (x[:, None] for x in boxes.T)
  y, x = jnp.arange(height), jnp.arange(width)
  rows, columns = (y >= top) & (y < bottom), (x >= left) & (x < right)
  return (rows[:, :, None] & columns[:, None, :])[..., None]


def _require(holds: bool, what: str, words: str, value: object) -> None:
  if not holds:
    raise ValueError(f"config.augment: {what} must be {words}; it is {value!r}.")


AUGMENTATIONS: Mapping[str, Callable[..., Any]] = {
  "mixup": mixup,
  "cutmix": cutmix,
  "mix": mix,
  "random_erasing": random_erasing,
}


def make_chain(text: str) -> Augmentation:
  """Return `config.augment` as one function; each part gets a key of its own.

  Raises:
    ValueError: one sentence, if a function or an option is not known.
  """
  chain = names.find_calls(AUGMENTATIONS, text, "config.augment")

  def augment(key: jax.Array, images: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    for number, function in enumerate(chain):
      images, targets = function(jax.random.fold_in(key, number), images, targets)
    return images, targets

  return augment


def make_inputs(config: ml_collections.ConfigDict, until: int | None = None) -> Inputs:
  """Return the function that makes of a micro-batch what the model and the loss get.

  Args:
    config: a validated config.
    until: steps taken from which on `config.augment` is off; None is never.
  """
  dtype = jnp.dtype(config.model.dtype)
  chain = make_chain(config.augment)

  def inputs(
    key: jax.Array, batch: Mapping[str, jax.Array], step: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    images = normalize(batch["image"], config.data, dtype)
    targets = jax.nn.one_hot(
      batch["label"], config.model.num_classes, dtype=jnp.promote_types(dtype, jnp.float32)
    )
    plain = images, targets
    augmented = chain(key, images, targets)
    if until is None:
      return augmented
    # A selection, which the compiler joins with the mixing; a branch would part both from the
    # normalisation.
    return jax.tree.map(lambda new, old: jnp.where(step < until, new, old), augmented, plain)

  return inputs


def check(config: ml_collections.ConfigDict) -> None:
  """Refuse a `config.augment` that cannot work on a micro-batch of this config; on no device.

  Raises:
    ValueError: one sentence, if a function or an option is not known, or out of range.
  """
  chain = make_chain(config.augment)
  if config.augment and config.model.get("row_pairs", False):
    raise ValueError(
      f"config.augment is {config.augment!r}, which works on pixels, and config.model.row_pairs "
      "joins rows before it: set that to False."
    )
  examples, size = config.global_batch_size // config.accumulation_steps, config.data.image_size

  def traced() -> tuple[jax.Array, jax.Array]:
    images = jnp.zeros((examples, size, size, 3), config.model.dtype)
    targets = jnp.zeros((examples, config.model.num_classes))
    return chain(jax.random.key(0), images, targets)

  try:
    jax.eval_shape(traced)
  except TypeError as error:
    raise ValueError(f"config.augment is {config.augment!r}: {error}.") from error
