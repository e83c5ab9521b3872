"""Frozen parts and rates of parts against torch: parameter groups, no gradient, BN in eval()."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import base
from tests.parity.test_models import Pair, distance, images, to_torch
from trainer import finetune, state
from trainer.optimizer import make_optimizer

torch = pytest.importorskip("torch", reason="needs the extra parity")

_FROZEN = r"conv1\.|bn1\.|layer1\."  # torch's names of what our pattern below matches
_RATES = {r"linear\.": 10.0, r"layer2\.": 0.5, r"layer3\.": 1.0}


def test_three_steps_of_sgd_in_float64():
  labels, rate = np.array([1, 7]), 0.01
  config = base.get_config("cifar_resnet")
  config.optimizer.freeze = "^stem_|^stage1"
  config.optimizer.lr_scales = "^head/:10, ^stage2:0.5"
  config.optimizer.weight_decay, config.optimizer.decay_bn_and_bias = 0.01, True
  with jax.enable_x64(True):
    pair = Pair("akamaster:20", "float64", bn_unbiased=True)
    x = images(16, "float64")
    rule = make_optimizer(config, lambda step: rate)

    @jax.jit
    def step(variables, opt_state, x):
      def loss(params):
        params = finetune.stop_gradients(config.optimizer.freeze, params)
        net = pair.model.merge(variables._replace(params=params), jax.random.key(0))
        finetune.freeze_norms(config.optimizer.freeze, net)
        log_p = jax.nn.log_softmax(net(x))
        return -log_p[jnp.arange(2), labels].mean(), state.variables_of(net).batch_stats

      gradient, statistics = jax.grad(loss, has_aux=True)(variables.params)
      updates, opt_state = rule.update(gradient, opt_state, variables.params)
      params = jax.tree.map(jnp.add, variables.params, updates)
      return variables._replace(params=params, batch_stats=statistics), opt_state

    ours, opt_state = pair.variables, rule.init(pair.variables.params)
    groups = []
    for pattern, factor in _RATES.items():
      own = [p for name, p in pair.theirs.named_parameters() if re.match(pattern, name)]
      groups.append({"params": own, "lr": rate * factor})
    for name, parameter in pair.theirs.named_parameters():
      parameter.requires_grad_(not re.match(_FROZEN, name))
    optimizer = torch.optim.SGD(groups, lr=rate, momentum=0.9, nesterov=True, weight_decay=0.01)
    pair.theirs.train()
    for name, module in pair.theirs.named_modules():
      if isinstance(module, torch.nn.BatchNorm2d) and re.match(_FROZEN, f"{name}."):
        module.eval()
    for _ in range(3):
      ours, opt_state = step(ours, opt_state, x)
      optimizer.zero_grad()
      torch.nn.functional.cross_entropy(pair.theirs(to_torch(x)), torch.tensor(labels)).backward()
      optimizer.step()
    expected = pair.of_torch(pair.theirs.state_dict())
    ours = jax.device_get(ours)
  for tree in ("params", "batch_stats"):
    distances = jax.tree.map(distance, getattr(ours, tree), getattr(expected, tree))
    assert max(jax.tree.leaves(distances)) < 1e-8
    before = getattr(pair.variables, tree)
    for name, same in jax.tree.map(np.array_equal, getattr(ours, tree), before).items():
      same = jax.tree.leaves(same)
      assert all(same) if name.startswith(("stem", "stage1")) else not any(same), name
