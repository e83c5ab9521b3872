"""EfficientNet: published sizes and costs, names, export, scan, what is drawn and refused."""

import functools

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import base, image_sizes, recipes
from tests.trainer import tiny
from tests.trainer.shared import assert_refused
from tests.trainer.test_variants import Step, config_of
from trainer import config as config_lib
from trainer import models, state
from trainer.errors import ConfigError
from trainer.models import efficientnet, efficientnet_names, packing
from trainer.reporting import flops
from trainer.weights import export, foreign, read, safetensors
from trainer.weights import net as net_lib
from trainer.weights.about import About
from trainer.weights.errors import WeightsError


def slow(*values):
  return pytest.param(*values, marks=pytest.mark.slow)


@functools.cache
def shapes_of(name, **fields):
  """Returns the model of a family, and the shapes of its variables."""
  config = base.get_config(name)
  config.model.update({"scan": True, **fields})  # the same work, traced faster
  model, init = state.make_init(config, optax.identity(), 1)
  return model, jax.eval_shape(init).raw()


def count(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


def check_size_and_cost(name, fields, parameters, size, giga_multiply_adds):
  """Checks a net against numbers counted elsewhere; a size of 0 leaves out the cost."""
  model, variables = shapes_of(name, **fields)
  assert count(variables.params) == parameters
  if size:
    cost = flops.forward_flops(model, variables, size) / 2e9
    assert cost == pytest.approx(giga_multiply_adds, rel=5e-3)
  variables = packing.unpack(variables, packing.take)
  own = models.own_fields(config_of(name, **fields))
  leaves = [state.path_name(path[1:]) for path, _ in jax.tree.leaves_with_path(variables)]
  theirs = {models.family_of(config_of(name)).torch_name(leaf, own) for leaf in leaves}
  assert len(theirs) == len(leaves)  # no two leaves of a state dict have one name
  return variables


# Counted in timm 1.0.31, by its parameters and torch's FlopCounterMode.
@pytest.mark.parametrize(
  "variant, parameters, size, giga_multiply_adds",
  [
    ("b0", 5_288_548, 224, 0.386),
    slow("b1", 7_794_184, 240, 0.687),
    slow("b2", 9_109_994, 260, 0.994),
    slow("b3", 12_233_232, 300, 1.827),
    slow("b4", 19_341_616, 380, 4.394),
    slow("b5", 30_389_784, 456, 10.266),
    slow("b6", 43_040_704, 528, 19.068),
    slow("b7", 66_347_960, 600, 37.746),
    slow("b8", 87_413_142, 0, 0),
    slow("v2_b0", 7_139_704, 224, 0.718),
    slow("v2_b1", 8_141_052, 240, 1.197),
    ("v2_b2", 10_096_086, 260, 1.698),
    slow("v2_b3", 14_358_406, 300, 3.011),
    slow("v2_s", 21_458_488, 300, 5.308),
    slow("v2_s", 21_458_488, 384, 8.366),
    slow("v2_m", 54_139_356, 480, 24.582),
    slow("v2_l", 118_515_272, 480, 56.080),
  ],
)
def test_sizes_and_costs_are_as_published(variant, parameters, size, giga_multiply_adds):
  fields = {"variant": variant}
  variables = check_size_and_cost("efficientnet", fields, parameters, size, giga_multiply_adds)
  if variant == "b0":
    assert (len(jax.tree.leaves(variables.params)), count(variables.batch_stats)) == (213, 42_016)


@pytest.mark.parametrize(
  "variant, leaf, theirs",
  [
    ("b0", "stem_bn/scale", "bn1.weight"),
    ("b0", "stage1_block1/project_conv/kernel", "blocks.0.0.conv_pw.weight"),
    ("b0", "stage6_block4/depthwise_bn/mean", "blocks.5.3.bn2.running_mean"),
    ("b0", "stage2_block1/se_expand/bias", "blocks.1.0.se.conv_expand.bias"),
    ("v2_s", "stage1_block2/project_bn/var", "blocks.0.1.bn1.running_var"),
    ("v2_s", "stage2_block1/expand_conv/kernel", "blocks.1.0.conv_exp.weight"),
    ("v2_s", "head/kernel", "classifier.weight"),
  ],
)
def test_names_of_timm(variant, leaf, theirs):
  assert efficientnet.EfficientNet.torch_name(leaf, {"variant": variant}) == theirs


def test_title():
  own = models.own_fields(config_of("efficientnet", variant="v2_b0", padding="torch"))
  assert efficientnet.EfficientNet.describe(own) == "EfficientNetV2-B0, padding torch"
  own = models.own_fields(config_of("efficientnet", variant="b4"))
  assert efficientnet.EfficientNet.describe(own) == "EfficientNet-B4"


def test_spellings_are_each_others_inverse():
  for variant in ("b0", "v2_b2"):  # they have every kind of block
    _, variables = shapes_of("efficientnet", variant=variant)
    variables = packing.unpack(variables, packing.take)
    leaves = [state.path_name(path[1:]) for path, _ in jax.tree.leaves_with_path(variables)]
    timm = [efficientnet.EfficientNet.torch_name(leaf, {"variant": variant}) for leaf in leaves]
    new = efficientnet_names.respelt(timm, "torchvision")
    assert set(new) == set(timm) and len(set(new.values())) == len(timm)
    back = efficientnet_names.respelt(new.values(), "timm")
    assert back == {theirs: ours for ours, theirs in new.items()}
  assert efficientnet_names.respelt([*timm, "more.weight"], "torchvision") == {}
  assert efficientnet_names.respelt(["layer1.0.conv1.weight"], "torchvision") == {}
  assert efficientnet_names.respelt([], "timm") == {}


def write(folder, config):
  """Writes random weights of a net as export does; returns the net, its leaves and the file."""
  net = net_lib.build(config)
  leaves = net_lib.random_leaves(net)
  tensors = {
    net.torch_name(leaf): np.ascontiguousarray(net.theirs(leaf, leaves[leaf])) for leaf in leaves
  }
  path = folder / "weights.safetensors"
  words = About(config=config_lib.flatten(config)).words()
  path.write_bytes(b"".join(safetensors.encode(tensors, words)))
  return net, leaves, path


def test_export_by_torchvisions_names_reads_back(tmp_path):
  config = tiny.get_config("efficientnet")
  net, leaves, path = write(tmp_path, config)
  out = tmp_path / "out.safetensors"
  agreement = export.export(str(path), "safetensors", str(out), names="torchvision")
  assert agreement.difference == 0
  names, _ = safetensors.decode(np.frombuffer(out.read_bytes(), np.uint8))
  assert names["features.1.0.block.1.fc1.weight"].shape[2:] == (1, 1)
  assert "features.8.1.num_batches_tracked" in names
  again, _ = read.read_weights(str(out), net)
  assert all(np.array_equal(again[leaf], leaves[leaf]) for leaf in leaves)


def test_torchvisions_names_of_another_net_are_refused(tmp_path):
  _, _, path = write(tmp_path, tiny.get_config())
  with pytest.raises(WeightsError, match="--names=torchvision is for nets whose") as error:
    export.export(str(path), "safetensors", str(tmp_path / "out"), names="torchvision")
  assert "\n" not in str(error.value)


@pytest.mark.parametrize(
  "variant, name", [("b0", "efficientnet_b0"), ("v2_b2", "efficientnetv2_b2")]
)
def test_a_file_of_another_variant_is_named(variant, name):
  _, variables = shapes_of("efficientnet", variant=variant)
  variables = packing.unpack(variables, packing.take)
  shapes = {}
  for path, leaf in jax.tree.leaves_with_path(variables):
    ours = state.path_name(path[1:])
    theirs = efficientnet.EfficientNet.torch_name(ours, {"variant": variant})
    shapes[theirs] = foreign.their_shape(ours, theirs, leaf.shape)
  assert str(foreign.guess(shapes)) == f"{name} with 1,000 classes"


SMALL = {"width": 0.125, "repeats": 0.6, "num_classes": 10, "dtype": "float64"}
DROPS = {"drop_path": 0.5, "dropout": 0.3}


@pytest.mark.slow
def test_scan_remat_and_norms_together_change_no_number():
  unrolled = Step("efficientnet", **SMALL, **DROPS)
  Step("efficientnet", **SMALL, **DROPS, bn_together=True).check_equals(unrolled, times=100)
  recomputed = Step("efficientnet", **SMALL, **DROPS, remat="convs")
  scanned = Step("efficientnet", **SMALL, **DROPS, remat="convs", scan=True)
  recomputed.check_equals(unrolled)
  scanned.check_equals(unrolled)
  assert scanned.lines < recomputed.lines


def test_first_weights_are_those_of_the_source():
  config = config_of("efficientnet", num_classes=10)

  @jax.jit
  def kernels():
    net = models.create(config, image_size=32, rngs=nnx.Rngs(0))
    block = net.stage6_block2
    layers = net.stem_conv, block.depthwise_conv, block.expand_conv, net.head
    return [layer.kernel.get_value() for layer in layers]

  *convolutions, head = kernels()
  for kernel, fan_out in zip(convolutions, (9 * 32, 25, 1152), strict=True):
    assert np.std(kernel) == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
  assert 0.99 / 10**0.5 < np.abs(head).max() <= 1 / 10**0.5  # uniform


def test_a_branch_is_skipped_only_where_there_is_a_shortcut():
  rngs = nnx.Rngs(0)
  layers = efficientnet._Layers(
    "same", "float32", False, rngs, activation="silu", momentum=0.9, epsilon=1e-3
  )
  stage = efficientnet.Stage(1, 3, 1, 2, 8)
  x, none = jnp.ones((2, 4, 4, 8)), jnp.zeros((2, 1, 1, 1))
  same = efficientnet.Block(stage, 8, 8, 1, 2, layers)
  np.testing.assert_array_equal(same(x, none), x)
  wider = efficientnet.Block(stage, 8, 16, 1, 2, layers)
  np.testing.assert_array_equal(wider(x, none), wider(x))


def test_growing_images():
  text = image_sizes.equal_stages([171, 214, 257, 300], 350.0)
  assert text == "0:171, 87.5:214, 175:257, 262.5:300"
  config = recipes.load("imagenet_efficientnet:v2_s")
  assert config.data.image_sizes == text
  assert config_lib.durations(config, 1_281_167).sizes == tuple(
    (round(350 * 1_281_167 / 4096 * i / 4), size) for i, size in enumerate((171, 214, 257, 300))
  )


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"variant": "b9"}, "config.model.variant must be one of b0, b1, b2, b3, b4, b5, b6, b7, b8, "),
    ({"padding": "valid"}, "config.model.padding must be one of same, torch"),
    ({"width": 0.0}, "config.model.width must be positive"),
    ({"repeats": -1.0}, "config.model.repeats must be positive"),
    ({"se_ratio": 1.0}, "config.model.se_ratio must be in [0, 1)"),
    ({"drop_path": 1.0}, "config.model.drop_path must be in [0, 1)"),
  ],
)
def test_what_cannot_be_is_refused(fields, message):
  assert_refused(
    "efficientnet", {f"model.{name}": value for name, value in fields.items()}, message
  )


def test_groups_that_do_not_divide_the_batch_are_refused():
  config = tiny.get_config("efficientnet")
  config.model.bn_group = "3"
  with pytest.raises(ConfigError, match=r"config\.model\.bn_group is 3, which does not divide"):
    config_lib.check_split(config, num_devices=1)


@pytest.mark.parametrize(
  "family, fields",
  [
    ("efficientnet", {}),
    ("nfnet", {}),
    ("resnet", {"depth": 50, "width": 1.0, "groups": 32, "base_width": 4}),
  ],
)
def test_images_are_not_split_in_a_net_with_groups(family, fields):
  config = tiny.get_config(family)
  config.model.update(fields)
  config_lib.validate(config)
  config.mesh.space = 2
  with pytest.raises(ConfigError, match=r"set config\.mesh\.space to 1") as error:
    config_lib.validate(config)
  assert "\n" not in str(error.value)
