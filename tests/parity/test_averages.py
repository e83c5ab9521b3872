"""Averages of the weights of SGD against torchvision, timm and TensorFlow's rule.

    python -m pytest tests/parity/test_averages.py -s

prints the largest difference of each over 50 steps of a small net in float64, of every parameter
relative to its norm.
"""

import jax
import pytest

from trainer import averages

torch = pytest.importorskip("torch", reason="torch is what the averages are compared with")
timm_utils = pytest.importorskip("timm.utils", reason="timm has averages")
from tests.parity.small_net import (  # noqa: E402  (needs torch)
  PEAK,
  Net,
  compare,
  differ,
  make_config,
  ours,
  theirs,
  torch_rule,
)


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


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
