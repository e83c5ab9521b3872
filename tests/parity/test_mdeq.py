"""MDEQ against torch, written after the definition of arXiv:2006.08656 and of its public code."""

import functools

import jax
import numpy as np
import optax
import pytest

from configs import base
from tests.parity.test_models import distance, images, to_torch
from trainer import state
from trainer.models import mdeq

torch = pytest.importorskip("torch", reason="needs the extra parity")
F = torch.nn.functional

SIZE = 16


class Leaves:
  """Our variables by their paths, as torch has them."""

  def __init__(self, variables):
    self.of = {
      state.path_name(path): torch.from_numpy(np.array(leaf)).requires_grad_(learned)
      for tree, learned in ((variables.params, True), (variables.batch_stats, False))
      for path, leaf in jax.tree.leaves_with_path(tree)
    }

  def kernel(self, name):
    """OIHW, from direction and length if there is one."""
    kernel = self.of[f"{name}/kernel"].permute(3, 2, 0, 1)
    if f"{name}/gain" not in self.of:
      return kernel
    return (
      kernel
      / kernel.flatten(1).norm(dim=1)[:, None, None, None]
      * self.of[f"{name}/gain"][:, None, None, None]
    )

  def conv(self, x, name, stride=1):
    kernel = self.kernel(name)
    return F.conv2d(x, kernel, self.of.get(f"{name}/bias"), stride, padding=kernel.shape[-1] // 2)

  def group_norm(self, x, name, groups=8):
    return F.group_norm(x, groups, self.of.get(f"{name}/scale"), self.of.get(f"{name}/bias"))

  def batch_norm(self, x, name):
    mean, var = (self.of[f"{name}/{kind}"] for kind in ("mean", "var"))
    return F.batch_norm(
      x, mean, var, self.of.get(f"{name}/scale"), self.of.get(f"{name}/bias"), eps=1e-5
    )


def function(leaves, z, injection, masks=None):
  """One application: a residual block for each resolution, then all are joined."""
  blocks = []
  for i, x in enumerate(z):
    name = f"function/branch{i}"
    y = F.relu(leaves.group_norm(leaves.conv(x, f"{name}_conv1"), f"{name}_norm1"))
    y = leaves.conv(y, f"{name}_conv2")
    if masks:
      y = y * masks[i]
    y = leaves.group_norm(y + (injection if i == 0 else 0), f"{name}_norm2")
    blocks.append(leaves.group_norm(F.relu(y + x), f"{name}_norm3"))
  fused = []
  for i in range(len(z)):
    total = blocks[i]
    for j, y in enumerate(blocks):
      name = f"function/fuse{j}to{i}"
      for k in range(max(i - j, 0)):
        y = leaves.group_norm(leaves.conv(y, f"{name}_conv{k}", 2), f"{name}_norm{k}")
        if k < i - j - 1:
          y = F.relu(y)
      if j > i:
        y = leaves.group_norm(leaves.conv(y, f"{name}_conv0"), f"{name}_norm0")
        y = F.interpolate(y, scale_factor=2 ** (j - i), mode="nearest")
      if j != i:
        total = total + y
    y = leaves.conv(F.relu(total), f"function/post{i}_conv")
    fused.append(leaves.group_norm(y, f"function/post{i}_norm", 4))
  return fused


def logits(leaves, x, layers, strides):
  """The whole net in evaluation, with so many applications of the function."""
  names = ["stem_conv1", "stem_conv2"] + ["inject_conv"] * ("inject_conv/kernel" in leaves.of)
  for name, stride in zip(names, [*strides, 1]):
    x = F.relu(leaves.batch_norm(leaves.conv(x, name, stride), name.replace("conv", "bn")))
  resolutions = sum(f"head{i}/conv1/kernel" in leaves.of for i in range(9))
  z = []
  for i in range(resolutions):
    channels = leaves.kernel(f"function/post{i}_conv").shape[0]
    z.append(torch.zeros(len(x), channels, *(size >> i for size in x.shape[2:]), dtype=x.dtype))
  for _ in range(layers):
    z = function(leaves, z, x)
  y = None
  for i, maps in enumerate(z):
    inner, name = maps, f"head{i}"
    for k in (1, 2, 3):
      inner = leaves.batch_norm(leaves.conv(inner, f"{name}/conv{k}"), f"{name}/bn{k}")
      inner = F.relu(inner) if k < 3 else inner
    if f"{name}/projection_conv/kernel" in leaves.of:
      projected = leaves.conv(maps, f"{name}/projection_conv")
      maps = leaves.batch_norm(projected, f"{name}/projection_bn")
    new = F.relu(inner + maps)
    if i:
      joined = leaves.conv(y, f"join{i}_conv", 2)
      new = new + F.relu(leaves.batch_norm(joined, f"join{i}_bn"))
    y = new
  y = F.relu(leaves.batch_norm(leaves.conv(y, "final_conv"), "final_bn"))
  return y.mean((2, 3)) @ leaves.of["head/kernel"] + leaves.of["head/bias"]


def make(size=SIZE, **fields):
  """Returns our model, random variables of which no leaf is constant, and those for torch."""
  config = base.get_config("mdeq")
  config.model.update(
    {"width": 0.25, "expansion": 2, "num_classes": 6, "dtype": "float64", **fields}
  )
  config.data.image_size = size
  model, init = state.make_init(config, optax.identity(), 1)
  shapes = jax.eval_shape(init).raw()
  rng = np.random.default_rng(0)
  params = jax.tree.map(lambda x: rng.normal(0.2, 0.3, x.shape), shapes.params)
  statistics = jax.tree.map(lambda x: rng.uniform(0.5, 1.5, x.shape), shapes.batch_stats)
  others = {"steps_taken": np.int32(1)}
  variables = state.Variables(params, statistics, others)
  return model, variables, Leaves(variables)


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "strides"), [("tiny", (1, 1)), ("small", (2, 2))])
def test_logits_and_gradients_of_unrolled_layers(variant, strides):
  """Through stem, function and head: every leaf, in float64."""
  with jax.enable_x64(True):
    # On a map of one pixel a group has one value or two, and its norm amplifies rounding.
    size = SIZE if variant == "tiny" else 4 * SIZE
    model, variables, leaves = make(size, variant=variant, unrolled_steps=1, unrolled_layers=3)
    x = images(size, "float64")

    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
    def run(params, x):
      def value(params):
        found = model.merge(variables._replace(params=params), None)(x)
        return (found**2).sum(), found

      return jax.grad(value, has_aux=True)(params)

    gradients, found = jax.device_get(run(variables.params, x))
    expected = logits(leaves, to_torch(x), 3, strides)
    assert distance(found, expected.detach().numpy()) < 1e-9
    (expected**2).sum().backward()
  for path, gradient in jax.tree.leaves_with_path(gradients):
    assert distance(gradient, leaves.of[state.path_name(path)].grad.numpy()) < 1e-8


def test_function_with_masks():
  with jax.enable_x64(True):
    model, variables, leaves = make()
    net = model.merge(variables, None)
    rng = np.random.default_rng(1)
    z = tuple(rng.normal(size=(2, SIZE >> i, SIZE >> i, 8)) for i in range(2))
    masks = tuple(rng.uniform(0.5, 1.5, (2, 1, 1, 8)) for _ in z)
    injection = rng.normal(size=z[0].shape)
    args = {"arrays": net.function.arrays(), "injection": injection, "masks": masks}
    found = jax.jit(functools.partial(mdeq.function, net.shape))(args, z)
    expected = function(
      leaves, [to_torch(x) for x in z], to_torch(injection), [to_torch(x) for x in masks]
    )
  for ours, theirs in zip(found, expected, strict=True):
    assert distance(ours, theirs.detach().numpy().transpose(0, 2, 3, 1)) < 1e-10
