"""Model FLOPs against published counts, and the peak of what the devices are."""

import math
import types

import pytest

from configs import base
from trainer import program as program_lib
from trainer.reporting import flops


def program_of(name, depth, size):
  config = base.get_config(name)
  config.model.depth = depth
  config.data.image_size = size
  return program_lib.build(config, num_examples=1000)


@pytest.mark.parametrize(
  "name, depth, size, multiply_adds",
  [
    # The "GFLOPS" of torchvision's weights, which are multiply-adds:
    # docs.pytorch.org/vision/stable/models.html
    ("resnet", 18, 224, 1.81e9),
    ("resnet", 50, 224, 4.09e9),
    ("resnet", 152, 224, 11.51e9),
  ],
)
def test_forward_flops_are_the_published_ones(name, depth, size, multiply_adds):
  program = program_of(name, depth, size)
  count = flops.forward_flops(program.model, program.abstract_state.for_eval(), size)
  assert count == pytest.approx(2 * multiply_adds, abs=2 * 5e6)


def device(kind, *coords, slice_index=0):
  return types.SimpleNamespace(device_kind=kind, coords=coords, slice_index=slice_index)


def test_peak_counts_chips_and_not_cores():
  assert (
    flops.peak([device("TPU v5 lite", x, y, 0) for x in range(4) for y in range(4)]) == 16 * 197e12
  )
  cores = [device("TPU v3", x, 0, 0) for x in range(4) for _ in range(2)]
  assert flops.peak(cores) == 4 * 123e12
  assert flops.peak([device("TPU v4", 0, 0, 0, slice_index=i) for i in range(2)]) == 2 * 275e12


def test_unknown_chips_have_no_peak():
  assert flops.peak([types.SimpleNamespace(device_kind="cpu")]) is None
  program = program_of("cifar_resnet", 8, 32)
  assert flops.peak(program.mesh.devices.flatten().tolist()) is None


def test_seconds_at_peak_of_a_step():
  program = program_of("resnet", 50, 224)
  work = 128 * flops.training_flops(program.model, program.abstract_state.for_eval(), 224)
  seconds = work / flops.peak([device("TPU v5 lite", 0, 0, 0)])
  # 3 * 2 * 4.09e9 * 128 / 197e12
  assert seconds == pytest.approx(15.9e-3, rel=5e-3)


@pytest.mark.parametrize(
  "name, fields",
  [
    ("resnet", {"depth": 50}),
    ("resnet", {"depth": 50, "scan": True, "pool_first": True, "bn_together": True}),
    ("vit", {"variant": "Ti"}),
    ("mdeq", {}),
  ],
)
def test_what_is_frozen_needs_fewer_products(name, fields):
  config = base.get_config(name)
  config.model.update(fields)
  program = program_lib.build(config, num_examples=1000)
  net = program.model, program.abstract_state.raw(), 64
  forward = flops.forward_flops(*net)
  head = 2 * math.prod(program.abstract_state.params["head"]["kernel"].shape)
  # Nothing in front of the head needs a gradient, nor does the input of the head.
  assert flops.training_flops(*net, "^(?!head/)") == forward + head
  # Of the head but the gradient of its kernel all is wanted: that of its input too.
  most = flops.training_flops(*net, "^head/kernel")
  assert 3 * forward - 2 * head > most > 2.5 * forward
  assert flops.training_flops(*net) == 3 * forward


def test_frozen_stages_need_no_gradient():
  """Multiply-adds of ResNet-18 by hand: gradients of stage 4, and of the inputs of its end."""
  program = program_of("resnet", 18, 224)
  net = program.model, program.abstract_state.raw(), 224
  first = 7 * 7 * 256 * 512 * 9, 7 * 7 * 256 * 512  # 3x3 and the shortcut, of frozen inputs
  others = 3 * 7 * 7 * 512 * 512 * 9
  head = 512 * 1000
  wanted = 2 * (sum(first) + 2 * (others + head))
  assert flops.training_flops(*net, "^(stem|stage[123])") == flops.forward_flops(*net) + wanted


def test_flops_of_smaller_images():
  """Multiply-adds of a ResNet-50 at the sizes of recipes, counted with torch's hooks."""
  program = program_of("resnet", 50, 224)
  variables = program.abstract_state.for_eval()
  for size, multiply_adds in ((160, 2.087e9), (176, 2.608e9), (192, 3.005e9)):
    found = flops.forward_flops(program.model, variables, size)
    assert found == pytest.approx(2 * multiply_adds, rel=1e-3)


def test_work_of_steps_of_several_sizes():
  work = flops.Work([(-3, 1.0), (5, 10.0), (8, 100.0)])
  each = [1.0] * 5 + [10.0] * 3 + [100.0] * 7
  for start in range(15):
    for stop in range(start, 16):
      assert work.between(start, stop) == sum(each[start:stop])
  assert flops.Work([(0, 2.0)]).between(3, 7) == 8
