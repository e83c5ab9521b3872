"""NFNet and NF-ResNet: sizes and costs, standardised kernels, gains, clipping, what is refused."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import recipes
from tests.trainer.shared import assert_refused
from tests.trainer.test_efficientnet import check_size_and_cost, shapes_of, slow
from tests.trainer.test_variants import Step, config_of
from trainer import models, optimizer
from trainer.models import nfnet, stack
from trainer.state import path_name


# Counted in timm 1.0.31, by its parameters and torch's FlopCounterMode at the size of evaluation.
@pytest.mark.parametrize(
  "variant, parameters, size, giga_multiply_adds",
  [
    ("f0", 71_489_284, 256, 12.38),
    slow("f1", 132_634_256, 320, 35.5),
    slow("f2", 193_779_228, 352, 62.6),
    slow("f3", 254_924_200, 416, 114.8),
    slow("f4", 316_069_172, 512, 215.2),
    slow("f5", 377_214_144, 544, 289.8),
    slow("f6", 438_359_116, 576, 377.3),
  ],
)
def test_sizes_and_costs_are_as_published(variant, parameters, size, giga_multiply_adds):
  fields = {"variant": variant}
  variables = check_size_and_cost("nfnet", fields, parameters, size, giga_multiply_adds)
  assert not variables.batch_stats and not variables.others


@pytest.mark.parametrize(
  "fields, parameters, size, giga_multiply_adds",
  [
    # As a ResNet-50, with gains and biases for norms.
    ({"depth": 50, "shortcut": "pool", "skip_init": False}, 25_557_032, 224, 4.089),
    slow({"depth": 50}, 25_557_032 + 16, 0, 0),
    slow({"depth": 101, "skip_init": False}, 44_549_160, 0, 0),
  ],
)
def test_sizes_of_residual_nets(fields, parameters, size, giga_multiply_adds):
  check_size_and_cost("nf_resnet", fields, parameters, size, giga_multiply_adds)


@pytest.mark.parametrize(
  "family, leaf, theirs",
  [
    ("nfnet", "stem_conv3/gain", "stem.conv3.gain"),
    ("nfnet", "stage2_block1/skip_gain", "stages.1.0.skipinit_gain"),
    ("nfnet", "stage1_block1/conv2b/kernel", "stages.0.0.conv2b.weight"),
    ("nfnet", "stage4_block3/se_reduce/bias", "stages.3.2.attn_last.fc1.bias"),
    ("nfnet", "final_conv/bias", "final_conv.bias"),
    ("nf_resnet", "stem_conv/kernel", "stem.conv.weight"),
    ("nf_resnet", "stage2_block1/projection_conv/gain", "stages.1.0.downsample.conv.gain"),
    ("nf_resnet", "head/kernel", "head.fc.weight"),
  ],
)
def test_names_of_timm(family, leaf, theirs):
  assert models.family_of(config_of(family)).torch_name(leaf, {}) == theirs


def test_titles():
  for family, fields, title in (
    ("nfnet", {"width": 0.25}, "NFNet-F0, width 0.25"),
    ("nf_resnet", {}, "NF-ResNet-50"),
  ):
    own = models.own_fields(config_of(family, **fields))
    assert models.family_of(config_of(family)).describe(own) == title


def test_betas_are_those_of_the_papers_code():
  f0 = nfnet.betas((1, 2, 6, 3), 0.2)
  np.testing.assert_allclose(f0[:4], [1, 1.04**-0.5, 1.04**-0.5, 1.08**-0.5], rtol=1e-12)
  assert nfnet.betas((3, 4, 6, 3), 0.2)[3] == pytest.approx(0.944911, abs=1e-6)
  assert len(f0) == 12


@pytest.mark.parametrize("rule, epsilon", [("max", 1e-4), ("max", 80.0), ("add", 1e-5)])
def test_kernels_are_standardised_by_output(rule, epsilon):
  fields = models.own_fields(config_of("nfnet", ws_rule=rule, ws_epsilon=epsilon))
  conv = nfnet.ScaledConv(4, 6, 3, groups=2, layers=nfnet._Layers(fields, "float32", nnx.Rngs(0)))
  rng = np.random.default_rng(0)
  kernel, gain = rng.normal(1, 2, (3, 3, 2, 6)), rng.normal(size=6)
  conv.kernel.set_value(jnp.asarray(kernel, jnp.float32))
  conv.gain.set_value(jnp.asarray(gain, jnp.float32))
  var, fan_in = kernel.reshape(18, 6).var(0), 18
  square = np.maximum(var * fan_in, epsilon) if rule == "max" else (var + epsilon) * fan_in
  expected = gain * (kernel - kernel.mean((0, 1, 2))) / np.sqrt(square)
  np.testing.assert_allclose(conv.standardised(), expected, rtol=2e-5, atol=1e-6)


def test_gains_of_activations_keep_the_variance():
  x = jax.random.normal(jax.random.key(0), (1_000_000,))
  for function, gain in nfnet.GAINS.values():
    assert float(jnp.var(gain * function(x))) == pytest.approx(1, abs=0.02)


def test_signals_keep_their_variance():
  """With branches at full strength, the outputs of blocks have the variance that beta assumes."""
  config = config_of("nf_resnet", depth=26, width=0.25, num_classes=10)

  @jax.jit
  def variances():
    model = models.create(config, image_size=64, rngs=nnx.Rngs(0))
    for name in model.blocks:
      getattr(model, name).skip_gain.set_value(jnp.ones(()))
    x = jax.random.normal(jax.random.key(0), (4, 64, 64, 3))
    return {name: jnp.var(y, (0, 1, 2)).mean() for name, y in model.features(x).items()}

  for name, variance in variances().items():
    if name not in ("stem", "stage1"):  # two blocks: 1 + 0.2 ** 2 + 0.2 ** 2
      assert float(variance) == pytest.approx(1.08, rel=0.5), name


def test_branches_start_at_zero():
  for fields in ({"skip_init": True}, {"skip_init": False}):
    layers = nfnet._Layers(
      models.own_fields(config_of("nf_resnet", **fields)), "float32", nnx.Rngs(0)
    )
    block = nfnet.Block(nfnet.Shape(8, 8, 4, 1), layers)
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
    np.testing.assert_array_equal(block(x, (jnp.float32(1), None)), x)


def test_kept_branches_are_not_rescaled():
  paths = stack.Paths(jax.random.key(1), np.array([0.0, 0.25], np.float32), rescale=False)
  scale = np.asarray(paths.of_block(1, paths.rates[1], 1000))
  assert set(np.unique(scale)) == {0, 1} and scale.mean() == pytest.approx(0.75, abs=0.05)


def test_all_but_the_kernel_of_the_head_is_clipped_and_kernels_alone_decay():
  config = recipes.load("imagenet_nfnet:f0")
  _, variables = shapes_of("nfnet", variant="f0", width=0.0625, num_classes=10)
  whole = ("stem_conv1", "stage1_block1", "head")
  params = {part: variables.params[part] for part in whole}
  params = jax.tree.map(lambda x: np.full(x.shape, 0.5, np.float32), params)
  gradients = jax.tree.map(lambda x: 200 * x, params)
  clip = optimizer.adaptive_clip(config.optimizer.agc, config.optimizer.no_agc)
  clipped = jax.jit(lambda g, w: clip.update(g, clip.init(w), w)[0])(gradients, params)
  whole = {
    path_name(path) for path, x in jax.tree.leaves_with_path(clipped) if float(x.max()) == 100
  }
  assert whole == {"head/kernel"}
  np.testing.assert_allclose(clipped["stage1_block1"]["skip_gain"], 0.005, rtol=1e-5)
  np.testing.assert_allclose(clipped["stem_conv1"]["gain"], 0.005, rtol=1e-5)
  np.testing.assert_allclose(clipped["stem_conv1"]["kernel"], 0.005, rtol=1e-5)
  mask = optimizer.make_mask(config, nfnet.NFNet.NO_DECAY)(params)
  decaying = {path_name(path) for path, value in jax.tree.leaves_with_path(mask) if value}
  kernels = {path_name(path) for path, _ in jax.tree.leaves_with_path(params)}
  assert decaying == {name for name in kernels if name.endswith("/kernel")}


@pytest.mark.slow
@pytest.mark.parametrize("family, width", [("nfnet", 0.0625), ("nf_resnet", 0.0625)])
def test_scan_and_remat_change_no_number(family, width):
  fields = {"width": width, "num_classes": 10, "dtype": "float64", "drop_path": 0.5, "dropout": 0.3}
  unrolled = Step(family, **fields)
  scanned = Step(family, **fields, scan=True, remat="convs")
  scanned.check_equals(unrolled)
  assert scanned.lines < unrolled.lines


@pytest.mark.parametrize(
  "family, fields, message",
  [
    ("nfnet", {"variant": "f7"}, "config.model.variant must be one of f0, f1, f2, f3, f4, f5, f6;"),
    ("nfnet", {"width": 0.3}, "config.model.width is 0.3, which makes groups of 38.4 channels"),
    ("nfnet", {"alpha": 0.0}, "config.model.alpha must be positive"),
    ("nfnet", {"ws_rule": "none"}, "config.model.ws_rule must be one of max, add"),
    ("nfnet", {"activation": "tanh"}, "config.model.activation must be one of relu, gelu, gelu_ta"),
    ("nf_resnet", {"depth": 34}, "must be one of 26, 50, 101, 152, 200 (nf_resnet)"),
    ("nf_resnet", {"shortcut": "pad"}, "config.model.shortcut must be one of conv, pool"),
    ("nf_resnet", {"gamma_in": "bias"}, "config.model.gamma_in must be one of activation, kernel"),
  ],
)
def test_what_cannot_be_is_refused(family, fields, message):
  assert_refused(family, {f"model.{name}": value for name, value in fields.items()}, message)
