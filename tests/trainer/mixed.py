"""Process of test_augment.py: hashes the images and targets that a step makes of its batch.

    JAX_NUM_CPU_DEVICES=8 python -m tests.trainer.mixed FILE 1 2 4 8   on so many of the devices
    python -m launch.local_pod ... -- python -m tests.trainer.mixed FILE 0   on all, of all hosts

Writes {chain: {devices: {"hashes": [of each step], "collectives": [kinds], "images": [shapes]}}}.
"""

import json
import pathlib
import re
import sys

import jax
import jax.numpy as jnp

from input_pipeline import loader, sources
from tests.trainer import tiny
from trainer import augment
from trainer import config as config_lib
from trainer import mesh as mesh_lib
from trainer import step as step_lib
from trainer.pod.join import join_pod
from trainer.state import fingerprints, step_key
from trainer.tools import collectives

STEPS = (0, 5)
CHAINS = {
  # The two examples of a group are on one device of 8, whose micro-batch has two rows of each.
  "own": "mix(mixup=0.2, cutmix=1.0, p=0.9, group=2, per='example')|random_erasing(p=0.5)",
  # Those of these groups are not.
  "wide": "mixup(alpha=0.2)|mix(mixup=0.4, cutmix=1.0, group=8, partner='roll', fold=True)",
}


def get_config(chain):
  config = tiny.get_config()
  config.data.kind, config.global_batch_size, config.accumulation_steps = "synthetic", 32, 2
  config.augment = CHAINS[chain]
  config_lib.validate(config)
  return config


def look(config, devices):
  """Return what a step makes of the batches of STEPS on these devices."""
  mesh, parts = mesh_lib.make_mesh(config.mesh, devices), config.accumulation_steps
  inputs = augment.make_inputs(config)

  def of_step(batch, step):
    def one(carry, micro_batch):
      batch, number = micro_batch
      key_augment, _ = jax.random.split(step_key(config.seed, step, number))
      return carry, inputs(key_augment, batch, step)

    micro_batches = step_lib.split(batch, parts), jnp.arange(parts)
    return jax.lax.scan(one, None, micro_batches)[1]

  source = sources.open_source(config.data, "train", config.model.num_classes)
  compiled, hashes = None, []
  for number in STEPS:
    rows = next(
      loader.train_batches(
        source,
        config.data,
        seed=config.seed,
        first_step=number,
        host=jax.process_index(),
        hosts=jax.process_count(),
        global_batch_size=config.global_batch_size,
      )
    )
    batch = mesh_lib.to_global(mesh, {name: rows[name] for name in ("image", "label")})
    step = jax.device_put(jnp.int32(number), mesh_lib.replicated(mesh))
    compiled = compiled or jax.jit(of_step).lower(batch, step).compile()
    hashes.append(fingerprints(compiled(batch, step)))
  text = compiled.as_text()
  shapes = re.findall(r"f32\[([\d,]+)\]", text)
  return {
    "hashes": hashes,
    "collectives": sorted({each.kind for each in collectives.read(text)}),
    "images": sorted({shape for shape in shapes if shape.endswith("16,16,3")}),
  }


def main(file, *counts):
  with join_pod(get_config("own"), lambda: False):
    seen = {
      chain: {
        count: look(get_config(chain), jax.devices()[: int(count) or None]) for count in counts
      }
      for chain in CHAINS
    }
    if jax.process_index() == 0:
      pathlib.Path(file).write_text(json.dumps(seen))


if __name__ == "__main__":
  main(*sys.argv[1:])
