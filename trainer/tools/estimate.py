"""Estimates of a compiled step and of a whole run on TPUs, as numbers for a report."""

import collections
from collections.abc import Mapping, Sequence
import dataclasses
import math
from typing import Any

import jax
from jax.sharding import Mesh

from trainer.reporting.chips import CHIPS, Chip
from trainer.tools import kinds, live, tpu_cost

# Measured: the table "training" of input_pipeline/README.md, and the mean size of its images.
IMAGES_PER_CORE = 718
IMAGE_BYTES = 112_000
_MOMENTS = 1 << 16  # bytes; sums of a batch norm are fewer, joined sums of gradients more

LEAVES_OUT = (
  "latency and contention of collectives, transfers from the host, and what the compiler's own "
  "figures leave out; what has none counts by its bytes"
)


@dataclasses.dataclass(frozen=True)
class Pod:
  """The chips of a mesh.

  Attributes:
    chip: their kind.
    chips: how many.
    devices_per_chip: that the compiler sees.
    hosts: processes of the run.
    slices: joined by the network.
  """

  chip: Chip
  chips: int
  devices_per_chip: int
  hosts: int
  slices: int


def pod(devices: Sequence[jax.Device]) -> Pod:
  """Return what devices belong to.

  Raises:
    KeyError: if their kind is not in `CHIPS`.
  """
  places = {(getattr(each, "slice_index", 0), tuple(each.coords)) for each in devices}
  return Pod(
    CHIPS[devices[0].device_kind],
    len(places),
    len(devices) // len(places),
    len({(getattr(each, "slice_index", 0), each.process_index) for each in devices}),
    len({getattr(each, "slice_index", 0) for each in devices}),
  )


def step(
  compiled: jax.stages.Compiled, mesh: Mesh, *, batch_size: int, flops: float, training: bool
) -> dict[str, Any]:
  """Return the estimate of a compiled step.

  Args:
    compiled: for the TPUs of `mesh`.
    mesh: of the run.
    batch_size: images of a step.
    flops: model FLOPs of a step, see trainer.reporting.flops.
    training: whether it computes gradients.

  Returns:
    cycles, ms, images_per_second, images_per_second_per_chip, mfu; floors_ms by arithmetic and HBM;
    cycles_by_kind and cycles_by_layer; what the collectives are and take; norm_groups, how many of
    them sum the moments of batch norms or their gradients, by their devices; memory in bytes;
    temporaries, the largest by layer in bytes; estimated_cycles, the sum of what the compiler
    gives; and open_loops, those that end by their values: name, the rounds that they take at most,
    all of which count, or None, where one counts, and their cycles.
  """
  text = compiled.as_text() or ""
  where = pod(mesh.devices.flatten().tolist())
  line = tpu_cost.time_line(
    text, tpu_cost.rates(where.chip, where.devices_per_chip), training=training
  )
  seconds = line.cycles / where.chip.clock
  peak = where.chips * where.chip.peak
  bandwidth = where.chip.hbm_bandwidth / where.devices_per_chip
  return {
    "cycles": round(line.cycles),
    "estimated_cycles": round(line.estimated),
    "cycles_without_collectives": round(line.without_collectives),
    "ms": 1e3 * seconds,
    "images_per_second": batch_size / seconds,
    "images_per_second_per_chip": batch_size / seconds / where.chips,
    "mfu": flops / seconds / peak,
    "floors_ms": {"arithmetic": 1e3 * flops / peak, "hbm": 1e3 * line.hbm_bytes / bandwidth},
    "cycles_by_kind": {kind: round(cycles) for kind, cycles in line.by_kind().items()},
    "cycles_by_layer": {
      layer or "none": round(cycles) for layer, cycles in line.by_layer().items() if cycles >= 1
    },
    "collectives": sent(line, mesh, where.chip.clock),
    "norm_groups": _norm_groups(line),
    "memory": memory(compiled),
    "temporaries": dict(list(live.largest(text, training=training).items())[:8]),
    "open_loops": [dataclasses.asdict(each) for each in line.open_loops],
  }


def memory(compiled: jax.stages.Compiled) -> dict[str, int]:
  """Return bytes on each device of a program for TPUs: what is there, and the total.

  Outputs are those that take no argument's place. For temporaries libtpu (0.0.42) gives a sum that
  has arrays of loops twice, and more than the places that it gives them; and what lives at once,
  arguments and outputs included, but in all memories of a chip. Both are at least what HBM has to
  hold, so the smaller one counts.

  Returns:
    arguments, outputs, temporary, program and total.
  """
  found: Any = compiled.memory_analysis()
  arguments = found.argument_size_in_bytes
  outputs = found.output_size_in_bytes - found.alias_size_in_bytes
  parts = {
    "arguments": arguments,
    "outputs": outputs,
    "temporary": min(
      found.temp_size_in_bytes, max(0, found.peak_memory_in_bytes - arguments - outputs)
    ),
    "program": found.generated_code_size_in_bytes,
  }
  return parts | {"total": sum(parts.values())}


def sent(line: tpu_cost.TimeLine, mesh: Mesh, clock: float) -> list[dict[str, Any]]:
  """Return the collectives of a step by kind and axes of the mesh.

  Returns:
    For each: kind, axes, devices, whether it crosses_slices, count and bytes in a step with all its
    rounds, ms over the links, waited_ms for which nothing else runs, and first and last, where they
    start as shares of their computation.
  """
  groups: dict[tuple[Any, ...], list[tpu_cost.Transfer]] = collections.defaultdict(list)
  for each in line.transfers:
    axes, crosses = _axes(each, mesh)
    groups[each.collective.kind, axes, each.collective.devices, crosses].append(each)
  return [
    {
      "kind": kind,
      "axes": list(axes),
      "devices": devices,
      "crosses_slices": crosses,
      "count": round(sum(each.rounds for each in found)),
      "bytes": round(sum(each.rounds * each.collective.bytes for each in found)),
      "ms": 1e3 / clock * sum(each.rounds * each.cycles for each in found),
      "waited_ms": 1e3 / clock * sum(each.rounds * each.waited for each in found),
      "first": min(each.position for each in found),
      "last": max(each.position for each in found),
    }
    for (kind, axes, devices, crosses), found in sorted(groups.items())
  ]


def _norm_groups(line: tpu_cost.TimeLine) -> dict[int, int]:
  """Return the number of collectives of batch norms in a step, by the devices of each."""
  found: collections.Counter[int] = collections.Counter()
  for each in line.transfers:
    if kinds.is_norm(each.layer) and each.collective.bytes <= _MOMENTS:
      found[each.collective.devices] += round(each.rounds)
  return dict(sorted(found.items()))


def _axes(transfer: tpu_cost.Transfer, mesh: Mesh) -> tuple[tuple[str, ...], bool]:
  """Return the axes of the mesh that a collective is over, and whether it crosses slices."""
  flat = mesh.devices.flatten()
  if transfer.collective.kind.endswith("between slices"):
    return (mesh.axis_names[0],), True
  members = transfer.group or range(len(flat))
  places = [_place(number, mesh.devices.shape) for number in members]
  axes = tuple(
    name
    for name, along in zip(mesh.axis_names, zip(*places, strict=True), strict=True)
    if len(set(along)) > 1
  )
  return axes, len({getattr(flat[number], "slice_index", 0) for number in members}) > 1


def _place(number: int, shape: tuple[int, ...]) -> tuple[int, ...]:
  """Return the coordinates of a device in a mesh."""
  place = []
  for length in reversed(shape):
    number, rest = divmod(number, length)
    place.append(rest)
  return tuple(reversed(place))


def host_side(where: Pod, images_per_second: float) -> dict[str, Any]:
  """Return what each host must deliver: images and bytes a second, and cores to decode them."""
  images = images_per_second / where.hosts
  # A slice of one host has all its chips.
  available = where.chip.host_cores // 2 * where.chips // where.hosts // 4
  cores = images / IMAGES_PER_CORE
  return {
    "hosts": where.hosts,
    "images_per_second": images,
    "cores": cores,
    "cores_available": available,
    "bytes_per_second": images * IMAGE_BYTES,
    "enough": cores <= available,
  }


def run(
  train: Mapping[int, float],
  lengths: Sequence[tuple[int, int]],
  *,
  total: int,
  evaluations: int,
  eval_steps: int,
  eval_seconds: float,
  start_seconds: float,
  chips: int,
  dollars_per_chip_hour: float | None,
) -> dict[str, Any]:
  """Return time and money of a whole run.

  Args:
    train: seconds of a training step by image size.
    lengths: (first step, image size), rising.
    total: steps of the run.
    evaluations: how many.
    eval_steps: of each.
    eval_seconds: of a step of theirs.
    start_seconds: until the first step.
    chips: that are paid for.
    dollars_per_chip_hour: None for no price.

  Returns:
    hours of training, evaluation, start and in all; chip_hours; and dollars, if there is a price.
  """
  ends = [first for first, _ in lengths[1:]] + [total]
  training = sum(
    max(0, min(end, total) - first) * train[size]
    for (first, size), end in zip(lengths, ends, strict=True)
  )
  evaluating = evaluations * eval_steps * eval_seconds
  hours = {
    "training": training / 3600,
    "evaluation": evaluating / 3600,
    "start": start_seconds / 3600,
  }
  hours["total"] = math.fsum(hours.values())
  result: dict[str, Any] = {"hours": hours, "chip_hours": hours["total"] * chips}
  if dollars_per_chip_hour is not None:
    result["dollars"] = result["chip_hours"] * dollars_per_chip_hour
  return result
