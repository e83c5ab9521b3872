"""Checks of a config that need its table of fields alone, and so no JAX."""

from collections.abc import Iterator, Mapping
import difflib
import json
from typing import Any

import ml_collections

from configs import base
from configs.fields import Field, problem

# What trainers elsewhere call a field: the flags of timm and torchvision, the config of Flax's
# ImageNet example.
ELSEWHERE = {
  "total_epochs": ("epochs", "num_epochs", "n_epochs", "max_epochs"),
  "total_steps": ("num_train_steps", "num_steps", "steps", "max_steps", "train_steps"),
  "global_batch_size": ("batch_size", "bs", "b", "train_batch_size", "batch"),
  "accumulation_steps": ("grad_accum_steps", "gradient_accumulation_steps", "grad_accum"),
  "optimizer.lr_per_256": ("learning_rate", "base_lr", "lr_base", "base_learning_rate"),
  "optimizer.name": ("opt",),
  "optimizer.schedule": ("sched", "lr_scheduler", "scheduler", "lr_schedule"),
  "optimizer.weight_decay": ("wd", "l2"),
  "optimizer.ema_decay": ("ema", "model_ema", "model_ema_decay"),
  "optimizer.warmup_epochs": ("lr_warmup_epochs", "warmup"),
  "label_smoothing": ("smoothing",),
  "augment": ("mixup", "cutmix", "mixup_alpha", "cutmix_alpha", "mix"),
  "data.operations": ("aa", "auto_augment", "autoaugment", "randaugment", "color_jitter", "reprob"),
  "data.path": ("data_dir", "data_path", "dir", "dataset", "root", "train_dir"),
  "data.workers": ("num_workers", "j", "n_workers"),
  "data.image_size": ("img_size", "input_size", "train_crop_size", "resolution", "crop_size"),
  "data.val_fraction": ("val_split", "validation_split", "val_pct"),
  "model.name": ("arch", "architecture", "model_name", "network"),
  "model.dtype": ("half_precision", "amp", "fp16", "bf16", "mixed_precision"),
  "init_from": ("pretrained", "weights", "checkpoint_path", "initial_checkpoint", "finetune"),
  "eval.every_epochs": ("val_interval", "eval_interval", "steps_per_eval"),
  "log.every_steps": ("log_interval", "print_freq", "log_every_steps", "log_every"),
  "checkpoint.every_steps": ("steps_per_checkpoint", "checkpoint_every_steps", "save_every"),
  "log.wandb": ("use_wandb", "log_wandb", "wandb_project"),
}
_ALMOST, _NEAR = 0.85, 0.65  # of difflib: a letter or two; the half of it
_MEANT = {word: name for name, words in ELSEWHERE.items() for word in words}


def flatten(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Return {"model.depth": 50, ...} with tuples as lists, as JSON gives them back."""

  def walk(tree: dict[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
      if isinstance(value, dict):
        yield from walk(value, f"{prefix}{key}.")
      else:
        yield prefix + key, value

  return dict(walk(json.loads(json.dumps(config.to_dict())), ""))


def check(config: ml_collections.ConfigDict) -> None:
  """Refuse fields that are unknown, missing, of another type than their default, or out of range.

  Raises:
    ValueError: one sentence that names the first of them, or fields that exclude each other.
  """
  fields, values = base.all_fields(config.model.name), flatten(config)
  for name in sorted(values.keys() - fields.keys()):
    raise ValueError(f"config.{name} {not_a_field(name, fields, config.model.name)}")
  for name, field in fields.items():
    if name not in values:
      raise ValueError(f"config.{name} is missing; build the config on configs.base.get_config().")
    if trouble := problem(name, field, values[name]):
      raise ValueError(trouble)
  for name in base.DURATIONS:
    epochs, steps = values[f"{name}_epochs"], values[f"{name}_steps"]
    if epochs and steps:
      raise ValueError(
        f"config.{name}_epochs is {epochs} and config.{name}_steps is {steps}; "
        "set one of them to 0."
      )
  if values["distill.teacher"] and not values["distill.weight"]:
    raise ValueError(
      f"config.distill.teacher is {values['distill.teacher']}, but config.distill.weight is 0; set "
      "it to 1 to learn from the teacher alone, or to the share that it has beside the labels."
    )
  if not values["total_epochs"] and not values["total_steps"]:
    raise ValueError("config.total_epochs and config.total_steps are both 0; set one of them.")


def not_a_field(name: str, fields: Mapping[str, Field], family: str) -> str:
  """Return what follows "config.NAME": that it is none, and which one was probably meant."""
  of = f"the model family {family}" if name.startswith("model.") else "configs/base.py"
  return f"is not a field of {of}" + (
    f"; did you mean config.{near}?" if (near := nearest(name, fields)) else "."
  )


def nearest(name: str, fields: Mapping[str, Field]) -> str:
  """Return the field that was probably meant; "" if none is near.

  What other trainers call so comes first, except where the section has a name that is spelled
  almost alike; then a name that is right in another section, as lr of optimizer typed without it;
  then what is spelled most like it.
  """
  section, _, leaf = name.rpartition(".")
  beside = {
    field.rpartition(".")[2]: field for field in fields if field.rpartition(".")[0] == section
  }
  if close := difflib.get_close_matches(leaf, beside, n=1, cutoff=_ALMOST):
    return beside[close[0]]
  if (meant := _MEANT.get(leaf)) in fields:
    return str(meant)
  same = [field for field in fields if field.rpartition(".")[2] == leaf]
  if len(same) == 1:
    return same[0]
  if close := difflib.get_close_matches(leaf, beside, n=1, cutoff=_NEAR):
    return beside[close[0]]
  return next(iter(difflib.get_close_matches(name, fields, n=1, cutoff=_NEAR)), "")
