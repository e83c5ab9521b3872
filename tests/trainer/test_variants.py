"""Residual nets by field: published sizes, names, scan and remat, stochastic depth, blur."""

import functools
import itertools
import math
import os
import re
import subprocess
import sys

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from trainer import models, state
from trainer.models import layers, stack
from trainer.models.norm import BatchNorm, as_rows


def config_of(name, **fields):
  """Returns `config.model` of a family with `fields` set."""
  config = base.get_config(name).model
  config.update({"dtype": "float32", **fields})
  return config


def abstract(name, **fields):
  """Returns the model with shapes for arrays."""
  config = config_of(name, **fields)
  return nnx.eval_shape(lambda: models.create(config, image_size=32, rngs=nnx.Rngs(0)))


def leaves_of(model, kind):
  """Returns {path with slashes: shape}."""
  flat = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(nnx.state(model, kind)))[0]
  return {"/".join(key.key for key in path): leaf.shape for path, leaf in flat}


D = {"stem": "deep", "shortcut": "pool"}
SE = {"se_ratio": 1 / 16}
X = {"groups": 32, "base_width": 4}
CIFAR = {"num_classes": 10, "shortcut": "pad"}


@pytest.mark.parametrize(
  "name, fields, parameters, tensors, statistics",
  [
    # Of torchvision's and timm's nets, counted there; 0 where it was not.
    ("resnet", {"depth": 50, "stride_at": "1x1"}, 25_557_032, 161, 53_120),
    pytest.param(*("resnet", {"depth": 200}, 64_673_832, 611, 176_000), marks=pytest.mark.slow),
    ("resnet", {"depth": 18, **D}, 11_708_744, 0, 0),
    ("resnet", {"depth": 50, **D}, 25_576_264, 167, 53_248),
    pytest.param(*("resnet", {"depth": 200, **D}, 64_693_064, 0, 0), marks=pytest.mark.slow),
    ("resnet", {"depth": 50, **SE}, 28_088_024, 225, 53_120),
    pytest.param(*("resnet", {"depth": 152, **SE}, 66_821_848, 0, 0), marks=pytest.mark.slow),
    ("resnet", {"depth": 50, **X}, 25_028_904, 161, 68_224),
    pytest.param(*("resnet", {"depth": 101, **X}, 44_177_704, 0, 0), marks=pytest.mark.slow),
    pytest.param(
      *("resnet", {"depth": 101, "groups": 32, "base_width": 8}, 88_791_336, 0, 0),
      marks=pytest.mark.slow,
    ),
    pytest.param(
      *("resnet", {"depth": 101, "groups": 64, "base_width": 4}, 83_455_272, 0, 0),
      marks=pytest.mark.slow,
    ),
    ("resnet", {"depth": 50, **SE, **X}, 27_559_896, 225, 68_224),
    ("resnet", {"depth": 50, "base_width": 128}, 68_883_240, 161, 68_224),
    pytest.param(
      *("resnet", {"depth": 101, "base_width": 128}, 126_886_696, 314, 137_856),
      marks=pytest.mark.slow,
    ),
    ("resnet", {"depth": 18, "preact": True}, 11_687_720, 0, 0),
    ("resnet", {"depth": 50, "preact": True}, 25_549_352, 153, 45_440),
    pytest.param(
      *("resnet", {"depth": 152, "preact": True}, 60_185_128, 0, 0), marks=pytest.mark.slow
    ),
    ("resnet_rs", {"depth": 50}, 35_691_912, 234, 0),
    pytest.param(*("resnet_rs", {"depth": 101}, 63_618_696, 0, 0), marks=pytest.mark.slow),
    pytest.param(*("resnet_rs", {"depth": 152}, 86_621_576, 0, 0), marks=pytest.mark.slow),
    pytest.param(*("resnet_rs", {"depth": 200}, 93_209_992, 0, 0), marks=pytest.mark.slow),
    pytest.param(*("resnet_rs", {"depth": 270}, 129_861_448, 0, 0), marks=pytest.mark.slow),
    pytest.param(*("resnet_rs", {"depth": 350}, 163_956_168, 0, 0), marks=pytest.mark.slow),
    pytest.param(*("resnet_rs", {"depth": 420}, 191_891_656, 0, 0), marks=pytest.mark.slow),
    ("cifar_resnet", {"depth": 20, **CIFAR}, 269_722, 0, 0),
    pytest.param(*("cifar_resnet", {"depth": 32, **CIFAR}, 464_154, 0, 0), marks=pytest.mark.slow),
    pytest.param(*("cifar_resnet", {"depth": 44, **CIFAR}, 658_586, 0, 0), marks=pytest.mark.slow),
    pytest.param(
      *("cifar_resnet", {"depth": 110, **CIFAR}, 1_727_962, 0, 0), marks=pytest.mark.slow
    ),
    pytest.param(
      *("cifar_resnet", {"depth": 1202, **CIFAR}, 19_421_274, 0, 0), marks=pytest.mark.slow
    ),
    ("cifar_resnet", {"depth": 20, "num_classes": 10}, 272_474, 0, 0),
    pytest.param(
      *("cifar_resnet_v2", {"depth": 164, "num_classes": 10}, 1_703_258, 0, 0),
      marks=pytest.mark.slow,
    ),
    pytest.param(
      *("cifar_resnet_v2", {"depth": 1001, "num_classes": 10}, 10_327_706, 0, 0),
      marks=pytest.mark.slow,
    ),
  ],
)
def test_sizes_are_as_published(name, fields, parameters, tensors, statistics):
  model = abstract(name, **fields)
  params, averages = leaves_of(model, nnx.Param), leaves_of(model, nnx.BatchStat)
  assert sum(map(math.prod, params.values())) == parameters
  assert tensors in (0, len(params))
  assert statistics in (0, sum(map(math.prod, averages.values())))
  # No two leaves of a state dict have one name.
  family, own = models.family_of(config_of(name, **fields)), config_of(name, **fields)
  theirs = {family.torch_name(leaf, models.own_fields(own)) for leaf in [*params, *averages]}
  assert len(theirs) == len(params) + len(averages)


@pytest.mark.parametrize(
  "name, fields, leaf, theirs",
  [
    ("resnet", {}, "stage3_block2/bn1/var", "layer3.1.bn1.running_var"),
    ("resnet", {}, "stage3_block1/projection_bn/scale", "layer3.0.downsample.1.weight"),
    ("resnet", D, "stage3_block1/projection_conv/kernel", "layer3.0.downsample.1.weight"),
    ("resnet", D, "stem_conv3/kernel", "conv1.6.weight"),
    ("resnet", D, "stem_bn3/mean", "bn1.running_mean"),
    ("resnet", SE, "stage1_block1/se_expand/bias", "layer1.0.se.fc2.bias"),
    ("resnet_rs", D, "stem_pool_bn/bias", "maxpool.1.bias"),
    ("resnet", {"preact": True}, "stage1_block2/bn3/bias", "stages.0.blocks.1.norm3.bias"),
    ("resnet", {"preact": True}, "final_bn/scale", "norm.weight"),
  ],
)
def test_names_of_torch(name, fields, leaf, theirs):
  family = models.family_of(config_of(name))
  assert family.torch_name(leaf, models.own_fields(config_of(name, **fields))) == theirs


FIELDS = {
  "depth": 26,  # of four blocks a stage: with three the scanned program is no shorter
  "width": 0.25,
  "num_classes": 10,
  "dtype": "float64",
  "drop_path": 0.5,
  "dropout": 0.3,
  "zero_init_residual": False,
  "bn_group": "2",
  "bn_unbiased": True,
}


class Step:
  """A gradient and the new statistics of a small net in float64, with all that is random."""

  def __init__(self, name="cifar_resnet", **fields):
    config = base.get_config(name)
    config.model.update((FIELDS if name == "cifar_resnet" else {}) | fields)
    config.data.image_size = 8
    create = lambda: models.create(  # noqa: E731
      config.model, image_size=8, rngs=nnx.Rngs(0, params=0)
    )
    with jax.enable_x64(True):
      self.model, self.variables = state.split(create())
      x = np.random.default_rng(0).normal(size=(4, 8, 8, 3))
      lowered = jax.jit(self.gradient).lower(self.variables, x, jax.random.key(5))
      self.lines = len(lowered.as_text().splitlines())
      results = lowered.compile()(self.variables, x, jax.random.key(5))
    self.loss, self.grads, self.statistics = jax.device_get(results)

  def check_equals(self, other, times=1):
    """Fails unless another one has the same numbers, but for so many times the usual rounding."""
    # The same leaves, by name and shape: a checkpoint of one is a checkpoint of the other.
    same_shapes = jax.tree.map(lambda a, b: a.shape == b.shape, self.variables, other.variables)
    assert all(jax.tree.leaves(same_shapes))
    assert self.loss == pytest.approx(other.loss, rel=times * 1e-13)
    for mine, expected in ((self.grads, other.grads), (self.statistics, other.statistics)):
      # Some gradients are 0 but for rounding, as of a bias that a norm takes out again.
      rounding = (
        times * 1e-14 * max((np.abs(x).max() for x in jax.tree.leaves(expected)), default=0.0)
      )
      jax.tree.map(
        lambda a, b, rounding=rounding: np.testing.assert_allclose(
          a, b, rtol=0, atol=times * 1e-11 * np.abs(b).max() + rounding
        ),
        mine,
        expected,
      )

  def gradient(self, variables, x, key):
    def loss(params):
      net = self.model.merge(variables._replace(params=params), key)
      return jnp.square(net(x) - 1).mean(), state.variables_of(net).batch_stats

    (value, statistics), grads = jax.value_and_grad(loss, has_aux=True)(variables.params)
    return value, grads, statistics


@pytest.fixture(scope="module")
def unrolled():
  return Step()


@pytest.mark.parametrize("scan, remat", [(True, "none"), (True, "convs"), (False, "blocks")])
def test_scan_and_remat_change_no_number(unrolled, scan, remat):
  other = Step(scan=scan, remat=remat)
  other.check_equals(unrolled)
  if scan:
    assert other.lines < unrolled.lines


@pytest.mark.slow
def test_1202_layers_learn():
  """As tests/trainer/deep.py trains them, which takes twenty minutes and more."""
  pytest.importorskip("sklearn.datasets", reason="needs the extra smoke")
  environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
  command = [sys.executable, "-m", "tests.trainer.deep"]
  output = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
  losses = [float(loss) for loss in re.findall(r"loss (\S+)", output.stdout)]
  assert len(losses) == 20 and losses[0] > 2 and losses[-1] < 1.9, losses


def test_scan_refuses_blocks_that_differ():
  config = config_of("cifar_resnet", depth=14, width=0.0625)
  model = models.create(config, image_size=8, rngs=nnx.Rngs(0))
  blocks = [model.stage1_block1, model.stage1_block2, model.stage2_block2]
  with pytest.raises(ValueError, match="must be equal"):
    stack.run(blocks, jnp.zeros((1, 2, 2, 1)), first=0, extras=None, scan=True, remat="none")


def test_stochastic_depth_drops_whole_branches_and_keeps_the_mean():
  paths = stack.Paths(jax.random.key(1), np.array([0.0, 0.25], np.float32))
  scale = np.asarray(paths.of_block(1, paths.rates[1], 4000))
  assert scale.shape == (4000, 1, 1, 1)
  assert set(np.unique(scale)) == {np.float32(0), np.float32(1 / 0.75)}
  assert scale.mean() == pytest.approx(1, abs=0.05)
  np.testing.assert_array_equal(paths.of_block(0, paths.rates[0], 9), 1)
  # Blocks draw for themselves; an example keeps its draw whatever the block does.
  assert (np.asarray(paths.of_block(0, paths.rates[1], 4000)) != scale).any()


@pytest.mark.parametrize(
  "name, fields, expected",
  [
    # timm's ResNet: i/(N - 1) over 8 blocks. TF's ResNet-RS: g/5, g of 2 to 5 by stage.
    ("resnet", {"depth": 18, "drop_path": 0.7}, [0.7 * i / 7 for i in range(8)]),
    (
      "resnet_rs",
      {"depth": 50, "drop_path": 0.1},
      [0.04] * 3 + [0.06] * 4 + [0.08] * 6 + [0.1] * 3,
    ),
    ("resnet", {"depth": 18}, []),
  ],
)
def test_rates_of_stochastic_depth(name, fields, expected):
  assert abstract(name, **fields).drop_path_rates == pytest.approx(expected)


def test_random_streams_are_seeded_by_the_step_and_silent_in_evaluation():
  config = config_of("cifar_resnet", depth=8, drop_path=0.5, dropout=0.5, num_classes=10)
  config.zero_init_residual = False
  create = lambda: models.create(config, image_size=8, rngs=nnx.Rngs(0, params=0))  # noqa: E731
  model, variables = state.split(create())
  x = np.random.default_rng(0).normal(size=(4, 8, 8, 3)).astype(np.float32)
  train = jax.jit(lambda key: model.merge(variables, key)(x))
  a, b, c = (np.asarray(train(jax.random.key(seed))) for seed in (0, 0, 1))
  np.testing.assert_array_equal(a, b)
  assert (a != c).any()
  plain, _ = state.split(
    models.create(
      config_of("cifar_resnet", depth=8, num_classes=10), image_size=8, rngs=nnx.Rngs(0, params=0)
    )
  )
  expected = plain.merge(variables, None)(x)
  np.testing.assert_allclose(model.merge(variables, None)(x), expected, rtol=1e-6, atol=1e-6)


def test_unbiased_running_variance_within_groups():
  norm = BatchNorm(
    2, momentum=0.5, epsilon=1e-5, dtype=jnp.float32, zero_scale=False, group="2", unbiased=True
  )
  x = np.random.default_rng(0).normal(size=(4, 3, 1, 2)).astype(np.float32)
  norm(jnp.asarray(x))
  expected = 0.5 + 0.5 * x.reshape(2, 6, 2).var(1, ddof=1)
  np.testing.assert_allclose(norm.var.get_value(), expected, rtol=1e-5)


def test_blur_is_the_filter_of_the_paper():
  x = np.random.default_rng(0).normal(size=(2, 5, 4, 3)).astype(np.float32)
  padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  taps = np.outer([1, 2, 1], [1, 2, 1]) / 16
  windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
  expected = np.einsum("nhwcij,ij->nhwc", windows, taps)
  np.testing.assert_allclose(layers.blur(jnp.asarray(x)), expected, rtol=1e-5, atol=1e-6)
  conv = layers.Layers(jnp.float32, False, nnx.Rngs(0), blur=True, momentum=0.9, epsilon=1e-5).conv(
    16, 4, 3, 2
  )
  plain = nnx.Conv(16, 4, (3, 3), strides=2, padding=1, use_bias=False, rngs=nnx.Rngs(0))
  plain.kernel.set_value(conv.kernel.get_value())
  y = jax.random.normal(jax.random.key(0), (1, 6, 6, 16))
  np.testing.assert_array_equal(conv(y), plain(layers.blur(y)))


def test_blur_stands_before_every_stride_of_16_channels_or_more():
  model = abstract("resnet", depth=50, blurpool="convs")
  blurred = {
    "/".join(path[:-1])
    for path, node in nnx.iter_graph(model)
    if isinstance(node, layers.BlurredConv)
    for path in [(*map(str, path), "")]
  }
  strided = {f"stage{s}_block1/{c}" for s in (2, 3, 4) for c in ("conv2", "projection_conv")}
  assert blurred == strided  # not the stem's, of 3 channels


def test_blurred_max_pool_takes_every_second_blurred_maximum():
  x = jax.random.normal(jax.random.key(0), (1, 7, 6, 2))
  whole = np.asarray(nnx.max_pool(x, (3, 3), padding=((1, 1), (1, 1))))
  y = layers.max_pool(x, blurred=True)
  np.testing.assert_array_equal(y, layers.blur(jnp.asarray(whole))[:, ::2, ::2])
  assert y.shape == layers.max_pool(x).shape == (1, 4, 3, 2)


def test_mean_of_pixels_at_an_odd_border_is_of_those_there_are():
  x = np.arange(9, dtype=np.float32).reshape(1, 3, 3, 1)
  np.testing.assert_array_equal(layers.halve(jnp.asarray(x))[0, :, :, 0], [[2, 3.5], [6.5, 8]])


def test_zeros_for_new_channels_on_both_sides():
  x = jnp.ones((1, 1, 1, 2))
  np.testing.assert_array_equal(layers.pad_channels(x, 4)[0, 0, 0], [0, 1, 1, 0])
  np.testing.assert_array_equal(layers.pad_channels(x, 5)[0, 0, 0], [0, 1, 1, 0, 0])


def test_first_bias_of_the_head_and_last_kernels_at_zero():
  config = config_of("cifar_resnet_v2", depth=11, num_classes=10, width=0.25)
  config.head_bias_init, config.zero_init_residual = -math.log(10), True
  model = models.create(config, image_size=8, rngs=nnx.Rngs(0))
  np.testing.assert_allclose(model.head.bias.get_value(), -math.log(10), rtol=1e-6)
  np.testing.assert_array_equal(model.stage2_block1.conv3.kernel.get_value(), 0)
  np.testing.assert_array_equal(model.stage2_block1.bn3.scale.get_value(), 1)
  assert (model.stage2_block1.conv2.kernel.get_value() != 0).any()


def test_stride_of_v1_and_v1_5():
  for at, strides in (("1x1", (2, 1)), ("3x3", (1, 2))):
    block = abstract("resnet", depth=50, stride_at=at).stage2_block1
    assert (block.conv1.strides, block.conv2.strides) == strides


def test_features_of_each_stage():
  config = config_of("resnet", depth=18, num_classes=5)
  shapes = nnx.eval_shape(
    lambda x: models.create(config, image_size=64, rngs=nnx.Rngs(0)).features(x),
    jnp.zeros((2, 64, 96, 3)),
  )
  assert {name: x.shape for name, x in shapes.items()} == {
    "stem": (2, 16, 24, 64),
    "stage1": (2, 16, 24, 64),
    "stage2": (2, 8, 12, 128),
    "stage3": (2, 4, 6, 256),
    "stage4": (2, 2, 3, 512),
  }


@pytest.mark.parametrize(
  "group, shards, shifted, pooled, affine",
  [
    ("global", 1, False, False, True),
    ("global", 2, True, True, True),
    ("device", 2, False, True, True),
    ("device", 2, True, False, False),
    ("2", 2, True, False, True),
    ("4", 8, False, True, True),
  ],
)
def test_vectors_of_a_norm_computed_together_are_the_same(group, shards, shifted, pooled, affine):
  draw = np.random.default_rng(0).normal

  def pool(x):
    return nnx.max_pool(x, (2, 2), (2, 2))

  with jax.enable_x64(True):
    images, weights = draw(1.0, 2.0, (8, 4, 6, 3)), draw(size=(8, 4, 6, 3))
    scale, bias, mean = np.array([0.5, -1.5, 2.0]), np.array([1.0, 2.0, -3.0]), draw(size=3)

    def run(together, images, scale, bias):
      norm = BatchNorm(
        3,
        momentum=0.75,
        epsilon=1e-5,
        dtype=jnp.float64,
        zero_scale=False,
        affine=affine,
        unbiased=True,
        shifted=shifted,
        together=together,
        group=group,
        shards=shards,
      )
      norm.mean.set_value(jnp.asarray(mean))
      if affine:
        norm.scale.set_value(scale)
        norm.bias.set_value(bias)
      y = norm(images * norm.directions(), pool) if pooled else norm(images)
      loss = jnp.sum(jnp.sin(y) * weights[:, : y.shape[1], : y.shape[2]])
      return loss, (y, norm.mean.get_value(), norm.var.get_value())

    together, rows, apart = (
      jax.value_and_grad(functools.partial(run, each), (0, 1, 2), has_aux=True)(images, *vectors)
      for each, vectors in (
        (True, (scale, bias)),
        (True, as_rows({"scale": scale, "bias": bias}, {"mean": jnp.asarray(mean)}).values()),
        (False, (scale, bias)),
      )
    )
    assert rows[1][1].shape == rows[1][2].shape == (1, 3)
    for each in together, jax.tree.map(lambda x, like: x.reshape(like.shape), rows, apart):
      jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-10, atol=1e-12), each, apart
      )
  (of_images, of_scale, of_bias) = apart[1]
  assert of_images.any() and (of_scale.all() and of_bias.all() if affine else True)


def test_pool_before_the_norm_and_pairs_of_rows_change_neither_outputs_nor_gradients():
  with jax.enable_x64(True):
    images = np.random.default_rng(0).normal(size=(8, 18, 14, 3))

    def stem(pool_first, paired, in_loop):
      config = config_of("resnet", depth=18, width=0.125, dtype="float64", pool_first=pool_first)
      config.update({"row_pairs": paired, "activation": "elu", "bn_shifted": True, "bn_group": "2"})
      model, variables = state.split(
        nnx.eval_shape(
          lambda: models.create(config, image_size=32, shards=2, rngs=nnx.Rngs(0, params=0))
        )
      )
      # Channels that fall with their input, and others that rise.
      weights = {
        "stem_conv": {"kernel": np.random.default_rng(1).normal(size=(7, 7, 3, 8))},
        "stem_bn": {"scale": np.linspace(-0.7, 1.5, 8), "bias": np.linspace(0.5, -0.5, 8)},
      }
      statistics = {"mean": np.linspace(-1, 1, 8), "var": np.ones(8)}

      def run(weights, images):
        if in_loop:
          form = models.family_of(config).for_micro_batches
          weights = form(weights, {"stem_bn": statistics}, models.own_fields(config))
        net = model.merge(
          variables._replace(
            params=variables.params | weights,
            batch_stats=variables.batch_stats | {"stem_bn": statistics},
          ),
          None,
        )
        y = net._stem(layers.row_pairs(images) if paired else images)
        new = net.stem_bn.mean.get_value(), net.stem_bn.var.get_value()
        return jnp.sum(y * jnp.sin(jnp.arange(y.size)).reshape(y.shape)), (y, new)

      return jax.value_and_grad(run, (0, 1), has_aux=True)(weights, images)

    *others, behind = jax.device_get(
      jax.jit(lambda: [stem(*form) for form in itertools.product((True, False), repeat=3)])()
    )
  for other in others:
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-12, atol=1e-12), other, behind
    )
  (_, (y, _)), (of_weights, of_images) = behind
  assert y.shape == (8, 5, 4, 8) and (y < 0).any() and of_images.any()
  assert all(x.all() for layer in of_weights.values() for x in layer.values())


@pytest.mark.parametrize(
  "name, fields, message",
  [
    ("resnet", {"depth": 18, "groups": 32}, "config.model.groups is 32, which needs bottlenecks"),
    ("resnet", {"depth": 34, "base_width": 128}, "config.model.base_width is 128, which needs"),
    ("cifar_resnet", {"stride_at": "1x1"}, "config.model.stride_at is '1x1', which needs bottlen"),
    ("resnet", {"width": 0.125, "groups": 32, "base_width": 4}, "leaves no channel for a group"),
    ("resnet", {"blurpool": "all", "stem_pool": "conv"}, "set config.model.blurpool to 'convs'"),
    ("resnet", {"pool_first": True, "stem_pool": "conv"}, "config.model.stem_pool is 'conv'; it"),
    ("resnet", {"pool_first": True, "blurpool": "all"}, "it needs 'none' or 'convs': set config"),
    ("resnet", {"pool_first": True, "preact": True}, "config.model.preact is True; it needs False"),
    ("resnet", {"pool_first": True, "activation": "silu"}, "config.model.activation is 'silu'; it"),
    ("cifar_resnet", {"pool_first": True}, "a CIFAR ResNet has no max-pool: set it to False"),
    ("resnet", {"row_pairs": True, "stem": "deep"}, "which needs a 7x7 convolution; config"),
    ("cifar_resnet", {"row_pairs": True}, "a CIFAR ResNet has no 7x7 convolution: set it to"),
    ("cifar_resnet", {"stem": "deep"}, "config.model.stem is 'deep'; the stem of a CIFAR ResNet"),
    ("cifar_resnet_v2", {"blurpool": "all"}, "a CIFAR ResNet v2 has none"),
    ("cifar_resnet_v2", {"depth": 32}, "must be 9n+2 (cifar_resnet_v2: 11, 20, 29, 38, ...)"),
    ("resnet_rs", {"depth": 34}, "must be one of 50, 101, 152, 200, 270, 350, 420 (resnet_rs)"),
    ("resnet", {"remat": "some"}, "config.model.remat must be one of none, blocks, convs"),
    ("resnet", {"shortcut": "A"}, "config.model.shortcut must be one of conv, pool, pad"),
    ("resnet", {"activation": "tanh"}, "config.model.activation must be one of relu,"),
    ("resnet", {"drop_path": 1.0}, "config.model.drop_path must be in [0, 1)"),
  ],
)
def test_what_cannot_be_is_refused(name, fields, message):
  with pytest.raises(ValueError) as error:
    models.check(config_of(name, **fields))
  assert message in str(error.value) and "\n" not in str(error.value)
