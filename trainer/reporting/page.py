"""The HTML of a report: one file that needs neither a server nor a network."""

from collections.abc import Iterable, Mapping, Sequence
import json
import pathlib
import time
from typing import Any

import ml_collections
import numpy as np

from configs import base
from trainer import config as config_lib
from trainer.reporting import curves, page_parts
from trainer.reporting.clock import format_seconds
from trainer.reporting.page_parts import escaped, table
from trainer.reporting.picture import CAUSES, causes_of
from trainer.reporting.recorded import Recorded

_HERE = pathlib.Path(__file__).parent
_RUNS_IN_FULL = 8  # of more, a page shows the table and the curves


def html_of(runs: Sequence[Recorded]) -> str:
  """Return the page of one run, or of several side by side."""
  if len(runs) == 1:
    (run,) = runs
    title = f"{run.title}: {run.name}"
    sections = [_headline(run), _curves(runs), *_details(run)]
  else:
    title = f"{len(runs)} runs"
    sections = [_comparison(runs), _curves(runs), _config_differences(runs)]
    for run in runs[:_RUNS_IN_FULL]:
      inside = "\n".join(filter(None, _details(run)))
      sections.append(f"<details><summary>{escaped(run.name)}</summary>\n{inside}\n</details>")
  style, script = ((_HERE / f"report.{kind}").read_text() for kind in ("css", "js"))
  made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime())
  return (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f"<title>{escaped(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<main>\n"
    + "\n".join(filter(None, sections))
    + f'\n<p class="muted">Written on {made}.</p>\n</main>\n<div id="tip" hidden></div>\n'
    + f"<script>\n{script}</script>\n</body>\n</html>\n"
  )


def _details(run: Recorded) -> list[str]:
  parts = [
    page_parts.classes(run),
    page_parts.images(run),
    _time(run),
    _starts(run),
    _data(run),
    _environment(run),
  ]
  return [*parts, _config_changes(run.config) if run.config is not None else ""]


def _headline(run: Recorded) -> str:
  """Return title and result, or how far the run is."""
  cards = _result_cards(run.final) if run.final is not None else _cards_so_far(run)
  return (
    f"<h1>{escaped(run.title)}</h1>\n"
    f'<div class="muted">{escaped(run.name)}{_dates(run)}</div>\n{_state_note(run)}'
    '<div class="cards">\n'
    + "\n".join(
      f"<div{' class=main' if i == 0 else ''}><b>{escaped(value)}</b>"
      f'<span class="muted">{escaped(label)}</span></div>'
      for i, (value, label) in enumerate(cards)
    )
    + "\n</div>"
  )


def _dates(run: Recorded) -> str:
  first = (run.starts or {}).get("first_start")
  ends = [times[-1] for _, _, times in run.scalars.values()]
  if first is None or not ends:
    return ""
  return f", {page_parts.date(first)} to {page_parts.date(max(ends))}"


def _state_note(run: Recorded) -> str:
  if run.final is not None:
    return ""
  words = {
    "failed": f"This run failed: {run.failure}",
    "running": "This run is under way.",
    "stopped": "No process works on this run now; the same command resumes it.",
  }[run.state]
  return (
    f'<p class="note">This run is not finished: there is no final result, and the last logged '
    f"step is {run.last_step:,}. {escaped(words)}</p>"
  )


def _result_cards(final: Mapping[str, Any]) -> list[tuple[str, str]]:
  best = final["best"]
  best = (
    f"top-1; best {best['top1']:.2%} at step {best['step']:,}"
    if best and best["step"] != final["step"]
    else "top-1, the best of the run"
  )
  return [
    (f"{final['top1']:.2%}", best),
    (f"{final['top5']:.2%}", "top-5"),
    (f"{final['loss']:.3f}", f"loss on {final['examples']:,} examples"),
    *_further_results(final),
    (f"{final['epochs']:.1f}", f"epochs, {final['step']:,} steps"),
    (format_seconds(sum(causes_of(final["wall_seconds"]).values())), "wall time"),
    (f"{final['images_per_second']:,.0f}", "images per second"),
    (_millions(final["params"]), "parameters"),
    (str(final["devices"]), "devices"),
  ]


def _further_results(final: Mapping[str, Any]) -> list[tuple[str, str]]:
  """Return the accuracies of raw weights and of all splits but the first, each with its words."""
  cards = []
  if "raw_top1" in final:
    cards.append((f"{final['raw_top1']:.2%}", "top-1 of weights that are not averaged"))
  if "real_top1" in final:
    cards.append((f"{final['real_top1']:.2%}", "of ReaL labels"))
  for name, result in final.get("splits", {}).items():
    cards.append((f"{result['top1']:.2%}", f"top-1 on {name}, {result['examples']:,} examples"))
  return cards


def _cards_so_far(run: Recorded) -> list[tuple[str, str]]:
  cards, scalars = [], run.scalars
  if "eval/top1" in scalars:
    steps, values, _ = scalars["eval/top1"]
    cards.append((f"{values[-1]:.2%}", f"top-1 at step {steps[-1]:,}, its last evaluation"))
    best = int(np.argmax(values))
    cards.append((f"{values[best]:.2%}", f"best top-1, at step {steps[best]:,}"))
  cards.append((f"{run.last_step:,}", "steps so far"))
  for name, form, words in (
    ("train/loss", ".3f", "training loss"),
    ("train/images_per_second", ",.0f", "images per second"),
    ("train/goodput", ".1%", "goodput"),
  ):
    if name in scalars:
      cards.append((format(scalars[name][1][-1], form), words))
  return cards


def _comparison(runs: Sequence[Recorded]) -> str:
  """Return the results of several runs as a table."""
  rows = [_compared(run) for run in runs]
  head = ("run", "model", "state", "top-1", "best", "steps", "epochs", "wall time", "img/s")
  return (
    f"<h1>{len(runs)} runs</h1>\n<h2>Results</h2>\n"
    f'<div class="box scroll">{table((*head, "goodput"), rows)}</div>'
  )


def _compared(run: Recorded) -> tuple[str, ...]:
  """Return the row of a run; cells of what is not known are empty."""
  final = run.final
  top1 = run.scalars["eval/top1"][1].tolist() if "eval/top1" in run.scalars else []
  so_far = {name: values[-1] for name, (_, values, _) in run.scalars.items()}
  best = f"{max(top1):.2%}" if top1 else ""
  first = (run.name, run.title, run.state)
  if final is not None:
    seconds = sum(causes_of(final["wall_seconds"]).values())
    return (
      *first,
      f"{final['top1']:.2%}",
      best,
      f"{final['step']:,}",
      f"{final['epochs']:.1f}",
      format_seconds(seconds),
      f"{final['images_per_second']:,.0f}",
      f"{final['goodput']['share']:.1%}",
    )
  speed, share = so_far.get("train/images_per_second"), so_far.get("train/goodput")
  epochs = run.epochs_per_step
  return (
    *first,
    f"{top1[-1]:.2%}" if top1 else "",
    best,
    f"{run.last_step:,}",
    f"{run.last_step * epochs:.1f}" if epochs else "",
    "",
    f"{speed:,.0f}" if speed is not None else "",
    f"{share:.1%}" if share is not None else "",
  )


def _curves(runs: Sequence[Recorded]) -> str:
  """Return the curves as numbers, with a place for each panel; report.js draws them."""
  panels = curves.panels(runs)
  if not panels:
    return ""
  figures = []
  for number, panel in enumerate(panels):
    last = ", ".join(
      f"{curve['label'] or 'last value'} {curve['y'][-1]}" for curve in panel["curves"][:8]
    )
    figures.append(
      f'<figure data-panel="{number}"><figcaption><span>{escaped(panel["title"])}</span>'
      f'<span class="muted">{escaped(panel["note"])}</span>'
      '<button type="button" class="log" aria-pressed="false">log</button></figcaption>'
      f'<div class="plot muted">{escaped(last)}</div><div class="keys"></div></figure>'
    )
  facts = [{"name": run.name, "epochs": run.epochs_per_step} for run in runs]
  numbers = json.dumps({"runs": facts, "panels": panels}, separators=(",", ":"))
  numbers = numbers.replace("<", r"\u003c")  # which could end the element
  return (
    '<h2>Curves</h2>\n<div class="tools"><label>over <select id="axis">'
    '<option value="steps">steps</option><option value="epochs">epochs</option>'
    '<option value="time">time since the first start</option></select></label>\n'
    '<label>smoothing <input id="smooth" type="range" min="0" max="0.98" step="0.02" value="0">'
    '</label>\n<button type="button" id="theme">dark or light</button></div>\n'
    f'<div class="panels">\n{chr(10).join(figures)}\n</div>\n'
    f'<script type="application/json" id="curves">{numbers}</script>'
  )


def _time(run: Recorded) -> str:
  """Return a bar of the wall time by cause, and the share of it that went into steps that count."""
  if run.final is None:
    return ""
  causes, goodput = causes_of(run.final["wall_seconds"]), run.final["goodput"]
  total = sum(causes.values())
  bar, legend = [], []
  for cause, seconds in causes.items():
    label, colour = CAUSES.get(cause, (cause, "#9aa3af"))
    share = seconds / total
    bar.append(f'<div style="flex: {share:.6f} 0 0; background: {colour}"></div>')
    legend.append(
      f'<span><i style="background: {colour}"></i>{escaped(label)} '
      f'<span class="muted">{format_seconds(seconds)}, {share:.1%}</span></span>'
    )
  starts = "one start" if goodput["starts"] == 1 else f"{goodput['starts']} starts"
  return (
    f"<h2>Wall time by cause: goodput {goodput['share']:.1%}, {starts}</h2>\n"
    f'<div class="box"><div class="bar">{"".join(bar)}</div>\n'
    f'<div class="legend">{"".join(legend)}</div></div>'
  )


def _starts(run: Recorded) -> str:
  """Return each start of a run that had several, or failed."""
  if len(run.history) < 2 and not any("failure" in start for start in run.history):
    return ""
  rows = [
    (
      str(number),
      page_parts.date(start["time"]),
      f"{start['step']:,}",
      config_lib.in_words(start["changes"]) if "changes" in start else "",
      start.get("failure", {}).get("reason", ""),
    )
    for number, start in enumerate(run.history, 1)
  ]
  head = ("start", "date", "at step", "changed fields", "failed")
  return f'<h2>Starts</h2>\n<div class="box scroll">{table(head, rows)}</div>'


def _data(run: Recorded) -> str:
  if run.data is None:
    return ""
  rows = [("path", str(run.data.get("path", "")))]
  splits = [("train", run.data.get("train")), *(run.data.get("eval") or {}).items()]
  for name, facts in splits:
    if facts:
      revision = f", revision {facts['revision']}" if facts.get("revision") else ""
      rows.append((name, f"{facts['examples']:,} examples{revision}"))
  if names := run.data.get("classes"):
    some = ", ".join(run.in_words(str(name)) for name in names[:10])
    rows.append((f"{len(names):,} classes", some + (", ..." if len(names) > 10 else "")))
  for reason, paths in (run.data.get("left_out") or {}).items():
    rows.append(("left out", f"{len(paths):,} files: {reason}"))
  return f'<h2>Data</h2>\n<div class="box scroll">{table((), rows)}</div>'


def _environment(run: Recorded) -> str:
  if run.environment is None:
    return ""
  facts = dict(run.environment)
  rows = [("started", page_parts.date(facts.pop("time")))]
  for name, value in facts.items():
    if isinstance(value, Mapping):
      value = ", ".join(f"{key} {version}" for key, version in value.items())
    rows.append((name.replace("_", " "), str(value)))
  return f'<h2>Newest start</h2>\n<div class="box scroll">{table((), rows)}</div>'


def _config_changes(config: Mapping[str, Any]) -> str:
  """Return the fields in which the config differs from configs/base.py."""
  ours = config_lib.flatten(ml_collections.ConfigDict(config))
  try:
    defaults = config_lib.flatten(base.get_config(config["model"]["name"]))
  except ValueError:  # a family from elsewhere that is not on this machine
    defaults = config_lib.flatten(base.get_config())
  rows = "".join(
    f"<tr><td>{escaped(field)}</td><td>{escaped(_value(ours, field))}</td>"
    f'<td class="muted">{escaped(_value(defaults, field))}</td></tr>\n'
    for field in _differing([defaults, ours])
  )
  if not rows:
    return "<h2>Config</h2>\n<p>Nothing differs from configs/base.py.</p>"
  return (
    '<h2>Config: what differs from configs/base.py</h2>\n<div class="box scroll"><table>\n'
    f"<tr><th>field</th><th>this run</th><th>base</th></tr>\n{rows}</table></div>"
  )


def _config_differences(runs: Sequence[Recorded]) -> str:
  """Return the fields in which several runs differ from each other."""
  known = [run for run in runs if run.config is not None]
  flat = [config_lib.flatten(ml_collections.ConfigDict(run.config)) for run in known]
  rows = [(field, *(_value(one, field) for one in flat)) for field in _differing(flat)]
  if not rows:
    return "<h2>Config</h2>\n<p>The runs have the same config.</p>" if known else ""
  return (
    "<h2>Config: what differs between the runs</h2>\n"
    f'<div class="box scroll">{table(("field", *(run.name for run in known)), rows)}</div>'
  )


def _differing(flat: Sequence[Mapping[str, Any]]) -> Iterable[str]:
  for field in sorted({field for one in flat for field in one}):
    if any(field not in one or one[field] != flat[0].get(field) for one in flat):
      yield field


def _value(flat: Mapping[str, Any], field: str) -> str:
  return json.dumps(flat[field]) if field in flat else "absent"


def _millions(number: int) -> str:
  return f"{number / 1e6:.1f} M" if number >= 1e6 else f"{number:,}"
