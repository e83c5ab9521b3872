"""Models: published sizes and costs, golden test in torch's layout, batch norm, initialisation."""

import math

from flax import nnx
import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from trainer import models
from trainer.models import resnet
from trainer.models.norm import BatchNorm, average_groups, join_groups


def model_config(**fields):
  """Returns `config.model` with float32 activations and `fields` set."""
  config = base.get_config().model
  config.update({"dtype": "float32", **fields})
  return config


def build(seed=0, **fields):
  return models.create(model_config(**fields), image_size=224, rngs=nnx.Rngs(seed))


def abstract(**fields):
  """Returns the model with shapes for arrays, at no cost."""
  return nnx.eval_shape(lambda: build(**fields))


def flat(state):
  """Returns {path with slashes: array} of an nnx.State; fails on a key that is not a string."""
  leaves = jax.tree_util.tree_flatten_with_path(nnx.to_pure_dict(state))[0]
  for path, _ in leaves:
    assert all(isinstance(key.key, str) for key in path), path
  return {"/".join(key.key for key in path): leaf for path, leaf in leaves}


def parameter_count(**fields):
  return sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(abstract(**fields), nnx.Param)))


def layers(zero_init_residual=False):
  return resnet.Layers(jnp.float32, zero_init_residual, nnx.Rngs(0), momentum=0.9, epsilon=1e-5)


def jaxpr_of(model, shape):
  """Returns the jaxpr of the abstract `model` in training mode for float32 images of `shape`."""
  graphdef, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)

  def forward(params, batch_stats, images):
    return nnx.merge(graphdef, params, batch_stats, copy=True)(images)

  return jax.make_jaxpr(forward)(params, batch_stats, jax.ShapeDtypeStruct(shape, jnp.float32))


def multiply_adds(jaxpr):
  """Returns the multiply-adds of the convolutions and matrix products in `jaxpr`."""
  total = 0
  for equation in jaxpr.eqns:
    for inner in jax.extend.core.jaxprs_in_params(equation.params):
      total += multiply_adds(inner)
    out, name = equation.outvars[0].aval, equation.primitive.name
    if name == "conv_general_dilated":
      kernel = equation.invars[1].aval.shape
      out_channels = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
      total += out.size * math.prod(kernel) // out_channels
    elif name == "dot_general":
      (contracted, _), _ = equation.params["dimension_numbers"]
      total += out.size * math.prod(equation.invars[0].aval.shape[i] for i in contracted)
  return total


@pytest.mark.parametrize(
  "depth, parameters, giga_multiply_adds",
  [
    # Both as torchvision publishes them with its weights.
    (18, 11_689_512, 1.814),
    (34, 21_797_672, 3.664),
    (50, 25_557_032, 4.089),
    (101, 44_549_160, 7.801),
    (152, 60_192_808, 11.514),
  ],
)
def test_size_and_cost_are_as_published(depth, parameters, giga_multiply_adds):
  model = abstract(depth=depth)
  assert sum(x.size for x in flat(nnx.state(model, nnx.Param)).values()) == parameters
  forward = jaxpr_of(model, (1, 224, 224, 3))
  assert [x.shape for x in forward.out_avals] == [(1, 1000)]
  assert multiply_adds(forward.jaxpr) / 1e9 == pytest.approx(giga_multiply_adds, rel=1e-3)


def test_depth_200_has_the_blocks_of_the_paper():
  # 3 + 24 + 36 + 3 bottlenecks of three convolutions, the stem and the head.
  assert resnet.STAGES[200] == ((3, 24, 36, 3), True)
  assert 3 * sum(resnet.STAGES[200][0]) + 2 == 200


@pytest.mark.parametrize(
  "depth, with_padded_shortcuts",
  [
    # The 0.27, 0.85 and 1.7 million of the paper's table 6.
    (20, 269_722),
    (56, 853_018),
    (110, 1_727_962),
  ],
)
def test_cifar_size(depth, with_padded_shortcuts):
  projections = (16 * 32 + 2 * 32) + (32 * 64 + 2 * 64)
  assert (
    parameter_count(name="cifar_resnet", depth=depth, num_classes=10)
    == with_padded_shortcuts + projections
  )


def test_width_multiplies_every_stage():
  narrow, wide = abstract(depth=18, width=0.5), abstract(depth=18, width=2.0)
  assert narrow.stem_conv.kernel.shape == (7, 7, 3, 32)
  assert wide.stem_conv.kernel.shape == (7, 7, 3, 128)
  assert wide.stage4_block2.conv2.kernel.shape == (3, 3, 1024, 1024)
  assert wide.head.kernel.shape == (1024, 1000)
  # Wide ResNet (arXiv:1605.07146): all but stem, head and batch norm grow with the square.
  assert 3.9 < parameter_count(depth=18, width=2.0) / parameter_count(depth=18) < 4.0
  assert abstract(name="cifar_resnet", depth=8, width=0.01).stem_conv.kernel.shape == (3, 3, 3, 1)


def test_state_is_params_and_batch_stats_with_string_keys():
  model = abstract(depth=50)
  _, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)  # raises if anything is left
  params, batch_stats = flat(params), flat(batch_stats)
  assert params["stage1_block1/conv1/kernel"].shape == (1, 1, 64, 64)
  assert params["stage4_block3/bn3/scale"].shape == (2048,)
  assert "stem_bn/mean" in batch_stats
  assert {x.dtype for x in [*params.values(), *batch_stats.values()]} == {jnp.dtype(jnp.float32)}
  # Only the head has a bias that is no batch norm's.
  assert [name for name in params if name.endswith("bias") and "bn" not in name] == ["head/bias"]


def test_every_change_of_shape_is_projected():
  def projected(model):
    return {name for name in model.blocks if getattr(model, name).projects}

  bottleneck, basic = abstract(depth=50), abstract(depth=18)
  # Stage 1 of a bottleneck net goes from 64 to 256 channels without a stride.
  assert projected(bottleneck) == {f"stage{s}_block1" for s in (1, 2, 3, 4)}
  assert bottleneck.stage1_block1.projection_conv.strides == 1
  assert bottleneck.stage1_block1.projection_conv.kernel.shape == (1, 1, 64, 256)
  assert projected(basic) == {f"stage{s}_block1" for s in (2, 3, 4)}
  assert projected(abstract(name="cifar_resnet", depth=20)) == {f"stage{s}_block1" for s in (2, 3)}


@pytest.mark.parametrize("name, depth", [("resnet", 50), ("cifar_resnet", 8)])
def test_activations_have_the_dtype_of_the_config_and_logits_are_float32(name, depth):
  model = abstract(name=name, depth=depth, num_classes=7, dtype="bfloat16")
  forward = jaxpr_of(model, (2, 64, 64, 3))
  assert [(x.shape, x.dtype) for x in forward.out_avals] == [((2, 7), jnp.dtype(jnp.float32))]
  products = {"conv_general_dilated": set(), "dot_general": set()}
  for equation in forward.eqns:
    if equation.primitive.name in products:
      products[equation.primitive.name].add(equation.outvars[0].aval.dtype)
  assert products["conv_general_dilated"] == {jnp.dtype(jnp.bfloat16)}
  assert products["dot_general"] == {jnp.dtype(jnp.float32)}


class Torch:
  """Forward pass of torchvision's ResNet from its named weights, in NumPy: NCHW, OIHW, float64."""

  def __init__(self, weights, train):
    self.weights, self.train = weights, train

  def conv(self, x, name, stride, padding):
    kernel = self.weights[f"{name}.weight"]
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    windows = np.lib.stride_tricks.sliding_window_view(x, kernel.shape[2:], axis=(2, 3))
    return np.einsum("nchwij,ocij->nohw", windows[:, :, ::stride, ::stride], kernel, optimize=True)

  def norm(self, x, name):
    if self.train:
      mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3))
    else:
      mean, var = self.weights[f"{name}.running_mean"], self.weights[f"{name}.running_var"]
    scale = self.weights[f"{name}.weight"] / np.sqrt(var + 1e-5)
    shift = self.weights[f"{name}.bias"] - mean * scale
    return x * scale[:, None, None] + shift[:, None, None]

  def block(self, x, name, stride):
    # Kernel, stride and padding of each convolution of the branch.
    branch = [(3, stride, 1), (3, 1, 1)]
    if f"{name}.conv3.weight" in self.weights:
      branch = [(1, 1, 0), (3, stride, 1), (1, 1, 0)]
    y = x
    for i, (kernel, step, padding) in enumerate(branch, 1):
      assert self.weights[f"{name}.conv{i}.weight"].shape[2:] == (kernel, kernel)
      y = self.norm(self.conv(y, f"{name}.conv{i}", step, padding), f"{name}.bn{i}")
      y = np.maximum(y, 0) if i < len(branch) else y
    if f"{name}.downsample.0.weight" in self.weights:
      x = self.norm(self.conv(x, f"{name}.downsample.0", stride, 0), f"{name}.downsample.1")
    return np.maximum(x + y, 0)

  def __call__(self, x):
    x = np.maximum(self.norm(self.conv(x, "conv1", 2, 3), "bn1"), 0)
    x = np.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1)), constant_values=-np.inf)
    x = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(2, 3))[:, :, ::2, ::2].max((4, 5))
    for layer in (1, 2, 3, 4):
      block = 0
      while f"layer{layer}.{block}.conv1.weight" in self.weights:
        x = self.block(x, f"layer{layer}.{block}", 2 if layer > 1 and block == 0 else 1)
        block += 1
    return x.mean((2, 3)) @ self.weights["fc.weight"].T + self.weights["fc.bias"]


def torch_weights(model):
  """Returns the weights of a four-stage ResNet with torchvision's names and layout, float64."""
  leaf_names = {
    "scale": "weight",
    "kernel": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
  }
  module_names = {
    "stem_conv": "conv1",
    "stem_bn": "bn1",
    "projection_conv": "downsample.0",
    "projection_bn": "downsample.1",
    "head": "fc",
  }
  weights = {}
  for name, leaf in flat(nnx.state(model, (nnx.Param, nnx.BatchStat))).items():
    *modules, kind = name.split("/")
    if modules[0].startswith("stage"):
      stage, block = modules[0].removeprefix("stage").split("_block")
      modules[0] = f"layer{stage}.{int(block) - 1}"
    modules = [module_names.get(module, module) for module in modules]
    leaf = np.asarray(leaf, np.float64)
    leaf = leaf.transpose(3, 2, 0, 1) if leaf.ndim == 4 else leaf.T
    weights[".".join([*modules, leaf_names[kind]])] = leaf
  return weights


def randomised(model, seed):
  """Returns the abstract `model` with random values, positive ones for variances and scales."""
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    if path[-2].key in ("scale", "var"):
      return jnp.asarray(rng.uniform(0.5, 1.5, leaf.shape), jnp.float32)
    values = rng.normal(size=leaf.shape) / math.sqrt(math.prod(leaf.shape[:-1]))
    return jnp.asarray(values, jnp.float32)

  graphdef, state = nnx.split(model)
  return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(draw, state))


@pytest.mark.parametrize("train", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("depth, width", [(18, 0.125), (50, 0.0625)])
def test_forward_equals_torchvision_layout(depth, width, train):
  model = randomised(abstract(depth=depth, width=width, num_classes=5), seed=depth)
  expected_of = Torch(torch_weights(model), train)
  model.train() if train else model.eval()
  # An odd size shows a shifted grid, which even sizes with global pooling may hide.
  images = np.random.default_rng(1).normal(size=(3, 67, 51, 3)).astype(np.float32)
  before = flat(nnx.state(model, nnx.BatchStat))
  logits = nnx.jit(lambda model, images: model(images))(model, images)
  after = flat(nnx.state(model, nnx.BatchStat))
  assert {bool((before[name] == after[name]).all()) for name in before} == {not train}
  expected = expected_of(images.astype(np.float64).transpose(0, 3, 1, 2))
  assert np.abs(expected).max() > 0.1
  np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("block", [resnet.BasicBlock, resnet.Bottleneck])
@pytest.mark.parametrize("inputs, stride", [(16, 1), (16, 2), (6, 1), (6, 2)])
def test_block_equals_torchvision_layout(block, inputs, stride):
  channels = 16 // block.expansion

  def make():
    return block(inputs, channels, stride, layers())

  model = randomised(nnx.eval_shape(make), seed=stride)
  model.eval()
  assert model.projects == (stride == 2 or inputs == 6)
  images = np.random.default_rng(2).normal(size=(2, 7, 6, inputs)).astype(np.float32)
  holder = nnx.Dict(stage1_block1=model)
  expected = Torch(torch_weights(holder), train=False).block(
    images.astype(np.float64).transpose(0, 3, 1, 2), "layer1.0", stride
  )
  np.testing.assert_allclose(model(images), expected.transpose(0, 2, 3, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [resnet.BasicBlock, resnet.Bottleneck])
@pytest.mark.parametrize("inputs", [16, 6])
def test_zero_init_makes_every_block_its_shortcut(block, inputs):
  model = block(inputs, 16 // block.expansion, 1, layers(zero_init_residual=True))
  x = jnp.abs(jax.random.normal(jax.random.key(0), (2, 5, 5, inputs)))
  projected = nnx.relu(model.projection_bn(model.projection_conv(x))) if model.projects else x
  np.testing.assert_array_equal(model(x), projected)
  scales = {name: leaf for name, leaf in flat(nnx.state(model)).items() if name.endswith("scale")}
  last = "bn2/scale" if block is resnet.BasicBlock else "bn3/scale"
  for name, scale in scales.items():
    np.testing.assert_array_equal(scale, 0 if name == last else 1)


def test_zero_init_is_an_option():
  model = resnet.BasicBlock(16, 16, 1, layers(zero_init_residual=False))
  np.testing.assert_array_equal(model.bn2.scale[...], 1)


def test_initial_distributions():
  params = flat(nnx.state(build(name="cifar_resnet", depth=8, width=4.0), nnx.Param))
  for name in ("stem_conv", "stage2_block1/conv1", "stage3_block1/projection_conv"):
    kernel = params[f"{name}/kernel"]
    height, width, _, outputs = kernel.shape
    assert np.std(kernel) == pytest.approx(math.sqrt(2 / (height * width * outputs)), rel=0.05)
    assert np.abs(kernel).max() > 3 * np.std(kernel)  # not truncated at two deviations
  assert np.std(params["head/kernel"]) == pytest.approx(0.01, rel=0.01)
  np.testing.assert_array_equal(params["head/bias"], 0)


def test_running_statistics_take_the_biased_batch_statistics():
  norm = BatchNorm(2, momentum=0.75, epsilon=1e-5, dtype=jnp.bfloat16, zero_scale=False)
  norm.mean[...], norm.var[...] = jnp.array([8.0, 0.0]), jnp.array([1.0, 4.0])
  x = np.random.default_rng(4).normal((3.0, -1.0), (0.5, 2.0), (3, 2, 2, 2)).astype(np.float32)
  y = norm(jnp.asarray(x))
  mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))  # of 12 values: unbiased would be 9 % more
  np.testing.assert_allclose(norm.mean[...], 0.75 * np.array([8, 0]) + 0.25 * mean, rtol=1e-5)
  np.testing.assert_allclose(norm.var[...], 0.75 * np.array([1, 4]) + 0.25 * var, rtol=1e-5)
  np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-5), rtol=1e-2, atol=1e-2)
  assert (norm.mean[...].dtype, norm.var[...].dtype, y.dtype) == ("float32", "float32", "bfloat16")


@pytest.mark.parametrize(
  "group, shards, groups",
  [
    ("4", 1, 4),
    ("4", 2, 4),
    ("4", 4, 4),
    ("4", 8, 4),
    ("4", 16, 4),
    ("device", 2, 2),
    ("1", 4, 16),
    ("16", 4, 1),
  ],
)
def test_groups_of_consecutive_examples(group, shards, groups):
  norm = BatchNorm(
    2, momentum=0.75, epsilon=1e-5, dtype=jnp.float32, zero_scale=False, group=group, shards=shards
  )
  before = nnx.to_pure_dict(nnx.state(norm, nnx.BatchStat))
  x = np.random.default_rng(5).normal((3.0, -1.0), (0.5, 2.0), (16, 3, 2, 2)).astype(np.float32)
  y = norm(jnp.asarray(x))
  parts = x.reshape(groups, -1, 2)
  mean, var = parts.mean(1), parts.var(1)
  expected = (parts - mean[:, None]) / np.sqrt(var[:, None] + 1e-5)
  np.testing.assert_allclose(y, expected.reshape(x.shape), rtol=1e-3, atol=1e-4)
  after = join_groups(nnx.to_pure_dict(nnx.state(norm, nnx.BatchStat)), before)
  stats = average_groups(after, before)
  np.testing.assert_allclose(stats["mean"], 0.25 * mean.mean(0), rtol=1e-4)
  np.testing.assert_allclose(stats["var"], 0.75 + 0.25 * var.mean(0), rtol=1e-4)


def test_momentum_and_epsilon_reach_every_norm():
  model = abstract(depth=50, bn_momentum=0.6, bn_epsilon=1e-3)
  norms = [node for _, node in nnx.iter_graph(model) if isinstance(node, BatchNorm)]
  assert len(norms) == 53
  assert {(norm.momentum, norm.epsilon) for norm in norms} == {(0.6, 1e-3)}


def test_statistics_and_parameters_are_not_rounded_in_bfloat16():
  norm = BatchNorm(1, momentum=0.9, epsilon=1e-5, dtype=jnp.bfloat16, zero_scale=False)
  norm.eval()
  # 1001 and 1000 are the same number in bfloat16.
  norm.mean[...] = jnp.array([1001.0])
  y = norm(jnp.array([[1004.0]], jnp.float32))
  assert y.dtype == jnp.bfloat16
  assert float(y[0, 0]) == 3.0


def test_split_step_under_jit_and_grad_updates_batch_stats():
  model = build(name="cifar_resnet", depth=8, width=0.5, num_classes=10)
  graphdef, params, batch_stats = nnx.split(model, nnx.Param, nnx.BatchStat)
  params, batch_stats = nnx.to_pure_dict(params), nnx.to_pure_dict(batch_stats)

  @jax.jit
  def step(params, batch_stats, images):
    def loss(params):
      model = nnx.merge(graphdef, params, batch_stats, copy=True)
      model.train()
      return jnp.mean(model(images) ** 2), nnx.to_pure_dict(nnx.state(model, nnx.BatchStat))

    (_, batch_stats_new), gradient = jax.value_and_grad(loss, has_aux=True)(params)
    return gradient, batch_stats_new

  images = jax.random.normal(jax.random.key(3), (4, 16, 16, 3))
  gradient, updated = step(params, batch_stats, images)
  assert jax.tree.structure(gradient) == jax.tree.structure(params)
  assert jax.tree.structure(updated) == jax.tree.structure(batch_stats)
  changed = jax.tree.map(lambda a, b: bool((a != b).any()), updated, batch_stats)
  assert all(jax.tree.leaves(changed))
  assert np.abs(gradient["stage3_block1"]["bn2"]["scale"]).max() > 0


def test_same_seed_same_parameters():
  def params(seed):
    return flat(nnx.state(build(seed, name="cifar_resnet", depth=8), nnx.Param))

  a, b, c = params(0), params(0), params(1)
  assert all((a[name] == b[name]).all() for name in a)
  assert (a["stem_conv/kernel"] != c["stem_conv/kernel"]).any()


@pytest.mark.parametrize(
  "fields, message",
  [
    (
      {"depth": 42},
      "config.model.depth must be one of 18, 34, 50, 101, 152, 200 (resnet); it is 42",
    ),
    (
      {"name": "cifar_resnet", "depth": 19},
      "must be 6n+2 (cifar_resnet: 8, 14, 20, 26, ...); it is 19",
    ),
    ({"name": "cifar_resnet", "depth": 2}, "it is 2"),
    ({"name": "vgg"}, "config.model.name is 'vgg'; there is resnet, cifar_resnet"),
  ],
)
def test_what_does_not_exist_is_named(fields, message):
  config = model_config(**fields)
  with pytest.raises(ValueError) as error:
    models.check(config)
  assert message in str(error.value)
  with pytest.raises(ValueError) as created:
    models.create(config, image_size=224, rngs=nnx.Rngs(0))
  assert str(created.value) == str(error.value)


def test_what_exists_passes_the_check():
  for depth in resnet.STAGES:
    models.check(model_config(depth=depth))
  for depth in (8, 20, 110, 1202):
    models.check(model_config(name="cifar_resnet", depth=depth))
