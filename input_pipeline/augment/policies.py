"""Which operations an image gets, and how strong: laws that draw steps.

A law is a function of the height and width of an image, the random generator of its example, and
keyword-only options, which are what a config may set. It returns steps, in order; drawing is apart
from doing, so that `inspect` can name the steps and tests can count them.
"""

from collections.abc import Callable, Sequence
import functools
import math
from typing import Any, NamedTuple

import numpy as np

from input_pipeline.augment import pixels
from input_pipeline.augment.pixels import Color, Image

Size = tuple[int, int]  # height, width
Generator = np.random.Generator

_BLACK = (0, 0, 0)
_MEAN = (124, 116, 104)  # of ImageNet, what timm fills with; about 0 after normalisation


class Step(NamedTuple):
  """A function of `pixels`, and its numbers."""

  do: Callable[..., Image]
  arguments: tuple[Any, ...] = ()

  def __str__(self) -> str:
    numbers = [f"{a:.3g}" for a in self.arguments if isinstance(a, int | float)]
    return " ".join([self.do.__name__, *numbers])


Law = Callable[..., list[Step]]


def grayscale(size: Size, rng: Generator, *, p: float) -> list[Step]:
  """Replace, with probability `p`, the colours by their luminance (ITU-R BT.601)."""
  del size
  return [Step(pixels.grayscale)] if _occurs(p, rng) else []


def invert(size: Size, rng: Generator, *, p: float) -> list[Step]:
  """Replace, with probability `p`, each value v by 255 - v."""
  del size
  return [Step(pixels.invert)] if _occurs(p, rng) else []


def solarize(size: Size, rng: Generator, *, p: float, threshold: int = 128) -> list[Step]:
  """Replace, with probability `p`, each value v of at least `threshold` by 255 - v."""
  del size
  _within("threshold", threshold, 0, 255)
  return [Step(pixels.solarize, (threshold,))] if _occurs(p, rng) else []


def color_jitter(
  size: Size,
  rng: Generator,
  *,
  brightness: float = 0.0,
  contrast: float = 0.0,
  saturation: float = 0.0,
  hue: float = 0.0,
) -> list[Step]:
  """Change brightness, contrast, saturation and hue in random order: torchvision's ColorJitter.

  The factors are uniform in [1 - x, 1 + x], not below 0; the hue is turned by [-hue, hue] circles.
  """
  del size
  amounts = {"brightness": brightness, "contrast": contrast, "saturation": saturation}
  for name, amount in amounts.items():
    _within(name, amount, 0, math.inf)
  _within("hue", hue, 0, 0.5)
  draws = rng.random((4, 2))
  steps = []
  for i in np.argsort(draws[:, 0]).tolist():
    amount, u = [*amounts.values(), hue][i], float(draws[i, 1])
    if not amount:
      continue
    low = max(0.0, 1.0 - amount) if i < 3 else -amount
    high = 1.0 + amount if i < 3 else amount
    steps.append(Step(_JITTER[i], (low + (high - low) * u,)))
  return steps


def three_augment(size: Size, rng: Generator, *, jitter: float = 0.3) -> list[Step]:
  """Grayscale, solarize at 128 or blur, then colour jitter: 3-Augment of DeiT III (2204.07118).

  The radius of the blur is uniform in [0.1, 2]. Brightness, contrast and saturation change by up to
  `jitter`, each.
  """
  draws = rng.random(2).tolist()
  choices = (
    Step(pixels.grayscale),
    Step(pixels.solarize, (128,)),
    Step(pixels.blur, (0.1 + 1.9 * draws[1],)),
  )
  jittered = color_jitter(size, rng, brightness=jitter, contrast=jitter, saturation=jitter)
  return [choices[int(3 * draws[0])], *jittered]


def random_erasing(
  size: Size,
  rng: Generator,
  *,
  p: float = 0.1,
  area: tuple[float, float] = (0.02, 0.33),
  aspect: tuple[float, float] = (0.3, 3.3),
  fill: Color = _MEAN,
) -> list[Step]:
  """Fill a random box, with probability `p`: the law of torchvision's RandomErasing (1708.04896).

  `area` bounds its share of the image, uniform; `aspect` its height over width, log-uniform. After
  10 boxes that do not fit in, nothing is erased. torchvision fills with 0 after normalisation,
  which is the mean colour.
  """
  if not 0 < area[0] <= area[1] <= 1:
    raise ValueError(f"area={area!r} must be 0 < low <= high <= 1, shares of the image")
  if not 0 < aspect[0] <= aspect[1]:
    raise ValueError(f"aspect={aspect!r} must be 0 < low <= high")
  _check_fill(fill)
  if not _occurs(p, rng):
    return []
  height, width = size
  low, high = math.log(aspect[0]), math.log(aspect[1])
  for u_area, u_aspect, u_top, u_left in rng.random((10, 4)).tolist():
    target = height * width * (area[0] + (area[1] - area[0]) * u_area)
    ratio = math.exp(low + (high - low) * u_aspect)
    h, w = round(math.sqrt(target * ratio)), round(math.sqrt(target / ratio))
    if h < height and w < width:
      top, left = int(u_top * (height - h + 1)), int(u_left * (width - w + 1))
      return [Step(pixels.erase, (top, left, h, w, fill))]
  return []


def rand_augment(
  size: Size,
  rng: Generator,
  *,
  n: int = 2,
  m: int = 9,
  interpolation: str = "bilinear",
  fill: Color = _BLACK,
) -> list[Step]:
  """Apply `n` of 14 operations at magnitude `m` of 0..30: torchvision's RandAugment (1909.13719).

  One of the 14 is the identity. The defaults of interpolation and colour are those of torchvision's
  reference recipes.
  """
  _check_count(n)
  _check_integer("m", m, 0, 30)
  _check_geometry(interpolation, fill)
  space = _torchvision_space(31, size)
  draws = rng.random((n, 3)).tolist()
  return [
    step
    for u_name, u_sign, u_how in draws
    for step in _torchvision_step(
      space, _NAMES[int(14 * u_name)], m, u_sign, _choose(interpolation, u_how), fill
    )
  ]


def trivial_augment(
  size: Size, rng: Generator, *, interpolation: str = "bilinear", fill: Color = _BLACK
) -> list[Step]:
  """Apply one of 14 operations at a random magnitude: TrivialAugmentWide (2103.10158).

  One of the 14 is the identity; the magnitude is one of 31, up to shears of 0.99 and turns of 135
  degrees. The defaults of interpolation and colour are those of torchvision's reference recipes.
  """
  del size
  _check_geometry(interpolation, fill)
  u_name, u_bin, u_sign, u_how = rng.random(4).tolist()
  name, how = _NAMES[int(14 * u_name)], _choose(interpolation, u_how)
  return _torchvision_step(_wide_space(), name, int(31 * u_bin), u_sign, how, fill)


def auto_augment(
  size: Size,
  rng: Generator,
  *,
  policy: str = "imagenet",
  interpolation: str = "",
  fill: Color | None = None,
) -> list[Step]:
  """Apply one of 25 pairs of operations with the probabilities of AutoAugment (1805.09501).

  `policy` is imagenet, the table of the paper with the magnitudes of torchvision's AutoAugment, or
  v0, that of the TPU code of EfficientNet with those of timm's `v0`. Unless they are given,
  interpolation and colour are bilinear and black in the former, as in torchvision's reference
  recipes, and random and the mean in the latter, as in timm.
  """
  if policy not in ("imagenet", "v0"):
    raise ValueError(f"policy={policy!r} must be imagenet or v0")
  timm = policy == "v0"
  interpolation = interpolation or ("random" if timm else "bilinear")
  fill = fill or (_MEAN if timm else _BLACK)
  _check_geometry(interpolation, fill)
  draws = rng.random(7).tolist()
  table = _V0 if timm else _IMAGENET
  steps = []
  for i, (name, p, magnitude) in enumerate(table[int(len(table) * draws[0])]):
    u_occurs, u_sign, u_how = draws[1 + 3 * i : 4 + 3 * i]
    if u_occurs >= p:
      continue
    how = _choose(interpolation, u_how)
    if timm:
      steps.append(_timm_step(name, magnitude / 10, _sign(u_sign), False, size, how, fill))
    else:
      space = _torchvision_space(10, size)
      steps += _torchvision_step(space, name, magnitude, u_sign, how, fill)
  return steps


def timm_rand_augment(
  size: Size,
  rng: Generator,
  *,
  m: float,
  n: int = 2,
  mstd: float = 0.0,
  inc: bool = False,
  p: float = 0.5,
  interpolation: str = "random",
  fill: Color = _MEAN,
) -> list[Step]:
  """Apply `n` of 15 operations, each with probability `p`: timm's RandAugment, `rand-m7-mstd0.5`.

  Drawn with replacement; there is no identity among them. The magnitude of each is normal with mean
  `m` and standard deviation `mstd`, cut to 0..10; an `mstd` above 100 makes it uniform in 0..m.
  With `inc` all operations get stronger with the magnitude. Interpolation and colour are timm's.
  """
  _within("m", m, 0, 10)
  _check_count(n)
  _within("mstd", mstd, 0, math.inf)
  _check_p(p)
  _check_geometry(interpolation, fill)
  steps = []
  for u_name, u_occurs, u_sign, u_how in rng.random((n, 4)).tolist():
    if u_occurs >= p:
      continue
    magnitude = float(m)
    if mstd > 100:
      magnitude *= rng.random()
    elif mstd:
      magnitude += mstd * rng.standard_normal()
    level = min(max(magnitude, 0.0), 10.0) / 10
    name, how = _TIMM[int(len(_TIMM) * u_name)], _choose(interpolation, u_how)
    steps.append(_timm_step(name, level, _sign(u_sign), bool(inc), size, how, fill))
  return steps


# The pixels of each name of the two libraries.
_DO: dict[str, Callable[..., Image]] = {
  "ShearX": pixels.shear_x,
  "ShearY": pixels.shear_y,
  "TranslateX": pixels.translate_x,
  "TranslateY": pixels.translate_y,
  "Rotate": pixels.rotate,
  "Brightness": pixels.brightness,
  "Color": pixels.saturation,
  "Contrast": pixels.contrast,
  "Sharpness": pixels.sharpness,
  "Posterize": pixels.posterize,
  "Solarize": pixels.solarize,
  "SolarizeAdd": pixels.solarize_add,
  "AutoContrast": pixels.auto_contrast,
  "Equalize": pixels.equalize,
  "Invert": pixels.invert,
}
_GEOMETRIC = ("ShearX", "ShearY", "TranslateX", "TranslateY", "Rotate")
_FACTORS = ("Brightness", "Color", "Contrast", "Sharpness")
_PLAIN = ("AutoContrast", "Equalize", "Invert")
_NAMES = ("Identity", *_GEOMETRIC, *_FACTORS, "Posterize", "Solarize", "AutoContrast", "Equalize")
_TIMM = (*_GEOMETRIC, *_FACTORS, "Posterize", "Solarize", "SolarizeAdd", *_PLAIN)
_JITTER = (pixels.brightness, pixels.contrast, pixels.saturation, pixels.hue)

_Space = dict[str, list[float]]  # the magnitudes of each operation that has some


@functools.lru_cache(maxsize=8)
def _torchvision_space(bins: int, size: Size) -> _Space:
  """Return the magnitudes of torchvision's AutoAugment and RandAugment."""
  height, width = size
  most = dict.fromkeys(("ShearX", "ShearY"), 0.3) | dict.fromkeys(_FACTORS, 0.9)
  most |= {"TranslateX": 150 / 331 * width, "TranslateY": 150 / 331 * height, "Rotate": 30.0}
  return _bins(bins, most, 4)


@functools.lru_cache(maxsize=1)
def _wide_space() -> _Space:
  """Return the magnitudes of TrivialAugmentWide."""
  most = dict.fromkeys(("ShearX", "ShearY"), 0.99) | dict.fromkeys(_FACTORS, 0.99)
  most |= {"TranslateX": 32.0, "TranslateY": 32.0, "Rotate": 135.0}
  return _bins(31, most, 6)


def _bins(bins: int, most: dict[str, float], bits: int) -> _Space:
  """Return magnitudes from 0 to `most`; Posterize loses up to `bits` bits, Solarize goes to 0."""
  shares = [i / (bins - 1) for i in range(bins)]
  space = {name: _linspace(limit, bins) for name, limit in most.items()}
  space["Posterize"] = [8 - round(bits * share) for share in shares]
  space["Solarize"] = [255 * (1 - share) for share in shares]
  return space


def _linspace(last: float, count: int) -> list[float]:
  """Return torch.linspace(0, last, count) with its float32 rounding, which decides whole pixels."""
  step = float(np.float32(np.float32(last) / np.float32(count - 1)))
  half = count // 2
  values = [step * i if i < half else last - step * (count - 1 - i) for i in range(count)]
  return [float(np.float32(value)) for value in values]


def _torchvision_step(
  space: _Space, name: str, magnitude: int, u_sign: float, how: str, fill: Color
) -> list[Step]:
  """Return the step of a name, none for Identity, at a number of its magnitudes."""
  if name == "Identity":
    return []
  if name in _PLAIN:
    return [Step(_DO[name])]
  value = space[name][magnitude]
  if name in ("Posterize", "Solarize"):
    return [Step(_DO[name], (value,))]
  value *= _sign(u_sign)
  if name in _FACTORS:
    return [Step(_DO[name], (1 + value,))]
  if name in ("TranslateX", "TranslateY"):
    value = -int(value)  # ours counts to the left and upwards
  return [Step(_DO[name], (value, how, fill))]


def _timm_step(
  name: str, level: float, sign: float, inc: bool, size: Size, how: str, fill: Color
) -> Step:
  """Return the step of a name at a level in 0..1."""
  if name in _PLAIN:
    return Step(_DO[name])
  if name in _FACTORS:
    factor = max(0.1, 1 + 0.9 * level * sign) if inc else 1.8 * level + 0.1
    return Step(_DO[name], (factor,))
  if name == "Posterize":
    kept = int(4 * level)
    return Step(_DO[name], (4 - kept if inc else kept,))
  if name == "Solarize":
    threshold = int(256 * level)
    return Step(_DO[name], (256 - threshold if inc else threshold,))
  if name == "SolarizeAdd":
    return Step(_DO[name], (int(110 * level),))
  if name == "Rotate":
    most = 30.0
  elif name in ("ShearX", "ShearY"):
    most = 0.3
  else:
    most = 0.45 * size[name == "TranslateX"]
  return Step(_DO[name], (most * level * sign, how, fill))


def _sign(u: float) -> float:
  return -1.0 if u < 0.5 else 1.0


def _choose(interpolation: str, u: float) -> str:
  """Return the interpolation of a step: a fair choice of bilinear and bicubic if it is random."""
  if interpolation != "random":
    return interpolation
  return "bilinear" if u < 0.5 else "bicubic"


def _occurs(p: float, rng: Generator) -> bool:
  """Draw whether something of probability `p` happens."""
  _check_p(p)
  return rng.random() < p


def _check_p(p: float) -> None:
  if not 0 <= p <= 1:
    raise ValueError(f"p={p!r} must be in [0, 1]")


def _within(name: str, value: float, low: float, high: float) -> None:
  if not low <= value <= high:
    words = f"in [{low}, {high}]" if high < math.inf else f"{low} or more"
    raise ValueError(f"{name}={value!r} must be {words}")


def _check_integer(name: str, value: int, low: int, high: int) -> None:
  if not (isinstance(value, int) and low <= value <= high):
    raise ValueError(f"{name}={value!r} must be an integer in [{low}, {high}]")


def _check_count(n: int) -> None:
  if not (isinstance(n, int) and n >= 1):
    raise ValueError(f"n={n!r} operations must be 1 or more")


def _check_geometry(interpolation: str, fill: Sequence[int]) -> None:
  if interpolation not in ("nearest", "bilinear", "bicubic", "random"):
    raise ValueError(
      f"interpolation={interpolation!r} must be nearest, bilinear, bicubic or random"
    )
  _check_fill(fill)


def _check_fill(fill: Sequence[int]) -> None:
  if not (len(fill) == 3 and all(isinstance(v, int) and 0 <= v <= 255 for v in fill)):
    raise ValueError(f"fill={fill!r} must be three integers in [0, 255], for R, G and B")


_Pair = tuple[tuple[str, float, int], tuple[str, float, int]]

# Of arXiv:1805.09501, table 9. Name, probability, magnitude of 0..9; 0 where it has no effect.
_IMAGENET: tuple[_Pair, ...] = (
  (("Posterize", 0.4, 8), ("Rotate", 0.6, 9)),
  (("Solarize", 0.6, 5), ("AutoContrast", 0.6, 0)),
  (("Equalize", 0.8, 0), ("Equalize", 0.6, 0)),
  (("Posterize", 0.6, 7), ("Posterize", 0.6, 6)),
  (("Equalize", 0.4, 0), ("Solarize", 0.2, 4)),
  (("Equalize", 0.4, 0), ("Rotate", 0.8, 8)),
  (("Solarize", 0.6, 3), ("Equalize", 0.6, 0)),
  (("Posterize", 0.8, 5), ("Equalize", 1.0, 0)),
  (("Rotate", 0.2, 3), ("Solarize", 0.6, 8)),
  (("Equalize", 0.6, 0), ("Posterize", 0.4, 6)),
  (("Rotate", 0.8, 8), ("Color", 0.4, 0)),
  (("Rotate", 0.4, 9), ("Equalize", 0.6, 0)),
  (("Equalize", 0.0, 0), ("Equalize", 0.8, 0)),
  (("Invert", 0.6, 0), ("Equalize", 1.0, 0)),
  (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
  (("Rotate", 0.8, 8), ("Color", 1.0, 2)),
  (("Color", 0.8, 8), ("Solarize", 0.8, 7)),
  (("Sharpness", 0.4, 7), ("Invert", 0.6, 0)),
  (("ShearX", 0.6, 5), ("Equalize", 1.0, 0)),
  (("Color", 0.4, 0), ("Equalize", 0.6, 0)),
  (("Equalize", 0.4, 0), ("Solarize", 0.2, 4)),
  (("Solarize", 0.6, 5), ("AutoContrast", 0.6, 0)),
  (("Invert", 0.6, 0), ("Equalize", 1.0, 0)),
  (("Color", 0.6, 4), ("Contrast", 1.0, 8)),
  (("Equalize", 0.8, 0), ("Equalize", 0.6, 0)),
)

# Of EfficientNet's code for TPUs. Name, probability, magnitude of 0..10.
_V0: tuple[_Pair, ...] = (
  (("Equalize", 0.8, 1), ("ShearY", 0.8, 4)),
  (("Color", 0.4, 9), ("Equalize", 0.6, 3)),
  (("Color", 0.4, 1), ("Rotate", 0.6, 8)),
  (("Solarize", 0.8, 3), ("Equalize", 0.4, 7)),
  (("Solarize", 0.4, 2), ("Solarize", 0.6, 2)),
  (("Color", 0.2, 0), ("Equalize", 0.8, 8)),
  (("Equalize", 0.4, 8), ("SolarizeAdd", 0.8, 3)),
  (("ShearX", 0.2, 9), ("Rotate", 0.6, 8)),
  (("Color", 0.6, 1), ("Equalize", 1.0, 2)),
  (("Invert", 0.4, 9), ("Rotate", 0.6, 0)),
  (("Equalize", 1.0, 9), ("ShearY", 0.6, 3)),
  (("Color", 0.4, 7), ("Equalize", 0.6, 0)),
  (("Posterize", 0.4, 6), ("AutoContrast", 0.4, 7)),
  (("Solarize", 0.6, 8), ("Color", 0.6, 9)),
  (("Solarize", 0.2, 4), ("Rotate", 0.8, 9)),
  (("Rotate", 1.0, 7), ("TranslateY", 0.8, 9)),
  (("ShearX", 0.0, 0), ("Solarize", 0.8, 4)),
  (("ShearY", 0.8, 0), ("Color", 0.6, 4)),
  (("Color", 1.0, 0), ("Rotate", 0.6, 2)),
  (("Equalize", 0.8, 4), ("Equalize", 0.0, 8)),
  (("Equalize", 1.0, 4), ("AutoContrast", 0.6, 2)),
  (("ShearY", 0.4, 7), ("SolarizeAdd", 0.6, 7)),
  (("Posterize", 0.8, 2), ("Solarize", 0.6, 10)),
  (("Solarize", 0.6, 8), ("Equalize", 0.6, 1)),
  (("Color", 0.8, 6), ("Rotate", 0.4, 5)),
)
