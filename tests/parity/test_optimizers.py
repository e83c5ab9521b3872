"""Optimizers against torch and timm, or numpy where neither has them.

    python -m pytest tests/parity/test_optimizers.py -s

prints the largest difference of each over 50 steps of a small net in float64, of every parameter
relative to its norm.
"""

import math

import jax
import numpy as np
import pytest

from trainer import optimizer

torch = pytest.importorskip("torch", reason="torch is what the optimizers are compared with")
timm_optim = pytest.importorskip("timm.optim", reason="timm has Lamb, Lars and RMSpropTF")
timm_utils = pytest.importorskip("timm.utils", reason="timm has adaptive clipping")
from tests.parity.small_net import (  # noqa: E402  (needs torch)
  MLPERF,
  PEAK,
  RSB,
  STAIRCASE,
  STEPS_DOWN,
  compare,
  differ,
  make_config,
  numpy_rule,
  ours,
  theirs,
  torch_rule,
)


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


# Each with a rate that changes.


def clip_to(norm):
  """Clip gradients; torch's clip_grad_norm_ does it with the norm plus 1e-6."""
  clipped = []

  def clip(net):
    grads = [p.grad for p in net.parameters()]
    length = math.sqrt(sum(float((g**2).sum()) for g in grads))
    clipped.append(length > norm)
    for g in grads:
      g.mul_(min(1.0, norm / length))

  return clip, clipped


def clip_units(factor):
  clipped = []

  def clip(net):
    before = net.conv.grad.clone()
    timm_utils.agc.adaptive_clip_grad([net.conv, net.scale, net.offset], clip_factor=factor)
    clipped.append(not torch.equal(before, net.conv.grad))

  return clip, clipped


def mlperf_lars(w, g, memory, rate, decays):
  """LARS as the rules of MLPerf have it; biases and BN have plain momentum at the same rate."""
  if decays:
    w_norm, g_norm = np.linalg.norm(w), np.linalg.norm(g)
    ratio = 0.01 * w_norm / (g_norm + 0.02 * w_norm) if w_norm > 0 and g_norm > 0 else 1.0
    g = ratio * (g + 0.02 * w)
  memory["sum"] = 0.9 * memory.get("sum", 0.0) + rate * g
  return w - memory["sum"]


def composer_sgd(w, g, memory, rate, decays):
  """Composer's DecoupledSGDW: decay by the rate over its start value, the peak."""
  memory["sum"] = 0.9 * memory.get("sum", 0.0) + g
  shrunk = w * (1 - 0.02 * rate / PEAK) if decays else w
  return shrunk - rate * memory["sum"]


WARM = {"warmup_epochs": 2.0}
OPTIMIZERS = {
  "torch SGD, nesterov, clipped": (
    WARM | {"name": "sgd", "clip_norm": 1.0},
    torch_rule(lambda net: torch.optim.SGD(net.groups(0.02), lr=PEAK, momentum=0.9, nesterov=True)),
    clip_to(1.0),
  ),
  "torch SGD, everything decays": (
    {"name": "sgd", "nesterov": False, "decay_bn_and_bias": True} | STEPS_DOWN,
    torch_rule(
      lambda net: torch.optim.SGD(net.parameters(), lr=PEAK, momentum=0.9, weight_decay=0.02)
    ),
  ),
  "torch SGD, timm's adaptive_clip_grad": (
    WARM | {"name": "sgd", "agc": 0.1},
    torch_rule(lambda net: torch.optim.SGD(net.groups(0.02), lr=PEAK, momentum=0.9, nesterov=True)),
    clip_units(0.1),
  ),
  "timm SGDW": (
    WARM | {"name": "sgd", "nesterov": False, "decay": "decoupled"},
    torch_rule(lambda net: timm_optim.SGDW(net.groups(0.02), lr=PEAK, momentum=0.9)),
  ),
  "Composer DecoupledSGDW (numpy)": (
    WARM | {"name": "sgd", "nesterov": False, "decay": "scheduled"},
    numpy_rule(composer_sgd),
  ),
  "torch AdamW": (
    WARM | {"name": "adamw"},
    torch_rule(lambda net: torch.optim.AdamW(net.groups(0.02), lr=PEAK)),
  ),
  "torch Adam": (
    WARM | {"name": "adamw", "decay": "coupled"},
    torch_rule(lambda net: torch.optim.Adam(net.groups(0.02), lr=PEAK)),
  ),
  "big_vision: torch AdamW with decay over the peak": (
    WARM | {"name": "adamw", "decay": "scheduled"},
    torch_rule(lambda net: torch.optim.AdamW(net.groups(0.02 / PEAK), lr=PEAK)),
  ),
  "timm Lamb (RSB)": (
    RSB | {"name": "lamb"},
    torch_rule(lambda net: timm_optim.Lamb(net.groups(0.02), lr=PEAK)),
  ),
  "MLPerf LARS (numpy)": (
    MLPERF | {"name": "lars", "eta": 0.01},
    numpy_rule(mlperf_lars),
  ),
  # Its rate stands outside of the momentum: equal where the rate is constant.
  "timm Lars at a constant rate": (
    {"name": "lars", "schedule": "constant"},
    torch_rule(
      lambda net: timm_optim.Lars(
        net.groups(0.02), lr=PEAK, momentum=0.9, trust_coeff=0.001, eps=0.0
      )
    ),
  ),
  "timm RMSpropTF": (
    STAIRCASE | {"name": "rmsprop"},
    torch_rule(
      lambda net: timm_optim.RMSpropTF(net.groups(0.02), lr=PEAK, alpha=0.9, eps=1e-3, momentum=0.9)
    ),
  ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_fifty_steps(name):
  fields, take, *clips = OPTIMIZERS[name]
  config = make_config(**fields)
  optimizer.check(config)
  rates, mine, _ = ours(config)
  compare(name, mine, theirs(take, rates, *(clip for clip, _ in clips))[0])
  assert all(any(clipped) for _, clipped in clips)


def test_timm_lars_differs_while_the_rate_changes():
  """The tests above can fail: its rate stands outside of the momentum."""
  rates, mine, _ = ours(make_config(name="lars", warmup_epochs=2.0))
  take = torch_rule(lambda net: timm_optim.Lars(net.groups(0.02), lr=PEAK, momentum=0.9, eps=0.0))
  assert differ(mine, theirs(take, rates)[0]) > 1e-3
