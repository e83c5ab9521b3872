"""Operations on the host: what they do, whose random numbers they use, what is refused."""

import numpy as np
import pytest

from input_pipeline import augment
from input_pipeline.errors import DataError
from tests.input_pipeline.conftest import data_config, encoded, picture
from tests.input_pipeline.test_loader import Memory, digest, evaluate, joined, memory, opened, take

_HERE = "tests.input_pipeline.test_augment"
_MIXED = f"invert(p=0.5)|{_HERE}:shifted(most=40)|solarize(p=0.3, threshold=100)|grayscale(p=0.4)"


def shifted(image, rng, *, most):
  """Add a random number to all values; an operation from outside of the package."""
  return image + rng.integers(0, most, dtype=np.uint8)


def cropped(image, rng):
  return image[1:]


def floated(image, rng):
  return image.astype(np.float32)


def nothing(image, rng):
  return None


def applied(spec, image, seed=0):
  image = image.copy()
  augment.apply(augment.parse(spec), image, np.random.default_rng(seed))
  return image


def test_what_the_operations_do():
  image = picture(1)
  np.testing.assert_array_equal(applied("invert(p=1)", image), 255 - image)
  np.testing.assert_array_equal(
    applied("solarize(p=1, threshold=90)", image), np.where(image < 90, image, 255 - image)
  )
  np.testing.assert_array_equal(applied("solarize(p=1)", image), np.minimum(image, 255 - image))
  grey = applied("grayscale(p=1.0)", image).astype(int)
  np.testing.assert_allclose(grey[..., 0], image @ [0.299, 0.587, 0.114], atol=1)
  assert (grey == grey[..., :1]).all()
  for name in ("grayscale", "invert", "solarize", "random_erasing"):
    np.testing.assert_array_equal(applied(f"{name}(p=0)", image), image)
    changed = [not np.array_equal(applied(f"{name}(p=0.3)", image, s), image) for s in range(200)]
    assert 40 <= sum(changed) <= 80


def test_they_follow_each_other_and_draw_from_one_generator():
  image, rng = picture(2), np.random.default_rng(5)
  expected = image if rng.random() >= 0.5 else 255 - image
  expected = shifted(expected, rng, most=9)
  found = applied(f" invert(p=0.5) | {_HERE}:shifted(most=9)", image, seed=5)
  np.testing.assert_array_equal(found, expected)
  assert augment.parse("") == []


def test_without_operations_not_a_bit_changes_and_with_them_crops_stay(shards):
  before = take(*opened(shards), 4)
  assert digest(take(*opened(shards, operations=""), 4)) == digest(before)
  inverted = take(*opened(shards, operations="invert(p=1)"), 4)
  for one, other in zip(before, inverted, strict=True):
    np.testing.assert_array_equal(other["image"], 255 - one["image"])
  some = take(*opened(shards, operations="invert(p=0.5)"), 4)
  same = [(a["image"] == b["image"]).all((1, 2, 3)) for a, b in zip(before, some, strict=True)]
  assert 8 <= np.concatenate(same).sum() <= 24


@pytest.mark.parametrize("kind", ["array_record", "stream"])
def test_hosts_threads_processes_and_a_restart_change_nothing(shards, kind):
  fields = {"kind": kind, "operations": _MIXED, "stream_lanes": 4, "stream_block": 4}
  expected = take(*opened(shards, **fields), 8)
  assert digest(expected) != digest(take(*opened(shards, **(fields | {"operations": ""})), 8))
  parts = [take(*opened(shards, **fields), 8, host=host, hosts=2) for host in (0, 1)]
  assert digest(joined(parts)) == digest(expected)
  assert digest(take(*opened(shards, threads=0, **fields), 8)) == digest(expected)
  assert digest(take(*opened(shards, workers=2, **fields), 8)) == digest(expected)
  assert digest(take(*opened(shards, **fields), 3, first_step=5)) == digest(expected[5:])


# Every operation of the package, and the draws of crop and interpolation.
_ALL = (
  "timm_rand_augment(n=2, m=9, mstd=0.5, inc=1, p=0.9)|"
  "timm_rand_augment(n=1, m=5, mstd=101, inc=0)|"
  "rand_augment(n=2, m=12)|"
  "trivial_augment(interpolation='nearest')|"
  "auto_augment()|"
  "auto_augment(policy='v0')|"
  "three_augment()|"
  "color_jitter(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1)|"
  "random_erasing(p=0.5)|" + _MIXED
)


@pytest.mark.parametrize("kind", ["array_record", "stream"])
def test_with_everything_on_hosts_processes_and_a_restart_change_nothing(shards, kind):
  assert all(f"{name}(" in _ALL for name in augment.OPERATIONS)
  fields = {
    "kind": kind,
    "operations": _ALL,
    "interpolation": "random",
    "repeats": 3,
    "stream_lanes": 4,
    "stream_block": 4,
  }
  expected = take(*opened(shards, **fields), 7)  # more than two epochs
  assert digest(take(*opened(shards, **fields), 7)) == digest(expected)
  for hosts in (2, 4):
    parts = [take(*opened(shards, **fields), 7, host=h, hosts=hosts) for h in range(hosts)]
    assert digest(joined(parts)) == digest(expected)
  assert digest(take(*opened(shards, workers=3, **fields), 7)) == digest(expected)
  for first in (1, 5):
    resumed = take(*opened(shards, **fields), 7 - first, first_step=first)
    assert digest(resumed) == digest(expected[first:])
  assert digest(take(*opened(shards, **fields), 7, seed=1)) != digest(expected)


def test_evaluation_has_none():
  source = memory(8)
  plain = evaluate(source, data_config(""))
  assert digest(evaluate(source, data_config("", operations="invert(p=1)"))) == digest(plain)


@pytest.mark.parametrize(
  ("spec", "says"),
  [
    ("inverted(p=0.5)", "is 'inverted'; did you mean invert"),
    ("blur(p=0.5)", "is 'blur'; there is grayscale, invert, solarize"),
    ("invert(q=0.5)", "invert has no argument 'q'; there is p"),
    ("invert", "invert needs a value of p"),
    ("invert(0.5)", "arguments are given by name"),
    ("invert(p=half)", r"the arguments of invert\(p=half\) cannot be read"),
    ("invert(p=1.5)", r"invert refuses its arguments: p=1.5 must be in \[0, 1\]"),
    ("invert(p='no')", "invert refuses its arguments"),
    ("solarize(p=0.1, threshold=300)", r"threshold=300 must be in \[0, 255\]"),
    ("invert(p=0.5", "invert"),
    (
      "rand_augment(m=31)",
      r"rand_augment refuses its arguments: m=31 must be an integer in \[0, 30\]",
    ),
    ("rand_augment(m=2.5)", "m=2.5 must be an integer"),
    ("rand_augment(n=0)", "n=0 operations must be 1 or more"),
    ("rand_augment(interpolation='cubic')", "interpolation='cubic' must be nearest, bilinear"),
    ("rand_augment(fill=(0, 0))", r"fill=\(0, 0\) must be three integers"),
    ("trivial_augment(fill=(0, 0, 256))", "fill=.* must be three integers in"),
    ("timm_rand_augment", "timm_rand_augment needs a value of m"),
    ("timm_rand_augment(m=11)", r"m=11 must be in \[0, 10\]"),
    ("timm_rand_augment(m=7, p=-0.1)", r"p=-0.1 must be in \[0, 1\]"),
    ("timm_rand_augment(m=7, mstd=-1)", "mstd=-1 must be 0 or more"),
    ("auto_augment(policy='cifar10')", "policy='cifar10' must be imagenet or v0"),
    ("color_jitter(hue=0.6)", r"hue=0.6 must be in \[0, 0.5\]"),
    ("color_jitter(contrast=-0.1)", "contrast=-0.1 must be 0 or more"),
    ("three_augment(jitter=-1)", "brightness=-1 must be 0 or more"),
    ("random_erasing(p=2)", r"p=2 must be in \[0, 1\]"),
    ("random_erasing(area=(0.1, 1.2))", "must be 0 < low <= high <= 1, shares of the image"),
    ("random_erasing(aspect=(2, 1))", "must be 0 < low <= high"),
    ("|", "which is not NAME"),
    ("no.such:thing(p=1)", "cannot be imported"),
    (f"{_HERE}:cropped", r"cropped returned uint8 \[7, 8, 3\] for an image of uint8 \[8, 8, 3\]"),
    (f"{_HERE}:floated", r"floated returned float32 \[8, 8, 3\]"),
    (f"{_HERE}:nothing", "nothing returned NoneType"),
  ],
)
def test_what_is_wrong_is_one_sentence(spec, says):
  with pytest.raises(DataError, match=says) as e:
    take(memory(3), data_config("", operations=spec), 1)
  assert "config.data.operations" in str(e.value)
  assert "\n" not in str(e.value)


def late(image, rng):
  """Fails only at the size of a batch, not at the one of the trial."""
  return image if len(image) == 8 else image[:, :-1]


@pytest.mark.parametrize("workers", [0, 1])
def test_an_operation_that_fails_later_ends_the_run(shards, workers):
  with pytest.raises(DataError, match=r"late returned uint8 \[16, 15, 3\] for an image of uint8"):
    take(*opened(shards, operations=f"{_HERE}:late", workers=workers), 1)


def test_a_bad_record_draws_what_its_replacement_draws():
  files = [encoded(picture(i, 24, 24)) for i in range(4)]
  data = data_config("", operations=_MIXED, max_bad_fraction=1.0)
  whole, damaged = Memory(files), Memory([b"", *files[1:]])
  one, other = take(whole, data, 3), take(damaged, data, 3)
  for a, b in zip(one, other, strict=True):
    np.testing.assert_array_equal(a["image"][~b["bad"]], b["image"][~b["bad"]])
