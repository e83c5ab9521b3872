"""Options of the compiler: the trainer's own, and those of a config."""

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.trainer import tiny
from trainer import compiler, program
from trainer import config as config_lib
from trainer.errors import ConfigError
from trainer.models.convolution import convolve


def _two_branches(x, y, kernel, moments, dtype):
  """The end of a residual net: two norms with ReLU, a 1x1 convolution of their sum, norm, mean."""
  first, second, last = moments

  def normalised(x, moments):
    mean, scale = moments
    return nnx.relu(((x.astype(jnp.float32) - mean) * scale).astype(dtype))

  total = normalised(x, first) + normalised(y, second)
  out = normalised(convolve(total, kernel.astype(dtype), 1, [(0, 0)] * 2), last)
  return jnp.mean(out, axis=(1, 2), dtype=jnp.float32)


@pytest.mark.parametrize(("size", "channels", "outputs"), [(16, 16, 50), (7, 64, 64), (4, 32, 10)])
def test_the_end_of_a_residual_net_in_bfloat16(size, channels, outputs):
  rng = np.random.default_rng(0)
  x, y = (jnp.asarray(rng.normal(size=(8, size, size, channels)), jnp.bfloat16) for _ in range(2))
  kernel = jnp.asarray(rng.normal(size=(1, 1, channels, outputs)), jnp.float32)
  moments = [
    (jnp.asarray(rng.normal(size=c), jnp.float32), jnp.asarray(rng.uniform(0.5, 2, c), jnp.float32))
    for c in (channels, channels, outputs)
  ]
  options = compiler.options("cpu")
  step = jax.jit(_two_branches, static_argnums=4, compiler_options=options)
  found = np.asarray(step(x, y, kernel, moments, jnp.bfloat16))
  wide = [array.astype(jnp.float32) for array in (x, y)]
  exact = np.asarray(_two_branches(*wide, kernel, moments, jnp.float32))
  np.testing.assert_allclose(found, exact, rtol=0, atol=0.02 * np.abs(exact).max())


def test_options_of_the_config_are_of_the_training_step_alone(tmp_path):
  config = tiny.get_config()
  config.compiler_options = f"xla_dump_to={tmp_path} xla_dump_hlo_as_text=True"
  config_lib.validate(config)
  built = program.build(config, 64)
  built.compile("eval", **built.sizes("eval"))
  assert not list(tmp_path.iterdir())
  built.compile("train", **built.sizes("train"))
  assert any("train_step" in file.name for file in tmp_path.iterdir())


@pytest.mark.parametrize(
  ("options", "words"),
  [
    ("xla_nothing=1", "^config.compiler_options, on cpu: No such compile option: 'xla_nothing'.$"),
    ("xla_cpu_enable_fast_math=much", "'much' is not a valid bool value"),
    ("xla_tpu_scoped_vmem_limit_kib=16384", "on cpu: No .*xla_tpu_scoped_vmem_limit_kib"),
  ],
)
def test_options_that_the_compiler_refuses(options, words):
  config = tiny.get_config()
  config.compiler_options = options
  config_lib.validate(config)
  built = program.build(config, 64)
  with pytest.raises(ConfigError, match=words):
    built.compile("train", **built.sizes("train"))


@pytest.mark.parametrize(
  "options", ["fast", "xla_cpu_enable_fast_math", "tpu_x=1", "xla_a=1,xla b"]
)
def test_options_that_are_none(options):
  config = tiny.get_config()
  config.compiler_options = options
  with pytest.raises(ConfigError, match=r"config.compiler_options .*NAME=VALUE"):
    config_lib.validate(config)


def test_what_was_widened_at_last_is_kept_in_the_dtype_before():
  def gradients(params, x):
    def loss(params):
      narrow = {name: each.astype(jnp.bfloat16) for name, each in params.items()}
      doubled = 2 * params["scaled"]
      y = x @ narrow["kernel"] @ narrow["twice"] @ narrow["twice"] @ doubled.astype(jnp.bfloat16)
      return jnp.sum(y.astype(jnp.float32) + params["wide"]), y

    grads, y = jax.grad(loss, has_aux=True)(params)
    return grads, y, y.astype(jnp.int32), 1

  params = {name: jnp.ones((4, 4)) for name in ("kernel", "twice", "scaled", "wide")}
  grads, *others = compiler.before_widening(gradients, params, jnp.ones((4, 4), jnp.bfloat16))
  names = {name for name, dtype in grads.items() if dtype == jnp.bfloat16}
  assert names == {"kernel", "twice"}
  assert {grads[name] for name in grads.keys() - names} == {jnp.dtype("float32")}
  assert others == [jnp.bfloat16, jnp.int32, jnp.int32]  # float to integer is no widening
