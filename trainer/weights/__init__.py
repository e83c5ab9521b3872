"""Weights in and out: python -m trainer.weights; `load` for programs."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
  from flax import nnx
  import ml_collections

  from trainer.weights.about import About


def load(
  origin: str, config: "ml_collections.ConfigDict | None" = None, *, averaged: bool = True
) -> "tuple[nnx.Module, About]":
  """Return a model with its weights, in evaluation mode and float32, and what is known about them.

  The model turns normalised images, float32 [N, H, W, 3], into logits [N, classes];
  `trainer.augment.normalize` makes these of pixels. `features` of a residual net returns the output
  of each stage.

  Args:
    origin: workdir, or file of safetensors or torch.save; local, gs://, or https:// with a
      checksum.
    config: of the model; None for a workdir, and for files that are exported from one.
    averaged: whether averages over steps are taken where there are both.

  Raises:
    trainer.errors.TrainerError: one sentence, if they are missing, damaged, or of another model.
  """
  import jax
  import jax.numpy as jnp

  from trainer.weights import read

  net, leaves, about = read.read_model(origin, averaged, config)
  model = net.model.merge(jax.tree.map(jnp.asarray, net.variables(leaves)), None)
  return model, about
