"""A picture of a run: its result, its first curves and, once it is finished, its wall time."""

from collections.abc import Mapping, Sequence
import io
import logging
from typing import TYPE_CHECKING

import numpy as np

from trainer.reporting import curves as curves_lib
from trainer.reporting import recorded
from trainer.reporting.clock import format_seconds
from trainer.reporting.recorded import Recorded
from trainer.workdir import storage

if TYPE_CHECKING:
  from matplotlib.axes import Axes

# Legend, colour, steps and values.
Curve = tuple[str, str, np.ndarray, np.ndarray]

# It warns that it builds a cache of fonts, of which nobody needs to know.
logging.getLogger("matplotlib.font_manager").setLevel(logging.ERROR)

# They differ in lightness too, for readers who cannot tell them apart by hue.
_COLOURS = ("#2563c9", "#e8833a", "#0b6b50", "#9aa3af", "#8a63c7", "#cf3f4f", "#1c2430")
# Words and colour of each cause of wall time; the colour is right on light and on dark.
CAUSES = {
  "step": ("training steps", "#2563c9"),
  "eval": ("evaluation", "#12906f"),
  "compile": ("compilation", "#8a63c7"),
  "checkpoint": ("checkpoints", "#e0a021"),
  "input_wait": ("waiting for input", "#cf3f4f"),
  "restart": ("restarts", "#5f6b7c"),
  "other": ("other", "#9aa3af"),
}


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

  run = recorded.read(workdir)
  panels, final = _panels(run)[:6], run.final
  title = run.title
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


def _panels(run: Recorded) -> list[tuple[str, list[Curve]]]:
  """Return title and curves of each panel of which at least one curve was logged."""
  return [
    (
      panel["title"],
      [
        (
          curve["label"],
          _COLOURS[i % len(_COLOURS)],
          np.array(curve["x"]),
          np.array(curve["y"], np.float64),
        )
        for i, curve in enumerate(panel["curves"])
      ],
    )
    for panel in curves_lib.panels([run])
  ]


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
  if "oss" not in title:
    axes.set_ylim(bottom=0)  # so that noise looks as small as it is; a loss may stay far from 0
  axes.set_xlabel("step", fontsize=9, color="#5c6675")
  axes.xaxis.set_major_locator(ticker.MaxNLocator(6, integer=True))
  axes.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
  if any((np.abs(values) >= 10_000).any() for *_, values in curves):
    axes.yaxis.set_major_formatter(ticker.EngFormatter(sep=""))
  if len(curves) > 1:
    axes.legend(fontsize=9, frameon=False, labelcolor="#1c2430")


def causes_of(wall_seconds: Mapping[str, float]) -> dict[str, float]:
  """Return the seconds of each cause, the longest first; a total is no cause."""
  causes = {name: seconds for name, seconds in wall_seconds.items() if name != "total"}
  return dict(sorted(causes.items(), key=lambda item: -item[1]))


def _draw_time(axes: "Axes", wall_seconds: Mapping[str, float]) -> None:
  """Draw the bar of the wall time on the axes of matplotlib; causes below a pixel get no words."""
  causes, left = causes_of(wall_seconds), 0.0
  total = sum(causes.values())
  for cause, seconds in causes.items():
    label, colour = CAUSES.get(cause, (cause, "#9aa3af"))
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
