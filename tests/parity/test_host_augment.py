"""Operations on the host against torchvision's and timm's own code: draws and pixels.

Two-sample tests with fixed seeds, each of which must have p > 1e-3: Kolmogorov-Smirnov for what is
continuous, chi-square for the rest.
"""

import collections
import random

import numpy as np
from PIL import Image
import pytest
from scipy import stats

from input_pipeline import image
from input_pipeline.augment import pixels, policies
from tests.input_pipeline.conftest import picture

torch = pytest.importorskip("torch", reason="needs the extra parity")
pytest.importorskip("torchvision", reason="needs the extra parity")
pytest.importorskip("timm", reason="needs the extra parity")
from timm.data import auto_augment as timm_augment  # noqa: E402
from torchvision import transforms  # noqa: E402
from torchvision.transforms import autoaugment  # noqa: E402

_SIZE = (224, 224)
_LEAST_P = 1e-3
_DRAWS = [pytest.param(1500, id="quick"), pytest.param(20_000, marks=pytest.mark.slow, id="full")]

# Names of both libraries -> functions of `pixels`.
_NAMES = {
  "ShearX": "shear_x",
  "ShearY": "shear_y",
  "TranslateX": "translate_x",
  "TranslateY": "translate_y",
  "TranslateXRel": "translate_x",
  "TranslateYRel": "translate_y",
  "Rotate": "rotate",
  "Brightness": "brightness",
  "Color": "saturation",
  "Contrast": "contrast",
  "Sharpness": "sharpness",
  "Posterize": "posterize",
  "Solarize": "solarize",
  "SolarizeAdd": "solarize_add",
  "AutoContrast": "auto_contrast",
  "Equalize": "equalize",
  "Invert": "invert",
  "Desaturate": "grayscale",
  "GaussianBlurRand": "blur",
}
_FACTORS = ("brightness", "saturation", "contrast", "sharpness")


def counts_agree(ours, theirs, what):
  """Chi-square of two samples of anything that can be counted; rare values are put together."""
  one, other = collections.Counter(ours), collections.Counter(theirs)
  assert set(one) <= set(other) | {k for k in one if one[k] < 20}, what
  table = [[c[k] for k in sorted(set(one) | set(other), key=str)] for c in (one, other)]
  table = np.array(table)
  rare = table.sum(0) < 10
  if rare.any():
    table = np.concatenate([table[:, ~rare], table[:, rare].sum(1, keepdims=True)], axis=1)
  if table.shape[1] > 1:
    assert stats.chi2_contingency(table).pvalue > _LEAST_P, (what, table)


def values_agree(ours, theirs, what):
  """The right test of two samples of numbers: that of counts if there are few different ones."""
  ours, theirs = np.round(ours, 4), np.round(theirs, 4)
  if len(set(ours) | set(theirs)) < 70:
    counts_agree(ours.tolist(), theirs.tolist(), what)
  else:
    assert stats.ks_2samp(ours, theirs).pvalue > _LEAST_P, what


def steps_agree(ours, theirs):
  """Lists of (name, value, interpolation) for each image: how many, which, how strong, how."""
  counts_agree(map(len, ours), map(len, theirs), "number of steps")
  flat = [[step for steps in sample for step in steps] for sample in (ours, theirs)]
  counts_agree(*([name for name, _, _ in sample] for sample in flat), "names")
  if len(ours[0]) == 2 and all(len(steps) == 2 for steps in ours):
    counts_agree(*([f"{a[0]} {b[0]}" for a, b in sample] for sample in (ours, theirs)), "pairs")
  for name in {name for name, _, _ in flat[1]}:
    values = [[v for n, v, _ in sample if n == name and v is not None] for sample in flat]
    if values[1]:
      values_agree(*values, name)
  how = [[h for _, _, h in sample if h] for sample in flat]
  if how[1]:
    counts_agree(*how, "interpolation")


def drawn(law, count, **options):
  """Return what our law draws, as for `steps_agree`."""
  rng = np.random.default_rng(1)
  found = []
  for _ in range(count):
    steps = law(_SIZE, rng, **options)
    found.append(
      [
        (s.do.__name__, s.arguments[0] if s.arguments else None, (*s.arguments, "", "")[1])
        for s in steps
      ]
    )
  return found


def timm_drawn(operations, draw, count):
  """Return the same of timm: `draw` uses operations, whose functions are replaced by a record."""
  record = []

  def note(name):
    def noted(img, *arguments, **kwargs):
      value = arguments[0] if arguments else None
      geometric = name in ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
      if name.startswith("translate"):
        value *= _SIZE[1]
      if name in ("grayscale", "blur"):
        value = None
      how = timm_augment._interpolation(kwargs) if geometric else ""
      record[-1].append((name, value, how and how.name.lower()))
      return img

    return noted

  for operation in operations:
    operation.aug_fn = note(_NAMES[operation.name.replace("Increasing", "")])
  random.seed(2)
  np.random.seed(2)
  for _ in range(count):
    record.append([])
    draw(None)
  return record


def torchvision_drawn(transform, count, monkeypatch):
  """Return the same of torchvision; a translation counts to the other side there."""
  record = []

  def note(img, name, magnitude, interpolation, fill):
    if name != "Identity":
      value = magnitude
      if _NAMES[name] in _FACTORS:
        value = 1 + magnitude
      elif name in ("TranslateX", "TranslateY"):
        value = -int(magnitude)
      elif name in ("AutoContrast", "Equalize", "Invert"):
        value = None
      record[-1].append((_NAMES[name], value, ""))
    return img

  monkeypatch.setattr(autoaugment, "_apply_op", note)
  torch.manual_seed(3)
  blank = Image.new("RGB", _SIZE)
  for _ in range(count):
    record.append([])
    transform(blank)
  return record


def without_how(sample):
  return [[(name, value, "") for name, value, _ in steps] for steps in sample]


@pytest.mark.parametrize("count", _DRAWS)
@pytest.mark.parametrize(
  ("spec", "options"),
  [
    ("rand-m7-mstd0.5-inc1", {"m": 7, "mstd": 0.5, "inc": True}),
    ("rand-m9-n3-p0.7-mstd101", {"m": 9, "n": 3, "p": 0.7, "mstd": 101}),
    ("rand-m4", {"m": 4}),
  ],
)
def test_draws_of_timm_rand_augment(spec, options, count):
  transform = timm_augment.rand_augment_transform(spec, {"img_mean": (124, 116, 104)})
  theirs = timm_drawn(transform.ops, transform, count)
  steps_agree(drawn(policies.timm_rand_augment, count, **options), theirs)


@pytest.mark.parametrize("count", _DRAWS)
def test_draws_of_timm_auto_augment_v0(count):
  transform = timm_augment.auto_augment_transform("v0", {"img_mean": (124, 116, 104)})
  theirs = timm_drawn([op for pair in transform.policy for op in pair], transform, count)
  steps_agree(drawn(policies.auto_augment, count, policy="v0"), theirs)


@pytest.mark.parametrize("count", _DRAWS)
def test_draws_of_three_augment(count):
  transform = timm_augment.auto_augment_transform("3a", {})
  theirs = timm_drawn([op for pair in transform.policy for op in pair], transform, count)
  ours = drawn(policies.three_augment, count, jitter=0.0)
  radii = [steps[0][1] for steps in ours if steps[0][0] == "blur"]
  assert stats.kstest(radii, stats.uniform(0.1, 1.9).cdf).pvalue > _LEAST_P
  steps_agree([[(n, None if n == "blur" else v, h) for n, v, h in s] for s in ours], theirs)
  assert {len(steps) for steps in drawn(policies.three_augment, 50)} == {4}


@pytest.mark.parametrize("count", _DRAWS)
@pytest.mark.parametrize(
  ("law", "transform", "options"),
  [
    (policies.rand_augment, transforms.RandAugment(2, 9), {}),
    (policies.rand_augment, transforms.RandAugment(1, 30), {"n": 1, "m": 30}),
    (policies.trivial_augment, transforms.TrivialAugmentWide(), {}),
    (policies.auto_augment, transforms.AutoAugment(), {}),
  ],
  ids=["rand 9", "rand 30", "trivial", "auto"],
)
def test_draws_of_torchvision(law, transform, options, count, monkeypatch):
  theirs = torchvision_drawn(transform, count, monkeypatch)
  steps_agree(without_how(drawn(law, count, **options)), theirs)


@pytest.mark.parametrize("count", _DRAWS)
def test_draws_of_color_jitter(count):
  jitter = transforms.ColorJitter(0.4, 1.3, 0.2, 0.1)
  names = ("brightness", "contrast", "saturation", "hue")
  torch.manual_seed(4)
  ranges = (jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)
  theirs = []
  for _ in range(count):
    order, *factors = jitter.get_params(*ranges)
    theirs.append([(names[i], factors[i], "") for i in order.tolist()])
  options = {"brightness": 0.4, "contrast": 1.3, "saturation": 0.2, "hue": 0.1}
  ours = drawn(policies.color_jitter, count, **options)
  steps_agree(ours, theirs)
  orders = [
    [" ".join(name for name, _, _ in steps) for steps in sample] for sample in (ours, theirs)
  ]
  counts_agree(*orders, "orders")


@pytest.mark.parametrize("count", _DRAWS)
def test_draws_of_random_erasing(count):
  blank = torch.zeros(3, 64, 96)
  torch.manual_seed(5)
  theirs = []
  for _ in range(count):
    top, left, height, width, _ = transforms.RandomErasing.get_params(
      blank, (0.02, 0.33), (0.3, 3.3), [0.0]
    )
    theirs.append((top, left, height, width))
  rng = np.random.default_rng(6)
  ours = [policies.random_erasing((64, 96), rng, p=1.0)[0].arguments[:4] for _ in range(count)]
  for i, what in enumerate(("top", "left", "height", "width")):
    assert stats.ks_2samp([o[i] for o in ours], [t[i] for t in theirs]).pvalue > _LEAST_P, what
  occurs = sum(bool(policies.random_erasing((64, 96), rng, p=0.25)) for _ in range(count))
  assert stats.binomtest(occurs, count, 0.25).pvalue > _LEAST_P


@pytest.mark.parametrize("count", _DRAWS)
def test_draws_of_crops(count):
  torch.manual_seed(7)
  area, aspect = (0.08, 1.0), (3 / 4, 4 / 3)
  blank = torch.zeros(3, 375, 500)
  theirs = [
    transforms.RandomResizedCrop.get_params(blank, list(area), list(aspect)) for _ in range(count)
  ]
  rng = np.random.default_rng(8)
  ours = [image.draw_box(375, 500, rng, area, aspect) for _ in range(count)]
  for i, what in enumerate(("top", "left", "height", "width")):
    assert stats.ks_2samp([o[i] for o in ours], [t[i] for t in theirs]).pvalue > _LEAST_P, what


def test_whole_pixels_are_those_of_torchvision():
  for size in (32, 160, 176, 192, 224, 288):
    space = transforms.RandAugment()._augmentation_space(31, (size, size))["TranslateX"][0]
    ours = policies._torchvision_space(31, (size, size))["TranslateX"]
    assert [int(v) for v in ours] == [int(v) for v in space.tolist()]
  wide = transforms.TrivialAugmentWide()._augmentation_space(31)["TranslateX"][0]
  assert [int(v) for v in policies._wide_space()["TranslateX"]] == [int(v) for v in wide.tolist()]


def _views():
  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  return [picture(1, 224, 224), noise]


def test_pixels_of_torchvision_at_every_magnitude_of_trivial_augment():
  space = transforms.TrivialAugmentWide()._augmentation_space(31)
  how = transforms.InterpolationMode.BILINEAR
  for view in _views():
    for name, (magnitudes, signed) in space.items():
      for number in (0, 5, 17, 30) if magnitudes.ndim else (0,):
        for u_sign, sign in ((0.1, -1), (0.9, 1)) if signed else ((0.1, 1),):
          magnitude = sign * float(magnitudes[number]) if magnitudes.ndim else 0.0
          expected = autoaugment._apply_op(Image.fromarray(view), name, magnitude, how, None)
          found = view.copy()
          for step in policies._torchvision_step(
            policies._wide_space(), name, number, u_sign, "bilinear", (0, 0, 0)
          ):
            found = step.do(found, *step.arguments)
          differ(found, expected, f"{name} {magnitude}")


@pytest.mark.parametrize("inc", [False, True])
def test_pixels_of_timm_at_fixed_magnitudes(inc, monkeypatch):
  fill = (124, 116, 104)
  for view in _views():
    for name in timm_augment.rand_augment_choices("", inc):
      plain = name.replace("Increasing", "").replace("Rel", "")
      for how in ("bilinear", "bicubic"):
        for level in (0.0, 0.35, 0.7, 1.0):
          for sign in (-1.0, 1.0):
            monkeypatch.setattr(timm_augment, "_randomly_negate", lambda v, sign=sign: v * sign)
            hparams = {"img_mean": fill, "interpolation": Image.Resampling[how.upper()]}
            operation = timm_augment.AugmentOp(name, 1.0, 10 * level, hparams)
            step = policies._timm_step(plain, level, sign, inc, view.shape[:2], how, fill)
            if step == (pixels.posterize, (0,)):
              continue  # black in ours and in EfficientNet's code; Pillow 13 refuses it
            found = step.do(view.copy(), *step.arguments)
            differ(found, operation(Image.fromarray(view)), f"{name} {level} {how}")


def differ(found, expected, what):
  """Fail if an image differs from another one by more than a level."""
  difference = np.abs(found.astype(int) - np.asarray(expected).astype(int)).max()
  assert difference <= 1, (what, difference)


def test_hue_and_blur_are_those_of_torchvision_and_timm():
  view = picture(2, 96, 120)
  for turn in (-0.5, -0.07, 0.21):
    expected = transforms.functional.adjust_hue(Image.fromarray(view), turn)
    differ(pixels.hue(view.copy(), turn), expected, turn)
  for radius in (0.3, 1.9):
    expected = timm_augment.gaussian_blur(Image.fromarray(view), radius)
    differ(pixels.blur(view.copy(), radius), expected, radius)
