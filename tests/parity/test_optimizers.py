"""Optimizers, rates and averages against torch and timm, or numpy where neither has them.

    python -m pytest tests/parity/test_optimizers.py -s

prints the largest difference of each over 50 steps of a small net in float64, of every parameter
relative to its norm. Both sides compute their own gradients.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.trainer import tiny
from trainer import averages, optimizer, schedules

torch = pytest.importorskip("torch", reason="torch is what the optimizers are compared with")
timm_optim = pytest.importorskip("timm.optim", reason="timm has Lamb, Lars and RMSpropTF")
timm_scheduler = pytest.importorskip("timm.scheduler", reason="timm has schedules by epoch")
timm_utils = pytest.importorskip("timm.utils", reason="timm has adaptive clipping and averages")

torch.set_num_threads(1)
STEPS, PER_EPOCH, EPOCHS = 50, 5, 10
PEAK = 0.05
LIMIT = 1e-10


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


def make_config(**fields):
  config = tiny.get_config()
  config.model.dtype = "float64"
  config.total_steps, config.total_epochs = 0, float(EPOCHS)
  config.optimizer.lr, config.optimizer.lr_per_256 = PEAK, 0.0
  config.optimizer.weight_decay = 0.02
  config.optimizer.update(fields)
  return config


def make_schedule(config):
  return schedules.make_schedule(
    config,
    warmup_steps=round(config.optimizer.warmup_epochs * PER_EPOCH),
    total_steps=STEPS,
    per_epoch=PER_EPOCH,
  )


# A convolution, the scale and the offset of a normalisation, a head.


def start():
  rng = np.random.default_rng(0)
  return {
    "conv": {"kernel": rng.normal(size=(3, 3, 2, 4))},
    "bn": {"scale": rng.uniform(0.5, 1.5, 4), "bias": np.zeros(4)},
    "head": {"kernel": rng.normal(size=(4, 3)), "bias": np.zeros(3)},
  }


def batches():
  rng = np.random.default_rng(1)
  return rng.normal(size=(STEPS, 8, 6, 6, 2)), rng.integers(0, 3, (STEPS, 8))


def loss_of(params, images, labels):
  x = jax.lax.conv_general_dilated(
    images, params["conv"]["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  x = jax.nn.relu(x * params["bn"]["scale"] + params["bn"]["bias"]).mean((1, 2))
  logits = x @ params["head"]["kernel"] + params["head"]["bias"]
  # Times 3, so that clipping clips.
  return 3 * optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def ours(config, ema_start=0):
  """Return the rates, and parameters and averages after each step, numpy [STEPS, ...] by name."""
  exact = make_schedule(config)

  def schedule(step):
    return exact(jnp.asarray(step, jnp.int64))  # an int32 over another is a float32

  rule = optimizer.make_optimizer(config, schedule)
  average = averages.make_average(config, ema_start)

  def take_step(state, batch):
    step, params, opt_state, ema = state
    grads = jax.grad(loss_of)(params, *batch)
    updates, opt_state = rule.update(grads, opt_state, params)
    params = optax.apply_updates(params, updates)
    ema = average(ema, params, {}, step)
    return (step + 1, params, opt_state, ema), (schedule(step), params, ema["params"])

  @jax.jit
  def run(params, images, labels):
    ema = {"params": params, "batch_stats": {}}
    state = jnp.zeros((), jnp.int32), params, rule.init(params), ema
    return jax.lax.scan(take_step, state, (images, labels))[1]

  params = jax.tree.map(jnp.asarray, start())
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float64")}
  rates, params, averaged = run(params, *batches())
  return np.asarray(rates, np.float64), flatten(params), flatten(averaged)


def flatten(tree):
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf)
    for path, leaf in jax.tree.leaves_with_path(tree)
  }


class Net(torch.nn.Module):
  """The same net; kernels are OIHW and [out, in]."""

  def __init__(self):
    super().__init__()
    w = {name: torch.tensor(x) for name, x in flatten(start()).items()}
    self.conv = torch.nn.Parameter(w["conv/kernel"].permute(3, 2, 0, 1).contiguous())
    self.scale = torch.nn.Parameter(w["bn/scale"])
    self.offset = torch.nn.Parameter(w["bn/bias"])
    self.kernel = torch.nn.Parameter(w["head/kernel"].T.contiguous())
    self.bias = torch.nn.Parameter(w["head/bias"])

  def groups(self, weight_decay):
    vectors = [self.scale, self.offset, self.bias]
    return [
      {"params": [self.conv, self.kernel], "weight_decay": weight_decay},
      {"params": vectors, "weight_decay": 0.0},
    ]

  def forward(self, images, labels):
    x = torch.nn.functional.conv2d(images, self.conv)
    x = torch.relu(x * self.scale[:, None, None] + self.offset[:, None, None]).mean((2, 3))
    logits = x @ self.kernel.T + self.bias
    return 3 * torch.nn.functional.cross_entropy(logits, labels)

  def weights(self):
    w = {name: x.detach().numpy().copy() for name, x in self.named_parameters()}
    return {
      "conv/kernel": w["conv"].transpose(2, 3, 1, 0),
      "bn/scale": w["scale"],
      "bn/bias": w["offset"],
      "head/kernel": w["kernel"].T,
      "head/bias": w["bias"],
    }


def theirs(take, rates, clip=lambda net: None, average=None):
  """Return parameters and, with `average`, averages after each step, as `ours` does.

  Args:
    take: (net) -> (rate) -> None, which takes a step with the gradients of the net.
    rates: of each step, those that `ours` had: they have tests of their own.
    clip: changes the gradients of a net before.
    average: (net) -> (step, net) -> averaged net.
  """
  net = Net()
  take, average = take(net), average and average(net)
  steps, averaged = [], []
  for step, (images, labels) in enumerate(zip(*batches())):
    net.zero_grad()
    net(torch.tensor(images).permute(0, 3, 1, 2), torch.tensor(labels)).backward()
    clip(net)
    take(float(rates[step]))
    steps.append(net.weights())
    if average:
      averaged.append(average(step, net).weights())
  return [
    {name: np.stack([one[name] for one in each]) for name in each[0]} if each else None
    for each in (steps, averaged)
  ]


def torch_rule(make):
  """Return a `take` of an optimizer: make(groups) of torch."""

  def take(net):
    rule = make(net)

    def step(rate):
      for group in rule.param_groups:
        group["lr"] = rate
      rule.step()

    return step

  return take


def numpy_rule(update):
  """Return a `take` of (w, g, memory, rate, decays) -> new w, for each parameter."""

  def take(net):
    memory = {name: {} for name, _ in net.named_parameters()}

    def step(rate):
      for name, p in net.named_parameters():
        new = update(p.detach().numpy(), p.grad.numpy(), memory[name], rate, p.ndim > 1)
        p.data.copy_(torch.tensor(new))

    return step

  return take


def differ(a, b):
  """Return the largest difference of two runs, of each parameter relative to its norm."""
  assert a.keys() == b.keys()
  worst = 0.0
  for name in a:
    distance = np.sqrt(((a[name] - b[name]) ** 2).reshape(STEPS, -1).sum(1))
    norm = np.sqrt((b[name] ** 2).reshape(STEPS, -1).sum(1))
    assert norm[-1] > 0  # it has moved
    worst = max(worst, (distance / np.maximum(norm, 1e-3)).max())
  return worst


def compare(what, mine, others, limit=LIMIT):
  difference = differ(mine, others)
  print(f"\n{what:60} {difference:.1e}", end="")
  assert difference <= limit
  return difference


# Rates: those of torch and timm, computed by their schedulers on an optimizer of no importance.


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


RSB = {
  "warmup_epochs": 2.0,
  "warmup_start": 0.02,
  "final_lr_fraction": 1e-3,
  "schedule": "cosine(over_warmup=True, per_epoch=True)",
}


def rsb_cosine(rule):
  return timm_scheduler.CosineLRScheduler(
    rule, EPOCHS, lr_min=1e-3 * PEAK, warmup_t=2, warmup_lr_init=0.02 * PEAK
  )


# Name: (fields of ours, rates of theirs).
RATES = {
  "torch MultiStepLR": (
    {"schedule": "step(at=(2, 5, 8), factor=0.1)"},
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
    {
      "schedule": "polynomial(power=2, extra_steps=1)",
      "warmup_epochs": 2.0,
      "final_lr_fraction": 0.001 / PEAK,
    },
    rates_of_mlperf,
  ),
  "TensorFlow's EfficientNet (numpy)": (
    {"schedule": "exponential(every=1.5, factor=0.7)", "warmup_epochs": 1.0},
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


# Optimizers. Each with a rate that changes.


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
    {"name": "sgd", "nesterov": False, "decay_bn_and_bias": True} | RATES["torch MultiStepLR"][0],
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
    RATES["MLPerf polynomial (numpy)"][0] | {"name": "lars", "eta": 0.01},
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
    RATES["TensorFlow's EfficientNet (numpy)"][0] | {"name": "rmsprop"},
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


# Averages, of the weights of SGD.


def torchvision_average(decay, every, warmup):
  """torchvision's ExponentialMovingAverage and the lines of its train.py that call it."""

  def average(net):
    model = torch.optim.swa_utils.AveragedModel(
      net, avg_fn=lambda averaged, new, _: decay * averaged + (1 - decay) * new, use_buffers=True
    )

    def update(step, net):
      if step % every == 0:
        model.update_parameters(net)
        if step < warmup:
          model.n_averaged.fill_(0)
      return model.module

    return update

  return average


def timm_average(**options):
  def average(net):
    model = timm_utils.ModelEmaV3(net, **options)

    def update(step, net):
      model.update(net, step=step + 1)
      return model.module

    return update

  return average


def tensorflow_average(net):
  """tf.train.ExponentialMovingAverage(0.8, num_updates=step)."""
  memory = Net()

  def update(step, net):
    decay = min(0.8, (1 + step) / (10 + step))
    for old, new in zip(memory.parameters(), net.parameters()):
      old.data.copy_(old.data - (1 - decay) * (old.data - new.data))
    return memory

  return update


AVERAGES = {
  # Every 5 steps divide its epochs: it counts anew in each.
  "torchvision's average": (
    {"ema_decay": 0.7, "ema_rule": "constant", "ema_every_steps": 5},
    10,
    torchvision_average(0.7, every=5, warmup=10),
  ),
  "timm ModelEmaV3": ({"ema_decay": 0.9, "ema_rule": "constant"}, 0, timm_average(decay=0.9)),
  "timm ModelEmaV3, use_warmup": (
    {"ema_decay": 0.9, "ema_rule": "timm(gamma=2.0, power=0.75)"},
    0,
    timm_average(decay=0.9, use_warmup=True, warmup_gamma=2.0, warmup_power=0.75),
  ),
  "TensorFlow's average (torch)": ({"ema_decay": 0.8}, 0, tensorflow_average),
}


@pytest.mark.parametrize("name", AVERAGES)
def test_averages(name):
  fields, ema_start, average = AVERAGES[name]
  config = make_config(nesterov=False, warmup_epochs=2.0, **fields)
  averages.check(config)
  take = torch_rule(lambda net: torch.optim.SGD(net.groups(0.02), lr=PEAK, momentum=0.9))
  rates, params, averaged = ours(config, ema_start)
  compare(name, averaged, theirs(take, rates, average=average)[1])
  assert differ(averaged, params) > 1e-3  # an average, no copy


def test_timm_lars_differs_while_the_rate_changes():
  """The tests above can fail: its rate stands outside of the momentum."""
  rates, mine, _ = ours(make_config(name="lars", warmup_epochs=2.0))
  take = torch_rule(lambda net: timm_optim.Lars(net.groups(0.02), lr=PEAK, momentum=0.9, eps=0.0))
  assert differ(mine, theirs(take, rates)[0]) > 1e-3
