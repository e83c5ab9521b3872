"""Parts of a report: tables, classes, images."""

from collections.abc import Sequence
import html
import shlex
import time
from typing import Any

from trainer.reporting.recorded import Recorded
from trainer.workdir import files

_PAIRS = 20  # most confused, that are shown
_MOST_IMAGES = 700_000  # letters of all images of a list in base64, so that a page stays below 2 MB


def escaped(text: str) -> str:
  """Return text as HTML shows it."""
  return html.escape(str(text))


def date(seconds: float) -> str:
  """Return seconds since 1970 as a date."""
  return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """Return a table; an empty `head` is none."""
  lines = ["".join(f"<th>{escaped(cell)}</th>" for cell in head)] if head else []
  lines += ["".join(f"<td>{escaped(cell)}</td>" for cell in row) for row in rows]
  return "<table>\n" + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table>"


def classes(run: Recorded) -> str:
  """Return the accuracy of each class and the most confused pairs, of each split."""
  sections = []
  for split, found in (run.eval_classes or {}).get("splits", {}).items():
    worst = sorted(found["classes"], key=lambda one: one["top1"])
    rows = [
      (run.in_words(one["class"]), f"{one['top1']:.1%}", f"{one['examples']:,}") for one in worst
    ]
    pairs = [
      (
        run.in_words(pair["class"]),
        run.in_words(pair["taken_for"]),
        f"{pair['examples']:,}",
        f"{pair['share']:.1%}",
      )
      for pair in found["confusions"][:_PAIRS]
    ]
    step = (run.eval_classes or {}).get("step", 0)
    sections.append(
      f"<h2>Classes of {escaped(split)} at step {step:,}: mean top-1 "
      f"{found['mean_class_top1']:.2%}</h2>\n"
      '<div class="two"><div class="box scroll tall">'
      f"{table(('class, the worst first', 'top-1', 'examples'), rows)}</div>\n"
      '<div class="box scroll tall">'
      f"{table(('class', 'taken for', 'images', 'of the class'), pairs)}</div></div>"
    )
  return "\n".join(sections)


def images(run: Recorded) -> str:
  """Return images as the model has had them, and the most confident mistakes."""
  sections = []
  for path, title in (
    (run.run.samples, "Training images as the model sees them, before they are normalised"),
    (run.run.mistakes, "The most confident mistakes"),
  ):
    found = files.read_json(path, {"images": list}) or {}
    shown, letters = [], 0
    for image in found.get("images", ()):
      letters += len(image["jpeg"])
      if letters > _MOST_IMAGES:
        break
      shown.append(_image(run, image))
    if shown or "note" in found:
      shown = shown or ["None."]
      note = f'<p class="muted">{escaped(found["note"])}</p>\n' if "note" in found else ""
      inside = "\n".join(shown)
      sections.append(f'<h2>{title}</h2>\n{note}<div class="images">\n{inside}\n</div>')
    elif path == run.run.mistakes and run.final is not None:
      command = f"python -m trainer.report {shlex.quote(str(run.run.path))} --mistakes=1000"
      sections.append(
        '<p class="muted">The most confident mistakes are not looked for by the run; '
        f"<code>{escaped(command)}</code> adds them.</p>"
      )
  return "\n".join(sections)


def _image(run: Recorded, image: dict[str, Any]) -> str:
  name = escaped(run.in_words(image["class"]))
  words = name
  if "predicted" in image:
    words = (
      f"{image['probability']:.0%} {escaped(run.in_words(image['predicted']))}, but it is {name}"
    )
  return f'<div><img alt="{words}" src="data:image/jpeg;base64,{image["jpeg"]}">{words}</div>'
