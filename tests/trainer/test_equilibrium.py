"""Solvers of fixed points: against NumPy, tolerances, neighbours, gradients, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainer.models import equilibrium
from trainer.models.equilibrium import Solver

# Programs that run once: what the compiler would gain is less than it costs.
QUICKLY = {"xla_backend_optimization_level": 0}
RNG = np.random.default_rng(0)
MATRIX = 0.9 * np.linalg.qr(RNG.normal(size=(12, 12)))[0]
INPUTS = RNG.normal(size=(4, 12)) * np.array([0.1, 0.5, 1.0, 3.0])[:, None]


def f(args, z):
  """Of two arrays, whose examples converge at different rates."""
  matrix, inputs = args
  flat = jnp.concatenate([x.reshape(len(x), -1) for x in z], axis=1)
  y = jnp.tanh(flat @ matrix.T + inputs)
  return y[:, :8].reshape(-1, 2, 2, 2), y[:, 8:].reshape(-1, 1, 1, 4)


def start(examples):
  return jnp.zeros((examples, 2, 2, 2)), jnp.zeros((examples, 1, 1, 4))


def flat(z):
  return np.concatenate([np.asarray(x).reshape(len(x), -1) for x in z], axis=1)


def solve(solver, inputs=INPUTS):
  args = jnp.asarray(MATRIX), jnp.asarray(inputs)
  run = jax.jit(
    lambda args: equilibrium.solve(functools.partial(f, args), start(4), solver),
    compiler_options=QUICKLY,
  )
  return run(args)


def broyden(g, steps):
  """Returns the iterates for one example, with the inverse Jacobian as a matrix."""
  z = np.zeros(12)
  inverse, found = -np.eye(12), [z]
  for _ in range(steps):
    dz = -inverse @ g(z)
    dg = g(z + dz) - g(z)
    row = dz @ inverse
    inverse = inverse + np.outer(dz - inverse @ dg, row) / (row @ dg)
    z = z + dz
    found.append(z)
  return found


def anderson(g, steps, history=3, ridge=1e-4, damping=0.7):
  """Likewise, by the bordered system of arXiv:1909.01377's code, with a ridge that scales."""
  found = [np.zeros(12)]
  for _ in range(steps):
    z = np.array(found[-history:])
    residuals = np.array([g(x) for x in z])
    n = len(z)
    gram = residuals @ residuals.T
    bordered = np.zeros((n + 1, n + 1))
    bordered[0, 1:] = bordered[1:, 0] = 1
    bordered[1:, 1:] = gram + ridge * np.trace(gram) / n * np.eye(n)
    weights = np.linalg.solve(bordered, np.eye(n + 1)[0])[1:]
    found.append(weights @ (z + damping * residuals))
  return found


@pytest.mark.parametrize("name", ["broyden", "anderson"])
def test_iterates_are_those_of_numpy(name):
  """After each number of steps, the one with the smallest residual so far."""
  for steps in (1, 6):
    with jax.enable_x64(True):
      found = solve(Solver(name, steps, "fixed", history=3, damping=0.7))
      z, residual = flat(found.z), np.asarray(found.residual)
    assert (np.asarray(found.iterations) == steps).all()
    for example, inputs in enumerate(INPUTS):

      def g(z, inputs=inputs):
        return np.tanh(MATRIX @ z + inputs) - z

      iterates = (broyden if name == "broyden" else anderson)(g, steps)
      sizes = [np.linalg.norm(g(z)) / np.linalg.norm(g(z) + z) for z in iterates]
      np.testing.assert_allclose(z[example], iterates[np.argmin(sizes)], rtol=1e-8, atol=1e-9)
      np.testing.assert_allclose(residual[example], min(sizes), rtol=1e-6)


@pytest.mark.parametrize(("name", "stop"), [("broyden", "relative"), ("anderson", "absolute")])
def test_each_example_stops_by_itself(name, stop):
  """Below the tolerance, at its own step, with the same bits whatever its neighbours are."""
  solver = Solver(name, 60, stop, 1e-4)
  found = solve(solver)
  z, iterations = flat(found.z), np.asarray(found.iterations)
  size = np.linalg.norm(flat(f((MATRIX, INPUTS), found.z)) - z, axis=1)
  if stop == "relative":
    size /= np.linalg.norm(flat(f((MATRIX, INPUTS), found.z)), axis=1)
  assert (size < 1e-4).all() and (np.asarray(found.residual) < 1e-4).all()
  assert len(set(iterations)) > 1 and iterations.max() < 60
  others = INPUTS[::-1].copy()
  others[0] = INPUTS[0]
  again = solve(solver, others)
  np.testing.assert_array_equal(flat(again.z)[0], z[0])
  assert np.asarray(again.iterations)[0] == iterations[0]


@pytest.mark.parametrize("name", ["broyden", "anderson"])
def test_a_float32_state_stays_so_where_jax_has_64_bits(name):
  with jax.enable_x64(True):
    z0 = (jnp.zeros((2, 3), jnp.float32),)
    found = equilibrium.solve(lambda z: (0.5 * jnp.cos(z[0]),), z0, Solver(name, 20))
  assert found.z[0].dtype == found.residual.dtype == jnp.float32
  assert (found.residual < 1e-3).all()


def test_an_example_that_is_not_finite_harms_no_other():
  inputs = INPUTS.copy()
  inputs[1, 3] = np.nan
  solver = Solver("broyden", 30)
  good, bad = flat(solve(solver).z), flat(solve(solver, inputs).z)
  np.testing.assert_array_equal(bad[[0, 2, 3]], good[[0, 2, 3]])


def loss_by(run, args):
  return jnp.sum(jnp.sin(jnp.concatenate([x.reshape(4, -1) for x in run(args).z], axis=1)))


def test_implicit_gradient_is_that_of_two_hundred_unrolled_steps():
  """By either solver, in float64."""
  with jax.enable_x64(True):
    args = jnp.asarray(MATRIX), jnp.asarray(INPUTS)

    def gradient(run):
      return jax.jit(jax.grad(functools.partial(loss_by, run)), compiler_options=QUICKLY)(args)

    expected = gradient(lambda args: equilibrium.unroll(f, 200, 1.0, args, start(4)))
    for name in ("broyden", "anderson"):
      solver = Solver(name, 80, "relative", 1e-11)
      found = gradient(
        lambda args, solver=solver: equilibrium.fixed_point(f, solver, solver, args, start(4))
      )
      for ours, theirs in zip(found, expected, strict=True):
        assert np.abs(ours - theirs).max() < 1e-6 * np.abs(theirs).max()


def test_memory_does_not_grow_with_the_iterations():
  """Of a gradient by Anderson's method; through unrolled steps it does."""

  def temporaries(run):
    gradient = jax.jit(jax.grad(functools.partial(loss_by, run)))
    args = jnp.asarray(MATRIX, jnp.float32), jnp.asarray(INPUTS, jnp.float32)
    return gradient.lower(args).compile().memory_analysis().temp_size_in_bytes

  def implicit(steps):
    solver = Solver("anderson", steps)
    return temporaries(lambda args: equilibrium.fixed_point(f, solver, solver, args, start(4)))

  def unrolled(steps):
    return temporaries(lambda args: equilibrium.unroll(f, steps, 1.0, args, start(4)))

  assert implicit(8) == implicit(200)
  assert unrolled(200) > 10 * unrolled(8)


def test_loss_of_the_jacobian():
  """Of a linear function: the mean over many probes is |J|^2 per value, in both directions."""
  args = jnp.asarray(MATRIX, jnp.float32), jnp.zeros((4, 12))

  def linear(args, z):
    flat_z = jnp.concatenate([x.reshape(len(x), -1) for x in z], axis=1)
    y = flat_z @ args[0].T
    return y[:, :8].reshape(-1, 2, 2, 2), y[:, 8:].reshape(-1, 1, 1, 4)

  keys = jax.random.split(jax.random.key(0), 2000)

  def mean(args):
    each = jax.vmap(lambda key: equilibrium.jacobian_loss(linear, args, start(4), key))
    return jnp.mean(each(keys))

  value, gradient = jax.jit(jax.value_and_grad(mean))(args)
  np.testing.assert_allclose(value, np.square(MATRIX).sum() / 12, rtol=0.02)
  np.testing.assert_allclose(gradient[0], 2 * MATRIX / 12, atol=0.02)
