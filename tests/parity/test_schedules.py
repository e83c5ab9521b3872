"""Schedules against torch and timm, or numpy where neither has them.

    python -m pytest tests/parity/test_schedules.py -s

prints the largest difference of each over 50 steps, relative to the peak.
"""

import math

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is what the schedules are compared with")
timm_scheduler = pytest.importorskip("timm.scheduler", reason="timm has schedules by epoch")
from tests.parity.small_net import (  # noqa: E402  (needs torch)
  EPOCHS,
  MLPERF,
  PEAK,
  PER_EPOCH,
  RSB,
  STAIRCASE,
  STEPS,
  STEPS_DOWN,
  make_config,
  make_schedule,
)


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


# Their schedulers stand on an optimizer of no importance.


def torch_rates(make):
  rule = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
  scheduler = make(rule)
  rates = []
  for _ in range(STEPS):
    rates.append(rule.param_groups[0]["lr"])
    rule.step()
    scheduler.step()
  return np.array(rates)


def timm_rates(make):
  """Return rates that change once an epoch."""
  rule = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
  scheduler = make(rule)
  rates = []
  for epoch in range(EPOCHS):
    scheduler.step(epoch)
    rates.append(rule.param_groups[0]["lr"])
  return np.repeat(rates, PER_EPOCH)


def by_epoch(rates):
  """Return the rates of a torch scheduler that is stepped once an epoch."""
  return np.repeat(rates[:EPOCHS], PER_EPOCH)


def torchvision_cosine(rule):
  lr = torch.optim.lr_scheduler
  warmup = lr.LinearLR(rule, start_factor=0.01, total_iters=2)
  return lr.SequentialLR(rule, [warmup, lr.CosineAnnealingLR(rule, EPOCHS - 2)], milestones=[2])


def rates_of_mlperf():
  """The words of MLPerf's rules, in numpy: 2 epochs of warm-up, end 0.001."""
  warmup, rates = 2 * PER_EPOCH, []
  for step in range(STEPS):
    left = 1 - (step - warmup) / (STEPS - warmup + 1)
    rates.append(PEAK * step / warmup if step < warmup else 0.001 + (PEAK - 0.001) * left**2)
  return np.array(rates)


def rates_of_tensorflow():
  """EfficientNet's: a staircase counted from step 0, whose beginning a warm-up replaces."""
  warmup, every = PER_EPOCH, 1.5 * PER_EPOCH
  return np.array(
    [
      PEAK * step / warmup if step < warmup else PEAK * 0.7 ** math.floor(step / every)
      for step in range(STEPS)
    ]
  )


def rsb_cosine(rule):
  return timm_scheduler.CosineLRScheduler(
    rule, EPOCHS, lr_min=1e-3 * PEAK, warmup_t=2, warmup_lr_init=0.02 * PEAK
  )


# Name: (fields of ours, rates of theirs).
RATES = {
  "torch MultiStepLR": (
    STEPS_DOWN,
    lambda: torch_rates(lambda r: torch.optim.lr_scheduler.MultiStepLR(r, [10, 25, 40], gamma=0.1)),
  ),
  "torch StepLR by epoch": (
    {"schedule": "step(at=(3, 6, 9), factor=0.5)"},
    lambda: by_epoch(
      torch_rates(lambda r: torch.optim.lr_scheduler.StepLR(r, step_size=3, gamma=0.5))
    ),
  ),
  "torchvision: LinearLR, CosineAnnealingLR by epoch": (
    {"schedule": "cosine(per_epoch=True)", "warmup_epochs": 2.0, "warmup_start": 0.01},
    lambda: by_epoch(torch_rates(torchvision_cosine)),
  ),
  "torch CosineAnnealingLR": (
    {"schedule": "cosine", "final_lr_fraction": 0.1},
    lambda: torch_rates(
      lambda r: torch.optim.lr_scheduler.CosineAnnealingLR(r, STEPS, eta_min=0.1 * PEAK)
    ),
  ),
  "torch LinearLR": (
    {"schedule": "linear", "final_lr_fraction": 0.2},
    lambda: torch_rates(
      lambda r: torch.optim.lr_scheduler.LinearLR(r, 1.0, end_factor=0.2, total_iters=STEPS)
    ),
  ),
  "torch PolynomialLR": (
    {"schedule": "polynomial(power=3)"},
    lambda: torch_rates(
      lambda r: torch.optim.lr_scheduler.PolynomialLR(r, total_iters=STEPS, power=3)
    ),
  ),
  "torch ExponentialLR": (
    {"schedule": "exponential(every=1, factor=0.8, staircase=False)"},
    lambda: torch_rates(
      lambda r: torch.optim.lr_scheduler.ExponentialLR(r, gamma=0.8 ** (1 / PER_EPOCH))
    ),
  ),
  "timm CosineLRScheduler (RSB)": (RSB, lambda: timm_rates(rsb_cosine)),
  "timm CosineLRScheduler, warmup_prefix": (
    {"schedule": "cosine(per_epoch=True)", "warmup_epochs": 2.0, "warmup_start": 0.1},
    lambda: timm_rates(
      lambda r: timm_scheduler.CosineLRScheduler(
        r, EPOCHS - 2, warmup_t=2, warmup_lr_init=0.1 * PEAK, warmup_prefix=True
      )
    ),
  ),
  "timm PolyLRScheduler": (
    {"schedule": "polynomial(power=2, over_warmup=True, per_epoch=True)", "warmup_epochs": 1.0},
    lambda: timm_rates(
      lambda r: timm_scheduler.PolyLRScheduler(r, EPOCHS, power=2, warmup_t=1, warmup_lr_init=0.0)
    ),
  ),
  "MLPerf polynomial (numpy)": (
    MLPERF,
    rates_of_mlperf,
  ),
  "TensorFlow's EfficientNet (numpy)": (
    STAIRCASE,
    rates_of_tensorflow,
  ),
  "FFCV piecewise (numpy)": (
    {"schedule": "piecewise(points=((0, 1e-4), (2, 1.0), (10, 0.0)))"},
    lambda: PEAK * np.interp(np.arange(STEPS) / PER_EPOCH, [0, 2, EPOCHS], [1e-4, 1, 0]),
  ),
}


@pytest.mark.parametrize("name", RATES)
def test_rates(name):
  fields, others = RATES[name]
  mine = np.asarray(make_schedule(make_config(**fields))(np.arange(STEPS)))
  difference = np.abs(mine - others()).max() / PEAK
  print(f"\n{name:60} {difference:.1e}", end="")
  assert difference <= 1e-12


def test_one_cycle_is_that_of_torch_one_step_later():
  steps = STEPS + 1  # torch's turns and ends at pct_start * T - 1 and T - 1
  others = torch.optim.lr_scheduler.OneCycleLR(
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK),
    PEAK,
    total_steps=steps,
    pct_start=(0.3 * STEPS + 1) / steps,
  )
  rates = []
  for _ in range(STEPS):
    rates.append(others.get_last_lr()[0])
    others.optimizer.step()
    others.step()
  config = make_config(schedule="one_cycle(rise=0.3, start=0.04)", final_lr_fraction=0.04 / 1e4)
  mine = np.asarray(make_schedule(config)(np.arange(STEPS)))
  np.testing.assert_allclose(mine, rates, rtol=0, atol=1e-12 * PEAK)
