"""What is about to run, for the first screen of the log."""

from collections.abc import Mapping

from clu import parameter_overview
import jax

from input_pipeline import sources
from trainer import finetune, models
from trainer import mesh as mesh_lib
from trainer.program import Program


def describe(
  program: Program, train_source: sources.Source, eval_sources: Mapping[str, sources.Source]
) -> str:
  """Return model, data, length, devices, shardings and the table of parameters, as lines."""
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
  counts = " and ".join(f"{len(source):,}" for source in eval_sources.values())
  splits = f"{len(train_source):,} to train, {counts} to evaluate"
  trained = data.image_sizes and f"{data.image_sizes} (epoch:px)"
  sizes = f"{trained or data.image_size} and {data.eval_image_size} px"
  length = f"{lengths.total:,} steps of {config.global_batch_size}"
  epochs = f"{lengths.total / lengths.per_epoch:.2f} epochs, warm-up {lengths.warmup:,}"
  every = f"evaluation every {lengths.eval_every or lengths.total:,}"
  mesh = f"mesh {dict(program.mesh.shape)}, {jax.process_count()} process(es)"
  params = program.abstract_state.params
  lines = {
    "model": ", ".join(model),
    "data": f"{data.path or data.kind}: {splits}, at {sizes}",
    "order": order,
    "length": f"{length}, {epochs}, {every}",
    "decay": _decay(program),
    **({"frozen": _frozen(program)} if config.optimizer.freeze else {}),
    "devices": f"{len(devices)} x {devices[0].device_kind}, {mesh}",
  }
  return "\n".join(
    [
      "This run:",
      *[f"  {name:9} {line}" for name, line in lines.items()],
      *[f"  {line}" for line in mesh_lib.describe_shardings(program.abstract_state)],
      parameter_overview.get_parameter_overview(params, include_stats=False),
    ]
  )


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
