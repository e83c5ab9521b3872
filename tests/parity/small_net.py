"""A small net, trained by our optimizers and by others: 50 steps in float64.

A convolution, the scale and the offset of a normalisation, a head. Both sides compute their own
gradients; a difference is that of a parameter relative to its norm.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from tests.trainer import tiny
from trainer import averages, optimizer, schedules

torch.set_num_threads(1)
STEPS, PER_EPOCH, EPOCHS = 50, 5, 10
PEAK = 0.05
LIMIT = 1e-10

# Fields of schedules that optimizers are tested with, too.
STEPS_DOWN = {"schedule": "step(at=(2, 5, 8), factor=0.1)"}
RSB = {
  "warmup_epochs": 2.0,
  "warmup_start": 0.02,
  "final_lr_fraction": 1e-3,
  "schedule": "cosine(over_warmup=True, per_epoch=True)",
}
MLPERF = {
  "schedule": "polynomial(power=2, extra_steps=1)",
  "warmup_epochs": 2.0,
  "final_lr_fraction": 0.001 / PEAK,
}
STAIRCASE = {"schedule": "exponential(every=1.5, factor=0.7)", "warmup_epochs": 1.0}


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
