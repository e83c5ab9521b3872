"""The report of launch.preflight, for a person."""

from collections.abc import Callable
from typing import Any

from configs.names import counted

_WIDTH = 24  # of a bar


def text(report: dict[str, Any]) -> str:
  """Return the lines of a report; see launch.preflight."""
  slices, chips, devices = report["slices"], report["chips"], report["devices"]
  parts = [
    f"{counted(chips, 'chip')} ({report['chip']})",
    *[counted(devices, "device")] * (devices != chips),
    counted(report["hosts"], "host"),
    "mesh " + " ".join(f"{axis}={size}" for axis, size in report["mesh"].items()),
  ]
  where = f"{slices} x {report['topology']}" if slices > 1 else report["topology"]
  what = f"{report['config']} on {where}: {', '.join(parts)}"
  by = f"All times are estimates, by libtpu {report['libtpu']}."
  lines = [what, by, f"They leave out {report['leaves_out']}.", ""]
  lines += _section("State", report["shardings"])
  for step in report["steps"]:
    lines += ["", *_step(step, report)]
  lines += ["", *_section("Hosts", _hosts(report["host"]))]
  lines += ["", *_section("Run", _run(report))]
  if "largest_batch_per_chip" in report:
    largest = report["largest_batch_per_chip"]
    lines += ["", f"Largest batch that fits: {largest} images a chip."]
  if found := report.get("checkpoint"):
    lines += ["", *_section("Checkpoint", _checkpoint(found))]
  if programs := report.get("programs"):
    lines += ["", *_section("Compiled programs", _programs(programs))]
  return "\n".join(lines)


def _section(title: str, lines: list[str]) -> list[str]:
  return [f"{title}:", *(f"  {line}" for line in lines)]


def _step(step: dict[str, Any], report: dict[str, Any]) -> list[str]:
  name = "Training" if step["mode"] == "train" else "Evaluation"
  floors, used, all_of_it = step["floors_ms"], step["memory"]["total"], report["hbm_bytes"]
  speed = (
    f"{step['ms']:.1f} ms ({step['cycles'] / 1e6:.2f} M cycles), "
    f"{step['images_per_second_per_chip']:,.0f} images/s a chip, "
    f"{step['images_per_second']:,.0f} in all, MFU {100 * step['mfu']:.1f} %"
  )
  floor = (
    f"floors: {floors['arithmetic']:.1f} ms of arithmetic, at most {floors['hbm']:.1f} ms of this "
    "schedule's HBM traffic"
  )
  fit = (
    f"fits: {mib(used)} of {mib(all_of_it)} a device, {mib(all_of_it - used)} free; compiled in "
    f"{step['compile_cpu_seconds']:.0f} CPU-seconds"
  )
  parts = [f"{what} {mib(size)}" for what, size in step["memory"].items() if what != "total"]
  lines = [speed, floor]
  lines += [_loop(each, step["cycles"]) for each in step["open_loops"]]
  lines += [fit, f"memory: {', '.join(parts)}"]
  lines += _table(
    "largest temporaries, by the layer that wrote them",
    step["temporaries"],
    mib,
    step["memory"]["temporary"],
  )
  lines += _table("cycles by kind", step["cycles_by_kind"], _cycles)
  lines += _table("cycles by layer", _outer(step["cycles_by_layer"]), _cycles)
  lines += ["collectives:" + " none" * (not step["collectives"])]
  lines += [f"  {_collective(each)}" for each in step["collectives"]]
  for each in step.get("as_asked", []):
    words = "as asked" if each["as_asked"] else "WARNING: not as asked"
    lines.append(f"{each['what']}, {words}: {each['asked']}; {each['found']}")
  images = f"{step['batch_size']} images of {step['image_size']} px, {step['per_chip']:g} a chip"
  return _section(f"{name} step, {images}", lines)


def _checkpoint(found: dict[str, Any]) -> list[str]:
  line = (
    f"{found['workdir']} restores onto this topology: step {found['step']:,} of {found['of']:,}, "
    f"{found['leaves']} leaves"
  )
  return [line, *(f"by config.resume.allow: {name}" for name in found["changes"])]


def _programs(programs: dict[str, Any]) -> list[str]:
  size = mib(sum(programs["files"].values()))
  line = f"{len(programs['files'])} in {programs['folder']}, {size}"
  how = "parts of their keys; JAX_DEBUG_LOG_MODULES=jax._src.cache_key logs those of a host:"
  return [
    line,
    how,
    *(f"  {name}: {', '.join(dict.fromkeys(found))}" for name, found in programs["key"].items()),
  ]


def _outer(by_layer: dict[str, float]) -> dict[str, float]:
  """Return cycles of whole blocks: the first part of each path."""
  totals: dict[str, float] = {}
  for layer, cycles in by_layer.items():
    name = layer.split("/")[0]
    totals[name] = totals.get(name, 0.0) + cycles
  return totals


def _table(
  title: str, values: dict[str, float], show: Callable[[float], str], whole: float = 0.0
) -> list[str]:
  """Return a line for each value, with its share of the whole: by default of their sum."""
  if not values:
    return []
  whole, most = whole or sum(values.values()), max(values.values())
  return [
    f"{title}:",
    *(
      f"  {name or 'none':30} {show(value):>11} {100 * value / whole:5.1f} % "
      f"{'#' * round(_WIDTH * value / most)}".rstrip()
      for name, value in values.items()
    ),
  ]


def _loop(loop: dict[str, Any], of_step: float) -> str:
  counts = f"with its {loop['most']} rounds at most" if loop["most"] else "with one round"
  share = 100 * loop["cycles"] / of_step
  return f"{loop['name']} ends by its values, and counts {counts}: {share:.1f} % of the step"


def _collective(each: dict[str, Any]) -> str:
  where = ", between slices" if each["crosses_slices"] else ""
  axes = " and ".join(each["axes"]) or "nothing"
  return (
    f"{each['kind']} over {axes} ({each['devices']} devices{where}): {each['count']}, "
    f"{mib(each['bytes'])}, {each['ms']:.2f} ms on the links, {each['waited_ms']:.2f} of them "
    f"waited for; start at {100 * each['first']:.0f} to {100 * each['last']:.0f} % of the step"
  )


def _hosts(host: dict[str, Any]) -> list[str]:
  need = (
    f"each of {host['hosts']} delivers {host['images_per_second']:,.0f} images/s: "
    f"{host['cores']:.1f} cores at the measured decode rate (input_pipeline/README.md), "
    f"{host['bytes_per_second'] / 1e6:,.0f} MB/s of JPEG"
  )
  lines = [need]
  if not host["enough"]:
    lines.append(
      f"WARNING: it has about {host['cores_available']} cores. Prepare shards with --max-size=256, "
      "or use more hosts for as many chips."
    )
  return lines


def _run(report: dict[str, Any]) -> list[str]:
  run = report["run"]
  hours = run["hours"]
  line = (
    f"{run['train_steps']:,} steps: {hours['training']:.2f} h, evaluations "
    f"{hours['evaluation']:.2f} h, start {hours['start']:.2f} h as compiled here; in all "
    f"{hours['total']:.2f} h, {run['chip_hours']:,.1f} chip-hours"
  )
  return [line + (f", {run['dollars']:,.2f} dollars" if "dollars" in run else "")]


def mib(size: float) -> str:
  """Returns a number of bytes in words."""
  return f"{size / 2**20:,.1f} MiB"


def _cycles(cycles: float) -> str:
  return f"{cycles / 1e6:.2f} M"
