"""ConvNeXt: published sizes and costs, names, first weights, scan, what is refused."""

from flax import nnx
import jax
import numpy as np
import pytest

from tests.trainer import tiny
from tests.trainer.shared import assert_refused
from tests.trainer.test_efficientnet import check_size_and_cost, shapes_of
from tests.trainer.test_variants import Step, config_of
from trainer import models, state
from trainer.models import convnext, packing
from trainer.weights import foreign


# Counted in timm 1.0.31, by its parameters and torch's FlopCounterMode.
@pytest.mark.parametrize(
  "variant, parameters, giga_multiply_adds",
  [
    ("t", 28_589_128, 4.456),
    ("s", 50_223_688, 8.684),
    ("b", 88_591_464, 15.355),
    ("l", 197_767_336, 34.361),
  ],
)
def test_sizes_and_costs_are_as_published(variant, parameters, giga_multiply_adds):
  check_size_and_cost("convnext", {"variant": variant}, parameters, 224, giga_multiply_adds)


@pytest.mark.parametrize(
  "leaf, timm, torchvision",
  [
    ("stem_conv/kernel", "stem.0.weight", "features.0.0.weight"),
    ("stage2_block1/halve_norm/scale", "stages.1.downsample.0.weight", "features.2.0.weight"),
    ("stage4_block1/halve_conv/bias", "stages.3.downsample.1.bias", "features.6.1.bias"),
    ("stage3_block9/scale/gamma", "stages.2.blocks.8.gamma", "features.5.8.layer_scale"),
    (
      "stage1_block2/depthwise_conv/bias",
      "stages.0.blocks.1.conv_dw.bias",
      "features.1.1.block.0.bias",
    ),
    (
      "stage4_block3/mlp2/kernel",
      "stages.3.blocks.2.mlp.fc2.weight",
      "features.7.2.block.5.weight",
    ),
    ("head_norm/scale", "head.norm.weight", "classifier.0.weight"),
    ("head/kernel", "head.fc.weight", "classifier.2.weight"),
  ],
)
def test_names_of_timm_and_torchvision(leaf, timm, torchvision):
  assert convnext.ConvNeXt.torch_name(leaf, {}) == timm
  tensors = {timm: np.zeros(8), "stages.0.blocks.0.gamma": np.zeros(8)}
  theirs = convnext.ConvNeXt.respell(tensors, "torchvision")
  assert {torchvision, "features.1.0.layer_scale"} == theirs.keys()
  assert theirs["features.1.0.layer_scale"].shape == (8, 1, 1)
  again = foreign.plain_names(theirs)
  assert {name: x.shape for name, x in again.items()} == dict.fromkeys(tensors, (8,))


def test_other_nets_are_not_respelt():
  assert convnext.ConvNeXt.respell({"features.0.0.weight": np.zeros(1)}, "timm") == {}
  more = {"stages.0.blocks.0.gamma": np.zeros(1), "more.weight": np.zeros(1)}
  assert convnext.ConvNeXt.respell(more, "torchvision") == {}


def test_title_and_guess():
  own = models.own_fields(config_of("convnext", width=0.5))
  assert convnext.ConvNeXt.describe(own) == "ConvNeXt-T, width 0.5"
  _, variables = shapes_of("convnext", variant="t")
  shapes = {}
  for path, leaf in jax.tree.leaves_with_path(packing.unpack(variables, packing.take)):
    ours = state.path_name(path[1:])
    theirs = convnext.ConvNeXt.torch_name(ours, {})
    shapes[theirs] = foreign.their_shape(ours, theirs, leaf.shape)
  assert str(foreign.guess(shapes)) == "convnext_tiny with 1,000 classes"


def test_first_weights_and_rates():
  config = tiny.get_config("convnext").model
  config.update({"drop_path": 0.5, "layer_scale": 1e-6})

  @jax.jit
  def start():
    net = models.create(config, image_size=16, rngs=nnx.Rngs(0, params=0))
    rates.extend(net.drop_path_rates)
    kernels = net.stage4_block1.mlp1, net.stage4_block1.halve_conv, net.stage3_block2.depthwise_conv
    return [
      layer.kernel.get_value() for layer in kernels
    ], net.stage4_block1.scale.gamma.get_value()

  rates = []
  kernels, gamma = start()
  assert rates == pytest.approx(np.linspace(0, 0.5, 6))  # of 1, 1, 3 and 1 blocks
  for kernel in kernels:
    assert np.std(kernel) == pytest.approx(0.02, rel=0.05)
  np.testing.assert_array_equal(gamma, np.float32(1e-6))


@pytest.mark.slow
def test_a_scan_changes_no_number():
  fields = {"width": 1 / 24, "repeats": 0.5, "patch": 1, "num_classes": 10, "dtype": "float64"}
  fields |= {"drop_path": 0.5, "dropout": 0.3, "layer_scale": 0.1, "remat": "dots"}
  unrolled, scanned = (Step("convnext", **fields, scan=scan) for scan in (False, True))
  scanned.check_equals(unrolled)
  assert scanned.lines < unrolled.lines


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"model.variant": "h"}, "config.model.variant must be one of t, s, b, l"),
    ({"model.width": 0.0}, "config.model.width must be positive"),
    (
      {"data.image_size": 40},
      "config.data.image_size has 40 pixels, which config.model",
    ),
    ({"data.eval_image_size": 7}, "the nearest that fits is 16"),
    ({"mesh.space": 2}, "set config.mesh.space to 1"),
  ],
)
def test_what_cannot_be_is_refused(fields, message):
  assert_refused("convnext", fields, message)
