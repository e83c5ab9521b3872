"""What the tensors of others are called, and which net they are taken for."""

import numpy as np
import pytest

from trainer.weights import foreign
from trainer.weights.errors import WeightsError


@pytest.mark.parametrize(
  ("theirs", "plain"),
  [
    ("module._orig_mod.fc.bias", "fc.bias"),
    ("backbone.layer1.0.conv1.weight", "layer1.0.conv1.weight"),
    ("state_dict.layer1.0.conv1.weight", "layer1.0.conv1.weight"),
    ("linear.weight", "fc.weight"),
    ("layer2.0.shortcut.1.running_var", "layer2.0.downsample.1.running_var"),
    ("resnet.embedder.embedder.convolution.weight", "conv1.weight"),
    ("resnet.embedder.embedder.normalization.running_mean", "bn1.running_mean"),
    (
      "resnet.encoder.stages.2.layers.1.layer.2.normalization.bias",
      "layer3.1.bn3.bias",
    ),
    ("resnet.encoder.stages.0.layers.0.layer.1.convolution.weight", "layer1.0.conv2.weight"),
    (
      "resnet.encoder.stages.3.layers.0.shortcut.convolution.weight",
      "layer4.0.downsample.0.weight",
    ),
    (
      "resnet.encoder.stages.3.layers.0.shortcut.normalization.bias",
      "layer4.0.downsample.1.bias",
    ),
    ("classifier.1.weight", "fc.weight"),
  ],
)
def test_spellings(theirs, plain):
  assert list(foreign.plain_names({theirs: np.zeros(1)})) == [plain]


def test_counters_are_left_out():
  assert not foreign.plain_names({"module.bn1.num_batches_tracked": np.zeros(())})


def test_twins_are_refused():
  with pytest.raises(WeightsError, match=r"two tensors that mean 'fc\.bias'"):
    foreign.plain_names({"module.fc.bias": np.zeros(1), "fc.bias": np.zeros(1)})


@pytest.mark.parametrize(
  ("blocks", "inner", "more", "name"),
  [
    ((2, 2, 2, 2), (64, 64), {}, "resnet18"),
    ((3, 4, 6, 3), (64, 64), {}, "resnet34"),
    ((3, 4, 6, 3), (64, 64), {"layer1.0.conv3.weight": ()}, "resnet50"),
    ((3, 4, 23, 3), (64, 64), {"layer1.0.conv3.weight": ()}, "resnet101"),
    ((3, 4, 6, 3), (128, 4), {"layer1.0.conv3.weight": ()}, "resnext50_32x4d"),
    ((3, 4, 6, 3), (128, 128), {"layer1.0.conv3.weight": ()}, "wide_resnet50_2"),
    ((2, 2, 2, 2), (64, 64), {"conv1.0.weight": ()}, "resnet18d"),
    ((2, 2, 2, 2), (64, 64), {"layer1.0.se.fc1.weight": ()}, "seresnet18"),
    ((2, 2, 2, 2), (16, 16), {}, "resnet18 of width 0.25"),
    ((3, 3, 3), (16, 16), {}, "a CIFAR ResNet-20 with option A"),
    (
      (3, 3, 3),
      (16, 16),
      {"layer2.0.downsample.0.weight": ()},
      "a CIFAR ResNet-20 with option B",
    ),
    ((1, 5, 2, 2), (64, 64), {}, "a ResNet of 1, 5, 2, 2 basic blocks"),
  ],
)
def test_guesses(blocks, inner, more, name):
  shapes = {
    f"layer{stage}.{block}.conv2.weight": (*inner, 3, 3)
    for stage, number in enumerate(blocks, 1)
    for block in range(number)
  }
  guess = foreign.guess(shapes | more | {"fc.weight": (7, 512)})
  assert (guess.name, guess.classes) == (name, 7)


@pytest.mark.parametrize(
  ("more", "name"),
  [
    (("norm.running_mean", "stem.conv.weight"), "resnetv2_18"),
    (("norm.running_mean", "stem.conv1.weight"), "resnetv2_18d"),
    (("stem.conv.weight",), "resnetv2_18 without batch norm"),
  ],
)
def test_guesses_nets_with_the_norm_before_the_convolution(more, name):
  blocks = [f"stages.{stage}.blocks.{block}" for stage in range(4) for block in range(2)]
  shapes = {f"{block}.conv2.weight": (64, 64, 3, 3) for block in blocks}
  assert foreign.guess(shapes | dict.fromkeys(more, (64,))).name == name


def test_guesses_nothing():
  assert str(foreign.guess({"head.0.weight": (3, 3)})) == "no net of this family"
