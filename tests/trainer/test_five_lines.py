"""From a folder of one's own images to the report, by the five lines of README.md."""

import os
import pathlib
import re
import subprocess
import sys
import time

import numpy as np
import pytest
import simplejpeg

ROOT = pathlib.Path(__file__).parents[2]
RECORDING = pathlib.Path(__file__).parent / "recordings" / "five_lines.txt"
COLOURS = {"blue": (40, 60, 200), "green": (40, 180, 60), "red": (200, 40, 40)}


def lines_of_readme():
  """The five lines, without their comments; the first installs, which the tests have done."""
  text = (ROOT / "README.md").read_text()
  block = re.search(r"images of your own[\s\S]*?\n\n((?:    .*\n)+)", text)[1]
  return [line.split("  #")[0].strip() for line in block.splitlines()]


def write_photos(folder):
  """Three classes of 20 images of one colour each, with noise."""
  rng = np.random.default_rng(0)
  for name, colour in COLOURS.items():
    (folder / name).mkdir(parents=True)
    for i in range(20):
      noise = rng.integers(-30, 30, (120, 160, 3))
      pixels = np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)
      (folder / name / f"{i}.jpg").write_bytes(simplejpeg.encode_jpeg(pixels))


def test_there_are_five_and_the_first_installs():
  lines = lines_of_readme()
  assert len(lines) == 5 and lines[0] == "pip install -e ."
  assert all(line.startswith("python -m ") for line in lines[1:])


@pytest.mark.slow
def test_the_five_lines(tmp_path):
  """As typed, but for --trial, by which the net and the run fit a CPU; RECORD=1 records them."""
  write_photos(tmp_path / "photos")
  environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "NO_COLOR": "1"}
  said, start = [], time.monotonic()
  for line in lines_of_readme()[1:]:
    typed = f"{line} --trial" if "-m trainer --config" in line else line
    command = re.sub(r"^python ", f"{sys.executable} ", typed)
    ended = subprocess.run(
      command,
      shell=True,
      cwd=tmp_path,
      env=environment,
      capture_output=True,
      text=True,
      check=False,
    )
    shown = (ended.stdout + ended.stderr).rstrip()
    assert ended.returncode == 0, f"{typed}\n{shown}"
    lines = shown.splitlines()
    if len(lines) > 30:
      lines = [*lines[:18], f"... {len(lines) - 28} lines", *lines[-10:]]
    shown = "\n".join(lines)
    said.append(f"$ {typed}\n{shown}\n[{time.monotonic() - start:.0f} s since the first line]\n")
  page = (tmp_path / "runs" / "photos" / "report.html").read_text()
  assert "data:image/jpeg;base64" in page and "<h2>Data</h2>" in page and len(page) < 2_000_000
  assert len((tmp_path / "photos.csv").read_text().splitlines()) == 61
  assert list(tmp_path.glob("**/contact_sheet.png"))
  if "RECORD" in os.environ:
    RECORDING.write_text("\n".join(said).replace(str(tmp_path), "."))
