"""Losses and their gradients against torch and timm, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from trainer import distill, losses

torch = pytest.importorskip("torch", reason="needs the extra parity")
timm_losses = pytest.importorskip("timm.loss", reason="needs the extra parity")

N, CLASSES, SMOOTHING = 32, 50, 0.1
RNG = np.random.default_rng(0)
LOGITS, LABELS = 4 * RNG.normal(size=(N, CLASSES)), RNG.integers(0, CLASSES, N)
ONE_HOT = np.eye(CLASSES)[LABELS]
SHARES = RNG.uniform(size=(N, 1))
MIXED = SHARES * ONE_HOT + (1 - SHARES) * ONE_HOT[::-1]
SMOOTHED_MIXED = (1 - SMOOTHING) * MIXED + SMOOTHING / CLASSES

# (config.loss, label smoothing in the step, targets in the step; loss of theirs and its target)
CASES = {
  "cross entropy": (
    ("softmax_cross_entropy", 0.0, ONE_HOT),
    (torch.nn.CrossEntropyLoss(), LABELS),
  ),
  "cross entropy, smoothing": (
    ("softmax_cross_entropy", SMOOTHING, ONE_HOT),
    (timm_losses.LabelSmoothingCrossEntropy(SMOOTHING), LABELS),
  ),
  "cross entropy, smoothing (torch)": (
    ("softmax_cross_entropy", SMOOTHING, ONE_HOT),
    (torch.nn.CrossEntropyLoss(label_smoothing=SMOOTHING), LABELS),
  ),
  "cross entropy, mixed and smoothed": (
    ("softmax_cross_entropy", SMOOTHING, MIXED),
    (timm_losses.SoftTargetCrossEntropy(), SMOOTHED_MIXED),
  ),
  "cross entropy, smoothing of mixed (torch)": (
    ("softmax_cross_entropy", SMOOTHING, MIXED),
    (torch.nn.CrossEntropyLoss(label_smoothing=SMOOTHING), MIXED),
  ),
  "sigmoid, mean": (
    ("sigmoid_cross_entropy", SMOOTHING, ONE_HOT),
    (timm_losses.BinaryCrossEntropy(SMOOTHING), LABELS),
  ),
  "sigmoid, sum": (
    ("sigmoid_cross_entropy(reduction='sum')", SMOOTHING, ONE_HOT),
    (timm_losses.BinaryCrossEntropy(SMOOTHING, sum_classes=True), LABELS),
  ),
  "sigmoid, mixed": (
    ("sigmoid_cross_entropy", SMOOTHING, MIXED),
    (timm_losses.BinaryCrossEntropy(), SMOOTHED_MIXED),
  ),
  "sigmoid, mixed, threshold (A1)": (
    ("sigmoid_cross_entropy(threshold=0.2)", SMOOTHING, MIXED),
    (timm_losses.BinaryCrossEntropy(target_threshold=0.2), SMOOTHED_MIXED),
  ),
  "sigmoid, mixed, threshold, sum": (
    ("sigmoid_cross_entropy(reduction='sum', threshold=0.2)", 0.0, MIXED),
    (timm_losses.BinaryCrossEntropy(target_threshold=0.2, sum_classes=True), MIXED),
  ),
}


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient(name):
  (text, smoothing, targets), (theirs, their_targets) = CASES[name]
  loss = losses.make_loss(text)
  with jax.enable_x64(True):
    # As trainer.step: the targets, mixed, are smoothed last.
    smoothed = optax.smooth_labels(jnp.asarray(targets), smoothing)
    value, gradient = jax.value_and_grad(lambda x: loss(x, smoothed).mean())(jnp.asarray(LOGITS))
    assert value.dtype == gradient.dtype == jnp.float64
  x = torch.tensor(LOGITS, requires_grad=True)
  expected = theirs(x, torch.tensor(np.asarray(their_targets)))
  expected.backward()
  np.testing.assert_allclose(float(value), expected.item(), rtol=1e-12)
  np.testing.assert_allclose(
    gradient, x.grad.numpy(), rtol=0, atol=1e-12 * abs(x.grad).max().item()
  )


def test_class_numbers_are_one_hot_targets():
  for text in ("softmax_cross_entropy", "sigmoid_cross_entropy(threshold=0.2)"):
    loss = losses.make_loss(text)
    np.testing.assert_allclose(
      loss(jnp.asarray(LOGITS, jnp.float32), jnp.asarray(LABELS)),
      loss(jnp.asarray(LOGITS, jnp.float32), jnp.asarray(ONE_HOT, jnp.float32)),
      rtol=1e-6,
    )


@pytest.mark.parametrize("t", [1.0, 2.5, 10.0])
def test_divergence_from_a_teacher(t):
  """That of torch takes log-probabilities of the student, and has no factor of T^2."""
  teacher = 3 * np.random.default_rng(1).normal(size=(N, CLASSES))
  with jax.enable_x64(True):
    ours, pull = jax.vjp(lambda x: distill.divergence(x, jnp.asarray(teacher), t), LOGITS)
    (grads,) = pull(jnp.ones_like(ours))
    ours, grads = np.asarray(ours), np.asarray(grads)
  x = torch.tensor(LOGITS, requires_grad=True)
  theirs = torch.nn.functional.kl_div(
    torch.log_softmax(x / t, -1), torch.softmax(torch.tensor(teacher) / t, -1), reduction="none"
  )
  theirs = t * t * theirs.sum(-1)
  theirs.sum().backward()
  np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-12)
  np.testing.assert_allclose(grads, x.grad.numpy(), rtol=1e-12, atol=1e-14)
