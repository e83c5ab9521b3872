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
