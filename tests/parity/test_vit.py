"""Vision Transformers against timm's and torchvision's, with the same random weights."""

import jax
import numpy as np
import pytest

from tests.parity.test_models import Pair, compare_a_step, distance, images, to_torch
from trainer.models import vit

torch = pytest.importorskip("torch", reason="needs the extra parity")
timm = pytest.importorskip("timm", reason="needs the extra parity")
torchvision = pytest.importorskip("torchvision", reason="needs the extra parity")

SIZE = 48
MEAN = {"pool": "mean", "pool_first": True}
# timm's name: its options, and our fields.
NETS = {
  "vit_tiny_patch16_224": ({}, {"variant": "Ti"}),
  "vit_small_patch16_224": (
    {"global_pool": "avg", "class_token": False},
    {"variant": "S", **MEAN},
  ),
  "deit3_small_patch16_224": (
    {},
    {"variant": "S", "layer_scale": 1e-6, "token_position": False},
  ),
  "vit_base_patch16_224": ({}, {"variant": "B"}),
  "vit_large_patch16_224": ({}, {"variant": "L"}),
}
QUICK = ("vit_tiny_patch16_224",)
NAMES = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NETS]


def make(name, dtype):
  """Returns a pair of nets for images of SIZE; no vector in them is 0 or 1."""
  options, fields = NETS[name]
  pair = Pair(
    f"timm:{name}", dtype, {"img_size": SIZE, **options}, SIZE, name="vit", scan=True, **fields
  )
  with torch.no_grad():
    for parameter_name, parameter in pair.theirs.named_parameters():
      if parameter_name.endswith("gamma"):
        parameter.uniform_(0.5, 1.5)
      elif parameter_name.endswith(("bias", "token", "embed")) or "head" in parameter_name:
        parameter.normal_(0, 0.1)
  pair.variables = pair.of_torch(pair.theirs.state_dict())
  return pair


def forward(pair, x):
  return jax.jit(lambda variables, x: pair.model.merge(variables, None)(x))(pair.variables, x)


@pytest.mark.parametrize("name", NAMES)
def test_logits(name):
  """At the size that the nets are for, and at another, with resampled positions."""
  pair = make(name, "float32")
  x = images(SIZE, "float32")
  with torch.no_grad():
    expected = pair.theirs.eval()(to_torch(x)).numpy()
    assert distance(forward(pair, x), expected) < 1e-4
    pair.theirs.set_input_size((80, 64))
    x = np.random.default_rng(1).normal(size=(2, 80, 64, 3)).astype("float32")
    expected = pair.theirs.eval()(to_torch(x)).numpy()
  assert distance(forward(pair, x), expected) < 1e-4


def test_one_step_of_sgd_in_float64():
  compare_a_step(lambda: make("vit_tiny_patch16_224", "float64"), SIZE)


@pytest.mark.parametrize("grids", [(3, 5), (5, 3), (14, 24)])
def test_positions_of_another_grid(grids):
  from timm.layers import resample_abs_pos_embed

  before, after = grids
  fields = {"positions": "learned", "pool": "token", "token_position": True}
  array = np.random.default_rng(0).normal(size=(1, before**2 + 1, 8)).astype(np.float32)
  found = vit.ViT.resize("positions", array, (1, after**2 + 1, 8), fields)
  expected = resample_abs_pos_embed(
    torch.from_numpy(array), [after, after], [before, before], num_prefix_tokens=1
  )
  np.testing.assert_allclose(found, expected.numpy(), rtol=1e-5, atol=1e-6)
