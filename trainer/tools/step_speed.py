"""How fast a training step of ResNet-50 is beside that of Flax's ImageNet example."""

import argparse
import ast
from collections.abc import Callable, Sequence
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from configs import checks, imagenet_resnet50, recipes
from trainer import config as config_lib
from trainer import mesh as mesh_lib
from trainer import program as program_lib
from trainer.errors import ConfigError
from trainer.pod.requests import NOTHING
from trainer.tools import flax_example


def our_program(
  devices: Sequence[jax.Device],
  batch: int,
  fields: str,
  size: int = flax_example.SIZE,
  dtype: str = "bfloat16",
) -> program_lib.Program:
  """Return the program of configs/imagenet_resnet50.py, its BN over a device's own examples.

  Args:
    devices: to compute on.
    batch: images over all of them.
    fields: to set besides, as in "accumulation_steps=8 model.bn_group=32".
    size: pixels of images.
    dtype: of activations.

  Raises:
    ConfigError: the fields are refused.
  """
  config = imagenet_resnet50.get_config()
  config.global_batch_size = config.eval.batch_size = batch
  config.data.image_size = size
  config.model.bn_group, config.model.dtype = "device", dtype
  known = checks.flatten(config)
  for field in fields.split():
    name, _, text = field.partition("=")
    try:
      value = text if isinstance(known[name], str) else ast.literal_eval(text)
      config.update_from_flattened_dict({name: value})
    except (KeyError, SyntaxError, ValueError, TypeError) as error:
      raise ConfigError(f"--ours: {field!r} is not FIELD=VALUE of a config ({error}).") from error
  config_lib.validate(config)
  config_lib.check_split(config, num_devices=len(devices))
  return program_lib.build(config, recipes.IMAGENET, devices)


def _ours(program: program_lib.Program, batch: dict[str, np.ndarray]) -> Callable[[], jax.Array]:
  """Return a function that takes a step of ours and returns what it measured."""
  train_step = program.compile("train", **program.sizes("train"))
  state, on_devices = program.init_state(), mesh_lib.to_global(program.mesh, batch)
  requests = mesh_lib.flags(program.mesh, NOTHING)

  def take() -> jax.Array:
    nonlocal state
    state, output = train_step(state, on_devices, requests)
    return output.metrics

  return take


def _theirs(
  example: flax_example.Program, batch: dict[str, np.ndarray], dtype: str
) -> Callable[[], jax.Array]:
  """Return a function that takes a step of the example, on normalised images, likewise."""
  train_step = example.lowered.compile()
  state = jax.jit(example.init, out_shardings=example.whole)()
  normalised = (batch["image"].astype(np.float32) - 127.5) / 58.0
  images = jax.device_put(normalised.astype(jnp.dtype(dtype)), example.split)
  labels = jax.device_put(batch["label"], example.split)

  def take() -> jax.Array:
    nonlocal state
    state, metrics = train_step(state, images, labels)
    return metrics["loss"]

  return take


def bench_step(args: argparse.Namespace) -> None:
  """Print images per second of a ResNet-50 step over those of Flax's ImageNet example.

  Ours is the step of configs/imagenet_resnet50.py, with BN over a device's own examples. Both get
  one batch of noise that is on the devices already, ours as bytes and the example's normalised, and
  have activations of the same dtype. Their steps take turns in each round.
  """
  devices = jax.devices()
  dtype = args.dtype or ("float32" if devices[0].platform == "cpu" else "bfloat16")
  batch_size = args.batch_size * len(devices)
  rng = np.random.default_rng(0)
  batch = {
    "image": rng.integers(0, 256, (batch_size, args.image_size, args.image_size, 3), np.uint8),
    "label": rng.integers(0, flax_example.CLASSES, batch_size, np.int32),
  }
  rows = args.ours.split(";")
  programs = [our_program(devices, batch_size, row, args.image_size, dtype) for row in rows]
  example = flax_example.build(devices, batch_size, args.image_size, jnp.dtype(dtype))
  sides = [_theirs(example, batch, dtype), *(_ours(program, batch) for program in programs)]
  names = ["Flax's example", *(f"ours {row.strip()}".strip() for row in rows)]
  speeds: list[list[float]] = []
  for number in range(args.rounds + 1):
    found = []
    for take in sides:
      start = time.perf_counter()
      for _ in range(args.steps):
        loss = take()
      jax.block_until_ready(loss)
      found.append(args.steps * batch_size / (time.perf_counter() - start))
    if number:  # the first steps allocate
      speeds.append(found)
      print(
        f"round {number:2}: {' '.join(f'{speed:10,.2f}' for speed in found)} images/s", flush=True
      )
  print(
    f"{len(devices)} x {devices[0].device_kind}, {args.batch_size} images of {args.image_size} px "
    f"each, {dtype}; medians of {args.rounds} rounds of {args.steps} steps"
  )
  for name, column in zip(names, zip(*speeds)):
    ratios = [speed / found[0] for speed, found in zip(column, speeds)]
    print(
      f"{statistics.median(column):10,.2f} images/s  {statistics.median(ratios):.3f} "
      f"({min(ratios):.3f} to {max(ratios):.3f})  {name}"
    )
