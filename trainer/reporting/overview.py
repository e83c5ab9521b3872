"""What is about to run, for the first screen of the log."""

from collections.abc import Mapping, Sequence
from typing import Any

from clu import parameter_overview
import jax
import ml_collections

from configs import base
from configs.names import counted
from trainer import config as config_lib
from trainer import finetune, models
from trainer import mesh as mesh_lib
from trainer.program import Program
from trainer.run import Opened
from trainer.sparse import show as sparse_show
from trainer.workdir.files import read_json

_SHOWN = 100  # letters of a list in a line


def first_screen(opened: Opened) -> str:
  """Return what is about to run, in ten lines; with what has changed since the start before."""
  program, train_source = opened.program, opened.train_source
  config, lengths, devices = program.config, program.lengths, jax.devices()
  data = config.data
  family = models.family_of(config.model).describe(models.own_fields(config.model))
  model = [family, f"{count_params(program):,} parameters"]
  model += [f"{config.model.num_classes} classes", config.model.dtype]
  order = train_source.describe_order(
    data,
    global_batch_size=config.global_batch_size,
    hosts=jax.process_count(),
  )
  counts = " and ".join(f"{len(source):,}" for source in opened.eval_sources.values())
  splits = f"{len(train_source):,} to train, {counts} to evaluate"
  trained = data.image_sizes and f"{data.image_sizes} (epoch:px)"
  sizes = f"{trained or data.image_size} and {data.eval_image_size} px"
  length = f"{lengths.total:,} steps of {config.global_batch_size}"
  epochs = f"{lengths.total / lengths.per_epoch:.2f} epochs, warm-up {lengths.warmup:,}"
  if lengths.uncut_warmup:
    epochs += f" (cut from {lengths.uncut_warmup:,}, more than the run has)"
  every = f"evaluation every {lengths.eval_every or lengths.total:,}"
  mesh = " x ".join(f"{name} {size}" for name, size in program.mesh.shape.items())
  defaults = base.get_config(config.model.name).to_dict()
  changed = config_lib.differences(defaults, config.to_dict())
  fields = [f"{name}={now!r}" for name, (_, now) in changed.items()]
  lines = {
    "model": ", ".join(model),
    "data": f"{data.path or data.kind}: {splits}, at {sizes}",
    "order": order,
    "length": f"{length}, {epochs}, {every}",
    "decay": _decay(program) + (f"; frozen: {_frozen(program)}" * bool(config.optimizer.freeze)),
    "devices": f"{len(devices)} x {devices[0].device_kind} of "
    f"{counted(jax.process_count(), 'host')}, mesh {mesh}",
    "config": f"differs from configs/base.py in {_some(fields)}",
    "changed": _since(read_json(opened.workdir.config), config),
    "writes to": f"{opened.workdir.path}, with all parameters and fields in overview.txt",
  }
  if program.sparse:
    lines["sparsity"] = sparse_show.line(program.sparse)
  if program.teacher:
    lines["teacher"] = str(program.teacher)
  return "\n".join(["This run:", *[f"  {name:9} {line}" for name, line in lines.items()]])


def details(opened: Opened) -> str:
  """Return every field that differs from its default, the shardings and the table of parameters."""
  program = opened.program
  defaults = base.get_config(program.config.model.name).to_dict()
  changed = config_lib.differences(defaults, program.config.to_dict())
  return "\n".join(
    [
      *[f"  config.{name}={now!r} (default {old!r})" for name, (old, now) in changed.items()],
      *[f"  {line}" for line in mesh_lib.describe_shardings(program.abstract_state)],
      parameter_overview.get_parameter_overview(program.abstract_state.params, include_stats=False),
      *([sparse_show.table(program.sparse)] if program.sparse else []),
    ]
  )


def _since(before: Mapping[str, Any] | None, config: ml_collections.ConfigDict) -> str:
  if before is None:
    return "nothing: this is the first start in this workdir"
  changes = config_lib.differences(before, config.to_dict())
  words = [f"{name}: {old!r} -> {new!r}" for name, (old, new) in changes.items()]
  return f"since the last start {_some(words)}"


def _some(words: Sequence[str]) -> str:
  """Return as many of the words as fit in a line, and how many more there are."""
  count = min(1, len(words))
  while count < len(words) and len(", ".join(words[: count + 1])) <= _SHOWN:
    count += 1
  more = len(words) - count
  return (", ".join(words[:count]) or "nothing") + (f" and {more} more" if more else "")


def count_params(program: Program) -> int:
  """Return the number of trained parameters."""
  return sum(x.size for x in jax.tree.leaves(program.abstract_state.params))


def _frozen(program: Program) -> str:
  frozen = finetune.frozen(program.config.optimizer.freeze, program.abstract_checkpoint.params)
  return f"{sum(x.size for x in frozen.values()):,} parameters in {len(frozen)} leaves"


def _decay(program: Program) -> str:
  fields, params = program.config.optimizer, program.abstract_checkpoint.params
  mask = program.mask(params) if program.mask else jax.tree.map(lambda _: True, params)
  sizes = [x.size for x in jax.tree.leaves(params)]
  decayed = [size for size, decays in zip(sizes, jax.tree.leaves(mask)) if decays]
  line = f"weight decay {fields.weight_decay:g} on {len(decayed)} of {len(sizes)} leaves"
  line += f", {sum(decayed):,} of {sum(sizes):,} parameters"
  return line if fields.decay == "own" else f"{line}, {fields.decay}"
