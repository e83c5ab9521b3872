"""A net of a thousand layers learns: 200 steps of 16 handwritten digits at 32 px, on a CPU.

    python -m tests.trainer.deep [DEPTH [STEPS]]

A quarter of the width of CIFAR ResNet-1202, scanned. Prints the loss of every tenth step. A program
of its own, for the tests compile without optimisation, which a thousand layers cannot do without.
"""

import sys

import numpy as np

from trainer import mesh as mesh_lib
from trainer import program as program_lib
from trainer.pod.requests import NOTHING
from trainer.tools import depth


def losses(layers: int, steps: int) -> list[float]:
  from sklearn import datasets

  config = depth.net_config(
    "cifar_resnet", layers, scan=True, remat="none", width=0.25, image_size=32, batch_size=16
  )
  config.model.shortcut, config.label_smoothing = "pad", 0.0
  config.total_steps, config.optimizer.warmup_steps = steps, 20
  config.optimizer.update({"name": "adamw", "lr": 3e-3, "lr_per_256": 0.0, "weight_decay": 0.0})
  program = program_lib.build(config, 1437)
  train_step = program.compile("train", **program.sizes("train"))
  state, requests = program.init_state(), mesh_lib.flags(program.mesh, NOTHING)
  digits = datasets.load_digits()
  images = np.repeat((digits.images * 15.9375).astype(np.uint8)[..., None], 3, axis=-1)
  images = images.repeat(4, axis=1).repeat(4, axis=2)
  found, rng = [], np.random.default_rng(0)
  for step in range(steps):
    chosen = rng.integers(0, 1437, 16)
    batch = {"image": images[chosen], "label": digits.target[chosen].astype(np.int32)}
    state, output = train_step(state, mesh_lib.to_global(program.mesh, batch), requests)
    found.append(float(output.metrics[0]))
    if step % 10 == 9:
      print(f"step {step + 1}  loss {np.mean(found[-10:]):.3f}", flush=True)
  return found


if __name__ == "__main__":
  words = [int(word) for word in sys.argv[1:]]
  losses(*words, *(1202, 200)[len(words) :])
