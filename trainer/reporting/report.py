"""One page about a run: its result, its curves, where the time went, what its config changes.

    python -m trainer.report WORKDIR [--picture=FILE.png]

writes WORKDIR/report.html, a single file without links to anything, from what the run left in its
workdir: `events/` (curves), `config.json` and, once it is finished, `final.json`. With `--picture`
it also writes a PNG of result, first curves and wall time, small enough to be sent or committed.
"""

import argparse
import base64
from collections.abc import Mapping, Sequence
import html
import io
import itertools
import json
import logging
import re
import sys
from typing import TYPE_CHECKING, Any

import ml_collections
import numpy as np

from configs import base
from trainer import config as config_lib
from trainer import models
from trainer.errors import ConfigError, TrainerError
from trainer.reporting import events
from trainer.reporting.clock import format_seconds
from trainer.workdir import files, storage
from trainer.workdir.paths import Workdir

if TYPE_CHECKING:
  from matplotlib.axes import Axes

# Steps, values and wall times by name, as events.read_scalars returns them.
Scalars = Mapping[str, tuple[np.ndarray, np.ndarray, np.ndarray]]
# Legend, colour, steps and values.
Curve = tuple[str, str, np.ndarray, np.ndarray]

# It warns that it builds a cache of fonts, of which nobody needs to know.
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)

# They differ in lightness too, for readers who cannot tell them apart by hue.
_TRAIN, _EVAL, _EVAL_2 = "#2563c9", "#e8833a", "#0b6b50"
# Of raw weights, and of further splits.
_MORE = ("#9aa3af", "#8a63c7", "#cf3f4f", "#1c2430")
# Title, factor of the values, and (scalar, legend, colour) of each curve.
_PANELS = (
  ("Loss", 1, (("train/loss", "train", _TRAIN), ("eval/loss", "eval", _EVAL))),
  (
    "Accuracy, %",
    100,
    (
      ("train/top1", "train top-1", _TRAIN),
      ("eval/top1", "eval top-1", _EVAL),
      ("eval/top5", "eval top-5", _EVAL_2),
    ),
  ),
  ("Learning rate", 1, (("train/learning_rate", "", _TRAIN),)),
  ("Size of training images, px", 1, (("train/image_size", "", _TRAIN),)),
  ("Gradient norm", 1, (("train/grad_norm", "", _TRAIN),)),
  ("Images per second", 1, (("train/images_per_second", "", _TRAIN),)),
  ("Model FLOPs utilisation, %", 100, (("train/mfu", "", _TRAIN),)),
  (
    "Time of a step, ms",
    1000,
    (
      ("train/step_seconds_median", "median", _TRAIN),
      ("train/step_seconds_p99", "99th percentile", _EVAL),
    ),
  ),
  ("Waiting for input, % of time", 100, (("train/input_wait", "", _TRAIN),)),
  ("Goodput, % of time since the first start", 100, (("train/goodput", "", _TRAIN),)),
)
_CAUSES = {
  "step": ("training steps", "#2563c9"),
  "eval": ("evaluation", "#12906f"),
  "compile": ("compilation", "#8a63c7"),
  "checkpoint": ("checkpoints", "#e0a021"),
  "input_wait": ("waiting for input", "#cf3f4f"),
  "restart": ("restarts", "#1c2430"),
  "other": ("other", "#9aa3af"),
}
_STYLE = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; color: #1c2430;
  background: #f6f7f9; margin: 0; padding: 32px 20px 56px; }
main { max-width: 1060px; margin: 0 auto; }
h1 { font-size: 28px; line-height: 1.2; margin: 0; }
h2 { font-size: 17px; margin: 34px 0 12px; }
.muted { color: #5c6675; }
.note { background: #fff5dc; border: 1px solid #efd79a; border-radius: 10px; padding: 10px 16px;
  margin: 20px 0 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: 12px;
  margin-top: 20px; }
.cards > div, .panels img, .box { background: #fff; border: 1px solid #e2e6ec;
  border-radius: 10px; }
.cards > div { padding: 12px 16px; }
.cards b { display: block; font-size: 22px; line-height: 1.3; overflow-wrap: anywhere; }
.cards .main b { color: #2563c9; font-size: 34px; line-height: 1.1; }
.cards span { font-size: 13px; }
.panels { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(440px, 100%), 1fr));
  gap: 12px; }
.panels img { width: 100%; display: block; padding: 12px 10px 8px; }
.box { padding: 16px; }
.bar { display: flex; height: 26px; border-radius: 6px; overflow: hidden; gap: 1px; }
.legend { display: flex; flex-wrap: wrap; gap: 6px 22px; margin-top: 12px; font-size: 14px; }
.legend i { display: inline-block; width: 11px; height: 11px; border-radius: 3px;
  margin-right: 7px; }
.scroll { padding: 6px 0; overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th, td { text-align: left; padding: 6px 16px; border-bottom: 1px solid #eceff3;
  overflow-wrap: anywhere; }
tr:last-child td { border-bottom: 0; }
th { color: #5c6675; font-weight: 500; }
td { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: 13px; }
"""


def write_report(workdir: str) -> str:
  """Write the report of a run, finished or not.

  Args:
    workdir: folder of the run, local or gs://.

  Returns:
    The path of the report, WORKDIR/report.html; one that is already there is replaced.

  Raises:
    ValueError: if the run has logged nothing yet, or the folder is no workdir.
    ConfigError: if it is a bucket that cannot be used.
    TrainerError: if a file of it cannot be read.
  """
  run, config, final, scalars = _read_run(workdir)
  sections = [_headline(run.path.name, config, final, scalars), _curves(scalars)]
  if final is not None:
    sections.append(_time(final["wall_seconds"], final["goodput"]))
  if config is not None:
    sections.append(_config_changes(config))
  storage.write_whole(
    run.report,
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f"<title>{html.escape(_title(config))}: {html.escape(run.path.name)}</title>\n"
    f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n"
    + "\n".join(sections)
    + "\n</main>\n</body>\n</html>\n",
  )
  return str(run.report)


def write_picture(workdir: str, path: str) -> None:
  """Write a PNG of a run: result, the first curves and, of a finished run, the wall time by cause.

  Args:
    workdir: folder of the run, local or gs://.
    path: file to write, local or gs://.

  Raises:
    ValueError, TrainerError: as `write_report` does.
    OSError: if `path` cannot be written.
  """
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure
  from PIL import Image

  _, config, final, scalars = _read_run(workdir)
  panels = _panels(scalars)[:6]
  title = _title(config)
  if final is not None:
    title += f": {final['top1']:.2%} top-1 after {final['epochs']:.1f} epochs on {final['devices']}"
  figure = Figure(figsize=(10.8, 6.4), dpi=100, layout="constrained")
  figure.suptitle(title, x=0.01, ha="left", fontsize=15, fontweight="bold", color="#1c2430")
  grid = figure.subplot_mosaic("012;345;ttt", height_ratios=[1, 1, 0.16])
  for axes in grid.values():
    axes.set_axis_off()
  for i, panel in enumerate(panels):
    grid[str(i)].set_axis_on()
    _draw(grid[str(i)], *panel)
  if final is not None:
    _draw_time(grid["t"], final["wall_seconds"])
  canvas, picture = FigureCanvasAgg(figure), io.BytesIO()
  canvas.draw()
  # A palette is enough for lines on white, and a fraction of the size.
  Image.fromarray(np.asarray(canvas.buffer_rgba())).convert("RGB").quantize(256).save(
    picture, "PNG", optimize=True
  )
  storage.path_of(path).write_bytes(picture.getvalue())


def _read_run(
  workdir: str,
) -> tuple[Workdir, dict[str, Any] | None, dict[str, Any] | None, Scalars]:
  """Return the folder of a run, its config and its result as far as they exist, and its curves.

  Raises:
    ValueError, TrainerError: as `write_report` does.
  """
  directory = storage.path_of(workdir)
  trouble = storage.problem(directory)
  if trouble:
    raise ConfigError(f"{directory} cannot be read: {trouble}.")
  run = Workdir(directory)
  scalars = events.read_scalars(run.events) if run.events.exists() else {}
  if not scalars:
    raise ValueError(
      f"{directory} has nothing to report: {run.events} holds no event files with scalars."
    )
  return run, files.read_json(run.config), files.read_json(run.final), scalars


def _title(config: Mapping[str, Any] | None) -> str:
  if config is None:
    return "Training run"
  model = ml_collections.ConfigDict(config["model"])
  try:
    return models.family_of(model).describe(models.own_fields(model))
  except (ValueError, KeyError):  # a family that is not here, or a field of another version
    return model.name


def _headline(
  name: str, config: Mapping[str, Any] | None, final: Mapping[str, Any] | None, scalars: Scalars
) -> str:
  """Return title and result, or how far the run is."""
  last_step = max(int(steps[-1]) for steps, _, _ in scalars.values())
  note = ""
  if final is not None:
    best = final["best"]
    best = (
      f"top-1; best {best['top1']:.2%} at step {best['step']:,}"
      if best and best["step"] != final["step"]
      else "top-1, the best of the run"
    )
    cards = [
      (f"{final['top1']:.2%}", best),
      (f"{final['top5']:.2%}", "top-5"),
      (f"{final['loss']:.3f}", f"loss on {final['examples']:,} examples"),
      *_further_results(final),
      (f"{final['epochs']:.1f}", f"epochs, {final['step']:,} steps"),
      (format_seconds(sum(_causes(final["wall_seconds"]).values())), "wall time"),
      (f"{final['images_per_second']:,.0f}", "images per second"),
      (_millions(final["params"]), "parameters"),
      (str(final["devices"]), "devices"),
    ]
  else:
    note = (
      '<p class="note">This run is not finished: there is no final result, and the last logged '
      f"step is {last_step:,}.</p>"
    )
    cards = []
    if "eval/top1" in scalars:
      steps, values, _ = scalars["eval/top1"]
      cards.append((f"{values[-1]:.2%}", f"top-1 at step {steps[-1]:,}, its last evaluation"))
      best = int(np.argmax(values))
      cards.append((f"{values[best]:.2%}", f"best top-1, at step {steps[best]:,}"))
    cards.append((f"{last_step:,}", "steps so far"))
    if "train/loss" in scalars:
      cards.append((f"{scalars['train/loss'][1][-1]:.3f}", "training loss"))
    if "train/images_per_second" in scalars:
      cards.append((f"{scalars['train/images_per_second'][1][-1]:,.0f}", "images per second"))
    if "train/goodput" in scalars:
      cards.append((f"{scalars['train/goodput'][1][-1]:.1%}", "goodput"))
  return (
    f"<h1>{html.escape(_title(config))}</h1>\n"
    f'<div class="muted">{html.escape(name)}</div>\n{note}'
    '<div class="cards">\n'
    + "\n".join(
      f"<div{' class=main' if i == 0 else ''}><b>{html.escape(value)}</b>"
      f'<span class="muted">{html.escape(label)}</span></div>'
      for i, (value, label) in enumerate(cards)
    )
    + "\n</div>"
  )


def _further_results(final: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Return the accuracies of raw weights and of all splits but the first, each with its words."""
  cards = []
  if "raw_top1" in final:
    cards.append((f"{final['raw_top1']:.2%}", "top-1 of weights that are not averaged"))
  for name, result in final.get("splits", {}).items():
    cards.append((f"{result['top1']:.2%}", f"top-1 on {name}, {result['examples']:,} examples"))
  return cards


def _further_curves(scalars: Scalars) -> list[tuple[str, str, str]]:
  """Return scalar, legend and colour of their curves."""
  names = [name for name in ("eval/raw_top1",) if name in scalars]
  names += sorted(name for name in scalars if re.fullmatch(r"eval/.+/top1", name))
  legends = ["not averaged" if n == "eval/raw_top1" else n.split("/", 1)[1][:-5] for n in names]
  return [
    (name, f"{legend} top-1", colour)
    for name, legend, colour in zip(names, legends, itertools.cycle(_MORE))
  ]


def _panels(scalars: Scalars) -> list[tuple[str, list[Curve]]]:
  """Return title and curves of each panel of which at least one curve was logged."""
  panels = []
  for title, factor, names in _PANELS:
    if title.startswith("Accuracy"):
      names = (*names, *_further_curves(scalars))
    curves = [
      (label, colour, scalars[name][0], factor * scalars[name][1])
      for name, label, colour in names
      if name in scalars
    ]
    if curves:
      panels.append((title, curves))
  return panels


def _curves(scalars: Scalars) -> str:
  """Return the curves as HTML, a picture for each panel."""
  pictures = []
  for title, curves in _panels(scalars):
    last = ", ".join(f"{label or 'last value'} {values[-1]:.4g}" for label, _, _, values in curves)
    pictures.append(
      f'<img alt="{title}: {last}" src="data:image/png;base64,'
      f'{base64.b64encode(_plot(title, curves)).decode()}">'
    )
  return '<h2>Curves</h2>\n<div class="panels">\n' + "\n".join(pictures) + "\n</div>"


def _plot(title: str, curves: Sequence[Curve]) -> bytes:
  """Return the PNG of a panel."""
  # Imported here: a training process that fails needs no matplotlib. The Agg canvas is named, so
  # that neither a display nor matplotlib's global state is involved.
  from matplotlib.backends.backend_agg import FigureCanvasAgg
  from matplotlib.figure import Figure

  figure = Figure(figsize=(5.4, 3.1), dpi=150, layout="constrained")
  _draw(figure.add_subplot(), title, curves)
  picture = io.BytesIO()
  FigureCanvasAgg(figure).print_png(picture)
  return picture.getvalue()


def _draw(axes: "Axes", title: str, curves: Sequence[Curve]) -> None:
  """Draw curves over the step on the axes of matplotlib."""
  from matplotlib import ticker

  for label, colour, steps, values in curves:
    # Mark the points of a curve that has few, such as that of evaluations.
    axes.plot(
      steps,
      values,
      color=colour,
      label=label,
      linewidth=1.6,
      marker="o" if len(steps) <= 40 else None,
      markersize=3,
    )
  axes.set_title(title, loc="left", fontsize=11, fontweight="bold", color="#1c2430")
  axes.grid(color="#e8ebef", linewidth=0.8)
  axes.set_axisbelow(True)
  axes.spines[["top", "right", "left", "bottom"]].set_visible(False)
  axes.tick_params(labelsize=9, colors="#5c6675", length=0)
  if title != "Loss":
    axes.set_ylim(bottom=0)  # so that noise looks as small as it is; a loss may stay far from 0
  axes.set_xlabel("step", fontsize=9, color="#5c6675")
  axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
  axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
  if any((np.abs(values) >= 10_000).any() for *_, values in curves):
    axes.yaxis.set_major_formatter(ticker.EngFormatter(sep=""))
  if len(curves) > 1:
    axes.legend(fontsize=9, frameon=False, labelcolor="#1c2430")


def _causes(wall_seconds: Mapping[str, float]) -> dict[str, float]:
  """Return the seconds of each cause, the longest first; a total is no cause."""
  causes = {name: seconds for name, seconds in wall_seconds.items() if name != "total"}
  return dict(sorted(causes.items(), key=lambda item: -item[1]))


def _time(wall_seconds: Mapping[str, float], goodput: Mapping[str, Any]) -> str:
  """Return a bar of the wall time by cause, and the share of it that went into steps that count."""
  causes = _causes(wall_seconds)
  total = sum(causes.values())
  bar, legend = [], []
  for cause, seconds in causes.items():
    label, colour = _CAUSES.get(cause, (cause, "#9aa3af"))
    share = seconds / total
    bar.append(f'<div style="flex: {share:.6f} 0 0; background: {colour}"></div>')
    legend.append(
      f'<span><i style="background: {colour}"></i>{html.escape(label)} '
      f'<span class="muted">{format_seconds(seconds)}, {share:.1%}</span></span>'
    )
  starts = "one start" if goodput["starts"] == 1 else f"{goodput['starts']} starts"
  return (
    f"<h2>Wall time by cause: goodput {goodput['share']:.1%}, {starts}</h2>\n"
    f'<div class="box"><div class="bar">{"".join(bar)}</div>\n'
    f'<div class="legend">{"".join(legend)}</div></div>'
  )


def _draw_time(axes: "Axes", wall_seconds: Mapping[str, float]) -> None:
  """Draw the bar of `_time` on the axes of matplotlib; causes below a pixel get no words."""
  causes, left = _causes(wall_seconds), 0.0
  total = sum(causes.values())
  for cause, seconds in causes.items():
    label, colour = _CAUSES.get(cause, (cause, "#9aa3af"))
    words = f"{label} {format_seconds(seconds)}" if seconds > total / 1000 else None
    axes.barh(0, seconds, left=left, color=colour, label=words)
    left += seconds
  axes.set_xlim(0, total)
  axes.set_title("Wall time by cause", loc="left", fontsize=11, fontweight="bold", color="#1c2430")
  axes.legend(
    loc="upper left",
    bbox_to_anchor=(0, 0),
    ncols=7,
    fontsize=9,
    frameon=False,
    borderaxespad=0,
    handlelength=1,
    columnspacing=1.5,
  )


def _config_changes(config: Mapping[str, Any]) -> str:
  """Return the fields in which the config differs from configs/base.py."""
  ours = config_lib.flatten(ml_collections.ConfigDict(config))
  try:
    defaults = config_lib.flatten(base.get_config(config["model"]["name"]))
  except ValueError:  # a family from elsewhere that is not on this machine
    defaults = config_lib.flatten(base.get_config())
  rows = "".join(
    f"<tr><td>{html.escape(field)}</td><td>{html.escape(_value(ours, field))}</td>"
    f'<td class="muted">{html.escape(_value(defaults, field))}</td></tr>\n'
    for field in sorted({*defaults, *ours})
    if field not in ours or field not in defaults or ours[field] != defaults[field]
  )
  if not rows:
    return "<h2>Config</h2>\n<p>Nothing differs from configs/base.py.</p>"
  return (
    '<h2>Config: what differs from configs/base.py</h2>\n<div class="box scroll"><table>\n'
    f"<tr><th>field</th><th>this run</th><th>base</th></tr>\n{rows}</table></div>"
  )


def _value(flat: Mapping[str, Any], field: str) -> str:
  return json.dumps(flat[field]) if field in flat else "absent"


def _millions(number: int) -> str:
  return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number:,}"


def main(arguments: Sequence[str] | None = None) -> int:
  """Write the report of the workdir named in `arguments`; return the exit code."""
  parser = argparse.ArgumentParser(
    prog="python -m trainer.report", description=__doc__.split("\n")[0]
  )
  parser.add_argument("workdir", help="folder of the run")
  parser.add_argument("--picture", metavar="FILE.png", help="also write a small picture of it")
  options = parser.parse_args(arguments)
  try:
    print(write_report(options.workdir))
    if options.picture:
      write_picture(options.workdir, options.picture)
  except (ValueError, TrainerError, OSError) as error:
    print(error, file=sys.stderr)
    return 2
  return 0
