"""Vision Transformers: sizes, costs, positions, scan and remat, what is drawn, what is refused."""

import math

from flax import nnx
import jax
import jax.extend
import jax.numpy as jnp
from jax.sharding import AbstractMesh
import numpy as np
import optax
import pytest

from configs import base
from tests.trainer import tiny
from tests.trainer.shared import assert_refused
from tests.trainer.test_start import begin, flat
from trainer import config as config_lib
from trainer import mesh as mesh_lib
from trainer import models, state
from trainer import program as program_lib
from trainer.errors import ConfigError, TrainerError
from trainer.models import packing, vit
from trainer.optimizer import make_mask, make_optimizer
from trainer.reporting import flops
from trainer.state import make_init
from trainer.weights import export, run_folder
from trainer.weights import net as net_lib
from trainer.weights.errors import WeightsError

BIG_VISION = {"positions": "sincos2d", "pool": "mean", "pre_logits": True, "gelu": "tanh"}
TOKEN = {"token_position": False, "pre_logits": True, "gelu": "tanh"}
DEIT3 = {"token_position": False, "layer_scale": 1e-6}


def run_config(size=224, **fields):
  config = base.get_config("vit")
  config.model.update(fields)
  config.data.image_size = config.data.eval_image_size = size
  return config


def shapes_of(config):
  """Returns the model, the shapes of its variables, and their number."""
  model, init = make_init(config, optax.identity(), 1)
  variables = jax.eval_shape(init).raw()
  return model, variables, sum(math.prod(x.shape) for x in jax.tree.leaves(variables.params))


@pytest.mark.parametrize(
  "fields, size, parameters, giga_multiply_adds",
  [
    # Counted in timm 1.0.31, by its parameters and torch's FlopCounterMode; 0 where it was not.
    ({"variant": "Ti"}, 224, 5_717_416, 1.254),
    pytest.param(*({"variant": "Ti"}, 384, 5_790_376, 0), marks=pytest.mark.slow),
    pytest.param(*({"variant": "S"}, 224, 22_050_664, 4.599), marks=pytest.mark.slow),
    pytest.param(*({"variant": "S", "patch": 32}, 224, 22_878_952, 0), marks=pytest.mark.slow),
    pytest.param(*({"variant": "B"}, 224, 86_567_656, 17.564), marks=pytest.mark.slow),
    pytest.param(*({"variant": "B", "patch": 32}, 224, 88_224_232, 4.409), marks=pytest.mark.slow),
    pytest.param(*({"variant": "B"}, 384, 86_859_496, 0), marks=pytest.mark.slow),
    pytest.param(*({"variant": "L"}, 224, 304_326_632, 61.6), marks=pytest.mark.slow),
    pytest.param(*({"variant": "H", "patch": 14}, 224, 632_045_800, 167.3), marks=pytest.mark.slow),
    pytest.param(*({"variant": "S", **DEIT3}, 224, 22_059_496, 0), marks=pytest.mark.slow),
    pytest.param(*({"variant": "M", **DEIT3}, 224, 38_849_512, 0), marks=pytest.mark.slow),
    pytest.param(*({"variant": "B", **DEIT3}, 224, 86_585_320, 0), marks=pytest.mark.slow),
    # Of big_vision's nets, by formula.
    ({"variant": "S", **BIG_VISION}, 224, 22_122_472, 0),
    pytest.param(
      *({"variant": "S", **BIG_VISION, "pre_logits": False}, 224, 21_974_632, 0),
      marks=pytest.mark.slow,
    ),
    pytest.param(*({"variant": "Ti", **TOKEN}, 224, 5_754_280, 0), marks=pytest.mark.slow),
    pytest.param(*({"variant": "S", **TOKEN}, 224, 22_198_120, 0), marks=pytest.mark.slow),
    pytest.param(*({"variant": "B", **TOKEN}, 224, 87_157_480, 0), marks=pytest.mark.slow),
  ],
)
def test_sizes_and_costs_are_as_published(fields, size, parameters, giga_multiply_adds):
  model, variables, found = shapes_of(run_config(size, scan=True, **fields))
  assert found == parameters
  assert not variables.batch_stats and not variables.others
  if giga_multiply_adds:
    cost = flops.forward_flops(model, variables, size)
    assert cost / 2e9 == pytest.approx(giga_multiply_adds, rel=1e-3)


def test_names_are_those_of_timm():
  names = {
    leaf: vit.ViT.torch_name(leaf, fields)
    for fields in ({"pool_first": True}, {"pool_first": False})
    for leaf in ("norm/scale", "head/kernel", "class_token", "positions", "block12/mlp2/bias")
  }
  assert names == {
    "norm/scale": "norm.weight",
    "head/kernel": "head.weight",
    "class_token": "cls_token",
    "positions": "pos_embed",
    "block12/mlp2/bias": "blocks.11.mlp.fc2.bias",
  }
  assert vit.ViT.torch_name("norm/scale", {"pool_first": True}) == "fc_norm.weight"
  assert vit.ViT.torch_name("block1/scale2/gamma", {}) == "blocks.0.ls2.gamma"


def test_fixed_positions_are_those_of_big_vision():
  """In its own words: omega over a mesh of y and x, four parts side by side."""
  rows, columns, width = 3, 5, 16
  y, x = (places.reshape(-1, 1) for places in np.mgrid[:rows, :columns])
  omega = 1 / 10_000 ** (np.arange(4) / 3)
  parts = [np.sin(x * omega), np.cos(x * omega), np.sin(y * omega), np.cos(y * omega)]
  np.testing.assert_allclose(
    vit.sincos(rows, columns, width)[0], np.concatenate(parts, 1), rtol=1e-12, atol=1e-15
  )


def tiny_vit(**fields):
  config = tiny.get_config("vit")
  config.model.update(fields)
  return config


def built(config):
  """Returns the model without arrays, and random variables of which no leaf is constant."""
  model, variables, _ = shapes_of(config)
  rng = np.random.default_rng(0)
  values = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(0.2, 0.3, x.shape), x.dtype),
    packing.unpack(variables, packing.take) if model.packed else variables,
  )
  return model, packing.pack(values) if model.packed else values


IMAGES = np.random.default_rng(1).normal(size=(4, 16, 24, 3)).astype(np.float32)


def loss_and_gradients(config):
  model, variables = built(config)

  @jax.jit
  def run(params, images):
    def loss(params):
      net = model.merge(variables._replace(params=params), jax.random.key(7))
      return jnp.sum(jnp.square(net(images)))

    return jax.value_and_grad(loss)(params)

  value, gradients = run(variables.params, IMAGES)
  return value, packing.unpack(gradients)


@pytest.mark.parametrize(
  "mode",
  [
    {"scan": True, "remat": "dots"},
    pytest.param({"scan": True}, marks=pytest.mark.slow),
    pytest.param({"remat": "blocks"}, marks=pytest.mark.slow),
  ],
)
def test_scan_and_remat_change_no_number(mode):
  """With dropout and stochastic depth, which draw the same in a loop and recomputed."""
  random = {"dropout": 0.3, "drop_path": 0.5, "layer_scale": 0.1}
  expected = loss_and_gradients(tiny_vit(**random))
  found = loss_and_gradients(tiny_vit(**random, **mode))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max()),
    found,
    expected,
  )


def test_activations_have_the_dtype_of_the_config():
  """Products are of bfloat16; norms, softmax and all behind the last block of float32."""
  model, variables = built(tiny_vit(dtype="bfloat16", layer_scale=0.1, gelu="tanh"))
  traced = jax.make_jaxpr(lambda v, x: model.merge(v, None)(x))(variables, IMAGES)
  assert [x.dtype for x in traced.out_avals] == [jnp.float32]
  seen = {}

  def look(jaxpr):
    for equation in jaxpr.eqns:
      for inner in jax.extend.core.jaxprs_in_params(equation.params):
        look(inner)
      for operand in equation.invars[:1]:
        seen.setdefault(equation.primitive.name, []).append(operand.aval.dtype)

  look(traced.jaxpr)
  assert set(seen["exp"]) == set(seen["rsqrt"]) == {jnp.dtype(jnp.float32)}
  assert set(seen["conv_general_dilated"]) == {jnp.dtype(jnp.bfloat16)}
  assert seen["dot_general"].count(jnp.float32) == 1 + 1  # the head, and positions of more columns
  assert seen["dot_general"].count(jnp.bfloat16) == 3 * 6
  logits = model.merge(variables, None)(IMAGES)
  exact = built(tiny_vit(layer_scale=0.1, gelu="tanh"))[0].merge(variables, None)(IMAGES)
  np.testing.assert_allclose(logits, exact, rtol=0.1, atol=0.1 * np.abs(exact).max())


def test_every_branch_and_layer_draws_its_own_and_evaluation_nothing():
  model, variables = built(tiny_vit(dropout=0.5, drop_path=0.5))
  net = model.merge(variables, jax.random.key(0))
  ones = jnp.ones((8, 8))
  layers = [net.dropout]
  layers += [getattr(getattr(net, b), d) for b in net.blocks for d in ("drop1", "drop2", "drop3")]
  masks = {np.asarray(layer(ones)).tobytes() for layer in layers}
  assert len(masks) == 1 + 3 * 3
  assert net.drop_path_rates == (0, 0.25, 0.5)
  kept = vit.stack.Paths(jax.random.key(0), np.full(3, 0.5), (2, 1)).of_block(1, 0.5, 64)
  assert kept.shape == (64, 2, 1) and set(np.unique(kept)) == {0, 2}
  assert 0.2 < np.mean(kept[:, 0] == kept[:, 1]) < 0.8
  logits = model.merge(variables, None)(IMAGES)
  np.testing.assert_array_equal(logits, model.merge(variables, None)(IMAGES))
  plain = built(tiny_vit())[0].merge(variables, None)(IMAGES)
  np.testing.assert_allclose(logits, plain, rtol=1e-5)


def test_a_skipped_branch_leaves_the_tokens():
  block = vit.Block(vit.Shape(8, 1, 2, 16), vit_fields(), jnp.float32, nnx.Rngs(0))
  x = jax.random.normal(jax.random.key(0), (2, 3, 8))
  np.testing.assert_array_equal(block(x, jnp.zeros((2, 2, 1))), x)
  only_attention = block(x, jnp.array([[[1.0], [0.0]]] * 2))
  np.testing.assert_allclose(only_attention, x + block._attend(x), rtol=1e-6)


def vit_fields(**changed):
  return models.own_fields(tiny_vit(**changed).model)


def test_what_a_run_begins_with():
  net = models.create(
    tiny_vit(width=64, mlp=512, pre_logits=True, head_bias_init=-6.9).model,
    image_size=128,
    rngs=nnx.Rngs(0),
  )
  bound = {"qkv": 64 + 64, "projection": 64 + 64, "mlp1": 64 + 512, "mlp2": 64 + 512}
  for name, fans in bound.items():  # Xavier's, for query, key and value each by itself
    kernel = np.asarray(getattr(net.block2, name).kernel[...])
    limit = np.sqrt(6 / fans)
    assert 0.98 * limit < np.abs(kernel).max() <= limit
    assert np.std(kernel) == pytest.approx(limit / np.sqrt(3), rel=0.03)
  assert 0 < np.abs(net.block1.mlp1.bias[...]).max() < 1e-5
  assert np.std(net.positions[...]) == pytest.approx(1 / 8, rel=0.03)
  assert not net.class_token[...].any() and not net.head.kernel[...].any()
  np.testing.assert_allclose(net.head.bias[...], -6.9)
  assert net.block1.norm1.epsilon == 1e-6


def test_parameters_shard_and_only_kernels_decay():
  config = run_config(variant="Ti", layer_scale=0.1)
  config.sharding.params = "fsdp"
  rule = make_optimizer(config, lambda step: 0.1, vit.ViT.NO_DECAY)
  shapes = jax.eval_shape(make_init(config, rule, 8)[1])
  mesh = AbstractMesh((1, 8, 1), ("data", "fsdp", "space"))  # which 3 heads do not divide
  for path, sharding in jax.tree.leaves_with_path(mesh_lib.state_shardings(config, mesh, shapes)):
    name = state.path_name(path)
    if name.startswith("params/"):
      matrix = name.endswith(("kernel", "positions", "class_token"))
      assert ("fsdp" in str(sharding.spec)) == matrix, name
  decays = make_mask(config, vit.ViT.NO_DECAY)(shapes.params)
  for path, value in jax.tree.leaves_with_path(decays):
    assert value == state.path_name(path).endswith("kernel")


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"model.variant": "XL"}, "config.model.variant must be one of Ti, S, M, B, L, H; it is 'XL'"),
    ({"model.heads": 3}, "config.model.heads makes 3 heads, which do not divide the 16 channels"),
    ({"model.patch": 5}, "config.data.image_size has 16 pixels, which patches of config.model.pa"),
    ({"data.eval_image_size": 20}, "config.data.eval_image_size has 20 pixels, which patches of"),
    ({"data.image_sizes": "0:16, 1:20"}, "config.data.image_sizes has 20 pixels, which patches"),
    ({"mesh.space": 4}, "16 pixels, 2 rows of patches, which config.mesh.space = 4 does not div"),
    ({"model.positions": "sincos2d", "model.width": 18}, "'sincos2d', which needs a config.model."),
    ({"model.pool_first": True}, "config.model.pool_first is True, which needs config.model.pool"),
    ({"model.remat": "convs"}, "config.model.remat must be one of none, dots, blocks"),
    ({"model.dropout": 1.0}, "config.model.dropout must be in [0, 1)"),
  ],
)
def test_what_cannot_be_is_refused(fields, message):
  assert_refused("vit", fields, message)


def test_images_of_another_size_than_the_patches_are_refused():
  model, variables = built(tiny_vit())
  with pytest.raises(ValueError, match="Images have 16 x 20 pixels, which patches of 8 do not"):
    model.merge(variables, None)(IMAGES[:, :, :20])


def test_a_run_may_change_its_image_size():
  """Positions are those of the largest, and each size is compiled."""
  config = tiny_vit()
  config.data.image_sizes = "0:16, 1:24"
  config_lib.validate(config)
  program = program_lib.build(config, 64)
  assert program.abstract_state.params["positions"].shape == (1, 3 * 3 + 1, 16)
  assert [sizes["image_size"] for sizes in program.all_sizes("train")] == [16, 24]
  model, variables = program.model, program.abstract_state.raw()
  for size in (16, 24, 40):
    images = jax.ShapeDtypeStruct((2, size, size, 3), jnp.float32)
    assert jax.eval_shape(lambda v, x: model.merge(v, None)(x), variables, images).shape == (2, 6)


def test_a_resume_cannot_give_positions_another_size():
  """Not even where the size may change: the checkpoint would not fit, and seem damaged."""
  saved = config_lib.flatten(tiny_vit())
  config = tiny_vit()
  config.data.image_sizes, config.resume.allow = "0:16, 1:24", "data"
  with pytest.raises(ConfigError, match=r"16 px; for 24 px .*config\.init_from=runs/a"):
    config_lib.check_same_run(saved, config, "runs/a")
  config.data.image_sizes = "0:8, 1:16"
  assert config_lib.check_same_run(saved, config, "runs/a").keys() == {"data.image_sizes"}
  fixed = {"model.positions": "sincos2d"}
  config.update_from_flattened_dict({"data.image_sizes": "0:24", **fixed})
  assert config_lib.check_same_run(saved | fixed, config, "runs/a")


def test_description():
  assert vit.ViT.describe(vit_fields()) == "ViT-B/8, depth 3, heads 2, mlp 32, width 16"


@pytest.fixture(scope="module")
def donor(tmp_path_factory):
  """A workdir of a net for images of 16 px, and its leaves."""
  config = tiny_vit()
  config.data.kind = "synthetic"
  net = net_lib.build(config)
  leaves = net_lib.random_leaves(net)
  workdir = str(tmp_path_factory.mktemp("donor") / "run")
  run_folder.write(workdir, config, net, leaves, tuple("abcdef"))
  return workdir, leaves


def test_begins_with_weights_of_another_image_size(donor):
  workdir, leaves = donor
  config = tiny_vit()
  config.data.image_size = config.data.eval_image_size = 24
  config.model.num_classes = 4
  _, found, begun = begin(config, init_from=workdir)
  assert set(found.anew) == {"head/kernel", "head/bias"} and found.resized == ["positions"]
  assert "1 resized (positions)" in str(found)
  begun = flat(*begun.raw())
  old, new = leaves.pop("positions"), begun.pop("positions")
  np.testing.assert_array_equal(new[:, :1], old[:, :1])
  expected = vit.resample(jnp.asarray(old[:, 1:]), 2, (3, 3))
  np.testing.assert_array_equal(new[:, 1:], expected)
  for name in begun.keys() - {"head/kernel", "head/bias"}:
    np.testing.assert_array_equal(begun[name], leaves[name])


def test_weights_of_another_net_are_refused(donor):
  for fields, words in (({"patch": 4}, "patch_embed.proj.weight"), ({"pool": "mean"}, "cls_token")):
    config = tiny_vit(**fields)
    with pytest.raises(TrainerError, match=f"does not fit config.model.*{words}"):
      begin(config, init_from=donor[0])


@pytest.mark.parametrize("kind", ["onnx", "stablehlo"])
@pytest.mark.parametrize("size", [pytest.param(16, marks=pytest.mark.slow), 24])
def test_graphs_for_other_tools(kind, size, donor, tmp_path):
  for needed in export._NEEDED[kind]:
    pytest.importorskip(needed, reason=f"{needed} comes with [export]")
  agreement = export.export(donor[0], kind, str(tmp_path / "graph"), pixels=True, size=size)
  assert agreement.top5 == agreement.images == 16
  with pytest.raises(WeightsError, match="--size has 20 pixels, which patches of"):
    export.export(donor[0], kind, str(tmp_path / "other"), size=20)
