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
GAP = {"global_pool": "avg", "class_token": False}
# timm's name, and a remark behind "#": its options, and our fields.
NETS = {
  "vit_tiny_patch16_224": ({}, {"variant": "Ti"}),
  "vit_tiny_patch16_224#mean": ({**GAP, "fc_norm": False}, {"variant": "Ti", "pool": "mean"}),
  "vit_tiny_patch16_224#big_vision": (
    {**GAP, "fc_norm": False, "act_layer": "gelu_tanh"},
    {
      "variant": "Ti",
      "pool": "mean",
      "positions": "sincos2d",
      "gelu": "tanh",
      "pre_logits": True,
    },
  ),
  "vit_small_patch32_224": (GAP, {"variant": "S", "patch": 32, "pool": "mean", "pool_first": True}),
  "deit3_small_patch16_224": ({}, {"variant": "S", "layer_scale": 1e-6, "token_position": False}),
  "vit_base_patch16_224": ({}, {"variant": "B"}),
  "vit_large_patch16_224": ({}, {"variant": "L"}),
}
QUICK = ("vit_tiny_patch16_224",)
NAMES = [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NETS]


def make(name, dtype):
  """Returns a pair of nets for images of SIZE; no vector in them is 0 or 1."""
  options, fields = NETS[name]
  size = 3 * fields.get("patch", 16)
  timm_name = f"timm:{name.partition('#')[0]}"
  return VitPair(
    timm_name, dtype, {"img_size": size, **options}, size, name="vit", scan=True, **fields
  )


class VitPair(Pair):
  """A pair whose zero-initialised scales, tokens and biases are random as well."""

  def adapt(self, model, fields):
    """Make of timm's net what it has no option for."""
    if fields.get("pre_logits"):
      width = model.head.in_features
      model.pre_logits = torch.nn.ModuleDict({"fc": torch.nn.Linear(width, width)})
      model.head.register_forward_pre_hook(
        lambda _, inputs: torch.tanh(model.pre_logits["fc"](inputs[0]))
      )
    if fields.get("positions") == "sincos2d":
      del model.pos_embed
      model.register_buffer(
        "pos_embed", big_visions_positions(3, model.embed_dim), persistent=False
      )
    with torch.no_grad():
      for name, parameter in model.named_parameters():
        if name.endswith("gamma"):
          parameter.uniform_(0.5, 1.5)
        elif name.endswith(("bias", "token", "embed")) or "head" in name:
          parameter.normal_(0, 0.1)


def big_visions_positions(grid, width):
  """Returns float32 [1, grid * grid, width]: sines and cosines of x, then of y."""
  y, x = np.mgrid[:grid, :grid]
  omega = 1 / 10_000 ** (np.arange(width // 4) / (width // 4 - 1))
  x, y = (np.einsum("m,d->md", places.flatten(), omega) for places in (x, y))
  parts = [np.sin(x), np.cos(x), np.sin(y), np.cos(y)]
  return torch.from_numpy(np.concatenate(parts, axis=1)[None].astype(np.float32))


def forward(pair, x):
  return jax.jit(lambda variables, x: pair.model.merge(variables, None)(x))(pair.variables, x)


@pytest.mark.parametrize("name", NAMES)
def test_logits(name):
  """At the size that the nets are for, and at another, with resampled positions."""
  pair = make(name, "float32")
  patch = pair.config.patch
  x = images(3 * patch, "float32")
  with torch.no_grad():
    expected = pair.theirs.eval()(to_torch(x)).numpy()
    assert distance(forward(pair, x), expected) < 1e-4
    if "big_vision" in name:  # its positions are not resampled
      return
    pair.theirs.set_input_size((5 * patch, 4 * patch))
    x = np.random.default_rng(1).normal(size=(2, 5 * patch, 4 * patch, 3)).astype("float32")
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
