"""Mixing and erasing against timm and torchvision: what is drawn, and what is done with it.

Each law is compared over 20,000 draws by two-sample tests with fixed seeds. A test that does not
notice another law proves nothing, so laws a little apart must fail it.
"""

import functools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from trainer import augment

torch = pytest.importorskip("torch", reason="needs the extra parity")
timm_mixup = pytest.importorskip("timm.data.mixup", reason="needs the extra parity")
timm_erasing = pytest.importorskip("timm.data.random_erasing", reason="needs the extra parity")
transforms = pytest.importorskip("torchvision.transforms.v2", reason="needs the extra parity")

DRAWS, SIZE = 20_000, (224, 192)
LEAST = 1e-3  # probability of a difference as large as seen, were the laws the same


def same_law(ours, theirs):
  """The smallest p over the columns of two samples [DRAWS, columns] and of their differences.

  In float32 many a share rounds to 0 or 1 that is not quite so in float64, so six decimals count.
  """
  ours, theirs = (np.round(np.reshape(x, (DRAWS, -1)).astype(float), 6) for x in (ours, theirs))
  columns = range(ours.shape[1])
  pairs = [(i, j) for i in columns for j in columns if i < j]
  return min(
    [stats.ks_2samp(ours[:, i], theirs[:, i]).pvalue for i in columns]
    + [  # not only each for itself
      stats.ks_2samp(ours[:, i] - ours[:, j], theirs[:, i] - theirs[:, j]).pvalue for i, j in pairs
    ]
  )


def draw(seed=0, **options):
  """Return share, box and choice of so many groups, as trainer.augment draws them."""
  options = {
    "mixup": 0.0,
    "cutmix": 0.0,
    "p": 1.0,
    "switch": 0.5,
    "box": "timm",
    "fold": False,
  } | options
  drawn = jax.jit(functools.partial(augment.draw_mix, count=DRAWS, size=SIZE, **options))(
    jax.random.key(seed)
  )
  return tuple(np.asarray(x) for x in drawn)


def of_timm(**options):
  """Return the same of timm's Mixup, a batch for each draw."""
  np.random.seed(0)
  mixup, rows = timm_mixup.Mixup(**options), []
  for _ in range(DRAWS):
    share, cut = mixup._params_per_batch()
    box = (0, 0, 0, 0)
    if cut:
      box, share = timm_mixup.cutmix_bbox_and_lam((3, *SIZE), share)
    rows.append((share, *box, cut))
  rows = np.array(rows, float)
  return rows[:, 0], rows[:, 1:5], rows[:, 5] == 1


def test_timm_share_box_and_choice():
  ours = draw(mixup=0.2, cutmix=1.0, p=0.8, switch=0.3)
  theirs = of_timm(mixup_alpha=0.2, cutmix_alpha=1.0, prob=0.8, switch_prob=0.3)
  assert same_law(ours[0], theirs[0]) > LEAST
  # What is not mixed at all has no choice in timm.
  unmixed = [(share > 1 - 1e-6).mean() for share in (ours[0], theirs[0])]
  assert unmixed[0] == pytest.approx(unmixed[1], abs=0.012)
  cut = [(box[:, 1] > box[:, 0]).mean() for box in (ours[1], theirs[1])]
  assert cut[0] == pytest.approx(cut[1], abs=0.012)


def test_timm_boxes():
  ours, theirs = draw(cutmix=1.0), of_timm(mixup_alpha=0.0, cutmix_alpha=1.0)
  assert same_law(ours[1], theirs[1]) > LEAST
  assert same_law(ours[0], theirs[0]) > LEAST
  assert ours[2].all()


@pytest.fixture(scope="module")
def torchvision_boxes():
  torch.manual_seed(0)
  cutmix, image = transforms.CutMix(alpha=1.0, num_classes=10), torch.zeros(1, 3, *SIZE)
  drawn = [cutmix.make_params([image]) for _ in range(DRAWS)]
  boxes = np.array([params["box"] for params in drawn])[:, [1, 3, 0, 2]]
  return boxes, np.array([params["lam_adjusted"] for params in drawn])


def test_torchvision_boxes(torchvision_boxes):
  share, boxes, _ = draw(cutmix=1.0, box="torchvision")
  assert same_law(boxes, torchvision_boxes[0]) > LEAST
  assert same_law(share, torchvision_boxes[1]) > LEAST
  # Sides are even but where the border cuts them, in torchvision's law only.
  odd = [odd_sides(boxes) for boxes in (boxes, torchvision_boxes[0], draw(cutmix=1.0)[1])]
  assert odd[:2] == [0, 0] and odd[2] == pytest.approx(0.5, abs=0.02)


def odd_sides(boxes):
  """Return the share of odd heights among boxes that the border does not cut."""
  inner = boxes[(boxes[:, 0] > 0) & (boxes[:, 1] < SIZE[0])]
  return ((inner[:, 1] - inner[:, 0]) % 2).mean()


def test_the_test_tells_laws_apart(torchvision_boxes):
  other = draw(cutmix=0.7, box="torchvision")
  assert same_law(other[0], torchvision_boxes[1]) < 1e-6
  assert same_law(other[1], torchvision_boxes[0]) < 1e-6


@pytest.mark.parametrize("alpha", [0.1, 0.2, 1.0])
def test_shares_of_mixup(alpha):
  torch.manual_seed(1)
  mixup = transforms.MixUp(alpha=alpha, num_classes=10)
  theirs = [mixup.make_params([])["lam"] for _ in range(DRAWS)]
  ours = draw(mixup=alpha)[0]
  assert same_law(ours, theirs) > LEAST
  folded = draw(mixup=alpha, fold=True, seed=1)[0]
  assert same_law(folded, np.maximum(theirs, 1 - np.array(theirs))) > LEAST


class Recorder:
  """An image that notes what is written to it."""

  def __init__(self):
    self.box = (0, 0, 0, 0)

  def __setitem__(self, index, value):
    _, rows, columns = index
    self.box = (rows.start, rows.stop, columns.start, columns.stop)


def test_timm_erasing():
  random.seed(0)
  erasing, boxes = timm_erasing.RandomErasing(probability=0.6, mode="const", device="cpu"), []
  for _ in range(DRAWS):
    image = Recorder()
    erasing._erase(image, 3, *SIZE, torch.float32)
    boxes.append(image.box)
  ours = draw_boxes(p=0.6, area=(0.02, 1 / 3), aspect=(0.3, 1 / 0.3))
  assert same_law(ours, boxes) > LEAST


def test_torchvision_erasing():
  torch.manual_seed(0)
  erasing, boxes = transforms.RandomErasing(p=1.0), []
  image = torch.zeros(3, *SIZE)
  for _ in range(DRAWS):
    found = erasing.make_params([image])
    boxes.append((found["i"], found["i"] + found["h"], found["j"], found["j"] + found["w"]))
  ours = draw_boxes(p=1.0, area=(0.02, 0.33), aspect=(0.3, 3.3))
  assert same_law(ours, boxes) > LEAST
  assert same_law(draw_boxes(p=1.0, area=(0.02, 0.36), aspect=(0.3, 3.3)), boxes) < 1e-6


def draw_boxes(**options):
  drawn = functools.partial(augment.draw_boxes, count=DRAWS, size=SIZE, **options)
  return np.asarray(jax.jit(drawn)(jax.random.key(0)))


IMAGES = np.random.default_rng(0).normal(size=(8, 32, 24, 3)).astype(np.float32)
LABELS = np.array([3, 1, 4, 1, 5, 0, 2, 5])
CLASSES = 6


def ours(seed, **options):
  """Return mixed images and targets of one group of 8, and what was drawn for it."""
  key, targets = jax.random.key(seed), jax.nn.one_hot(LABELS, CLASSES)
  images, targets = augment.mix(key, jnp.asarray(IMAGES), targets, **options)
  law = {"mixup": 0.0, "cutmix": 0.0, "p": 1.0, "switch": 0.5, "box": "timm", "fold": False}
  law |= {name: value for name, value in options.items() if name in law}
  drawn = augment.draw_mix(key, 1, IMAGES.shape[1:3], **law)
  share, box, whole = (np.asarray(x)[0] for x in drawn)
  return np.asarray(images), np.asarray(targets), float(share), box.tolist(), bool(whole)


@pytest.mark.parametrize("options", [{"mixup": 0.4}, {"cutmix": 1.0}], ids=str)
def test_pixels_and_labels_at_a_given_draw_are_those_of_timm(options, monkeypatch):
  smoothing = 0.1
  for seed in range(3):
    images, targets, share, box, cut = ours(seed, **options)
    theirs = timm_mixup.Mixup(num_classes=CLASSES, label_smoothing=smoothing)
    monkeypatch.setattr(theirs, "_params_per_batch", lambda share=share, cut=cut: (share, cut))
    monkeypatch.setattr(
      timm_mixup, "cutmix_bbox_and_lam", lambda *_, box=box, share=share, **__: (box, share)
    )
    x = torch.tensor(IMAGES.transpose(0, 3, 1, 2).copy())
    x, y = theirs(x, torch.tensor(LABELS))
    np.testing.assert_allclose(images, x.numpy().transpose(0, 2, 3, 1), atol=1e-6)
    # timm smooths before it mixes, the step after: the same.
    np.testing.assert_allclose((1 - smoothing) * targets + smoothing / CLASSES, y, atol=1e-6)


@pytest.mark.parametrize("options", [{"mixup": 0.4}, {"cutmix": 1.0}], ids=str)
def test_pixels_and_labels_at_a_given_draw_are_those_of_torchvision(options, monkeypatch):
  for seed in range(3):
    images, targets, share, (top, bottom, left, right), cut = ours(
      seed, **options, partner="roll", box="torchvision"
    )
    theirs = (transforms.CutMix if cut else transforms.MixUp)(num_classes=CLASSES)
    params = {"lam": share, "lam_adjusted": share, "box": (left, top, right, bottom)}
    monkeypatch.setattr(theirs, "make_params", lambda _, params=params: params)
    # Their partner is the example before, ours the one after: turn the batch round.
    x = torch.tensor(IMAGES[::-1].transpose(0, 3, 1, 2).copy())
    x, y = theirs(x, torch.tensor(LABELS[::-1].copy()))
    np.testing.assert_allclose(images, x.numpy().transpose(0, 2, 3, 1)[::-1], atol=1e-6)
    np.testing.assert_allclose(targets, y.numpy()[::-1], atol=1e-6)


def test_pixels_of_big_vision():
  """a = max(a, 1 - a); a x + (1 - a) roll(x): written anew."""
  for seed in range(3):
    images, targets, share, _, _ = ours(seed, mixup=0.2, fold=True, partner="roll")
    assert share >= 0.5
    expected = share * IMAGES + (1 - share) * np.roll(IMAGES, -1, axis=0)
    np.testing.assert_allclose(images, expected, atol=1e-6)
    one_hot = np.eye(CLASSES)[LABELS]
    np.testing.assert_allclose(
      targets, share * one_hot + (1 - share) * np.roll(one_hot, -1, axis=0), atol=1e-6
    )
