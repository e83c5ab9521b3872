"""The report of finished, unfinished and empty workdirs; no network, nothing but one file."""

import base64
import io
import json
import pathlib
import re
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from configs import base
from trainer.reporting import events, report

FINAL = {
  "step": 10_000,
  "epochs": 90.0,
  "top1": 0.76512,
  "top5": 0.93104,
  "loss": 1.2345,
  "examples": 50_000,
  "params": 25_557_032,
  "images_per_second": 31_234.5,
  "devices": "32 x TPU v4",
  "best": {"step": 9_000, "top1": 0.76599},
  "bad_records": 0,
  "wall_seconds": {
    "compile": 95.0,
    "input_wait": 40.0,
    "step": 3700.0,
    "eval": 120.0,
    "checkpoint": 15.0,
    "other": 20.0,
    "restart": 10.0,
    "total": 4000.0,
  },
  "goodput": {"share": 0.925, "starts": 2},
}


def write_events(workdir):
  rng = np.random.default_rng(0)
  writer = events.EventWriter(str(workdir / "events"))
  for step in range(100, 10_001, 100):
    t = step / 10_000
    writer.write_scalars(
      step,
      {
        "train/loss": 6.9 * np.exp(-3 * t) + 1.6 + 0.05 * rng.normal(),
        "train/top1": 0.78 * (1 - np.exp(-4 * t)) + 0.01 * rng.normal(),
        "train/learning_rate": 0.4 * min(1, t / 0.06) * 0.5 * (1 + np.cos(np.pi * t)),
        "train/grad_norm": 1 + 0.3 * rng.random(),
        "train/images_per_second": 31_000 + 300 * rng.normal(),
        "train/mfu": 0.35,
        "train/step_seconds_median": 0.131,
        "train/step_seconds_p99": 0.15,
        "train/goodput": 0.9 * t,
        "train/image_size": 160 if t < 0.5 else 224,
        "train/input_wait": 0.01 * rng.random(),
        "steps_per_sec": 30.0,
      },
    )
    if step % 1000 == 0:
      writer.write_scalars(
        step,
        {
          "eval/loss": 5.0 * np.exp(-3 * t) + 1.1,
          "eval/top1": 0.77 * (1 - np.exp(-4 * t)),
          "eval/top5": 0.93 * (1 - np.exp(-6 * t)),
          "eval/examples": 50_000,
        },
      )
  writer.close()


@pytest.fixture
def workdir(tmp_path):
  """A finished run."""
  workdir = tmp_path / "r50 <pod>"
  workdir.mkdir()
  config = base.get_config()
  config.global_batch_size = 4096
  config.data.path = "gs://bucket/<imagenet>"
  (workdir / "config.json").write_text(json.dumps(config.to_dict()))
  (workdir / "final.json").write_text(json.dumps(FINAL))
  write_events(workdir)
  return workdir


def page_of(workdir):
  """Write the report of a run, and return it."""
  return pathlib.Path(report.write_report(str(workdir))).read_text()


def pictures(page):
  return [
    Image.open(io.BytesIO(base64.b64decode(data)))
    for data in re.findall(r'src="data:image/png;base64,([^"]+)"', page)
  ]


def test_finished_run(workdir):
  path = report.write_report(str(workdir))
  assert path == str(workdir / "report.html")
  page = (workdir / "report.html").read_text()
  text = re.sub(r"<[^>]*>", " ", re.sub(r"base64,[^\"]*", "", page))
  for expected in (
    "ResNet-50",
    "r50 &lt;pod&gt;",
    "76.51%",
    "best 76.60% at step 9,000",
    "93.10%",
    "50,000",
    "1 h 6 min",
    "31,234",
    "25.6 M",
    "32 x TPU v4",
    "90.0",
  ):
    assert expected in text, expected
  assert "not finished" not in text
  images = pictures(page)
  assert len(images) == len(report._PANELS) == 10
  assert all(image.format == "PNG" and image.width > 600 for image in images)
  assert sorted(p.name for p in workdir.iterdir()) == [
    "config.json",
    "events",
    "final.json",
    "report.html",
  ]


def test_page_needs_nothing_from_outside(workdir):
  page = page_of(workdir)
  assert not re.search(r"https?://|<link|<script|url\(", page)
  assert len(page) < 1_000_000


def test_time_is_split_by_cause_without_the_total(workdir):
  page = page_of(workdir)
  shares = [float(share) for share in re.findall(r"flex: ([0-9.]+) 0 0", page)]
  assert len(shares) == 7 and sum(shares) == pytest.approx(1, abs=1e-4)
  assert shares[0] == pytest.approx(3700 / 4000)
  assert "training steps" in page and "goodput 92.5%, 2 starts" in page and "restarts" in page


def test_only_changed_fields_of_the_config_are_listed(workdir):
  page = page_of(workdir)
  rows = re.findall(r"<tr><td>(.*?)</td><td>(.*?)</td><td class=\"muted\">(.*?)</td></tr>", page)
  assert rows == [
    ("data.path", "&quot;gs://bucket/&lt;imagenet&gt;&quot;", "&quot;&quot;"),
    ("global_batch_size", "4096", "1024"),
  ]


def test_config_equal_to_the_base_and_fields_of_another_version(workdir):
  config = base.get_config().to_dict()
  (workdir / "config.json").write_text(json.dumps(config))
  assert "Nothing differs from" in page_of(workdir)
  del config["seed"]
  config["model"]["gone"] = 3
  (workdir / "config.json").write_text(json.dumps(config))
  page = page_of(workdir)
  assert "<td>seed</td><td>absent</td>" in page and "<td>model.gone</td><td>3</td>" in page


def test_unfinished_run_says_so(workdir):
  (workdir / "final.json").unlink()
  page = page_of(workdir)
  assert "This run is not finished" in page and "last logged step is 10,000" in page
  assert "75.59%" in page  # of the last evaluation
  assert re.search(r"<b>90.0%</b>.*goodput", page)
  assert "Wall time by cause" not in page


def test_run_that_was_never_evaluated(tmp_path):
  writer = events.EventWriter(str(tmp_path / "events"))
  writer.write_scalars(1, {"train/loss": 7.0, "train/grad_norm": float("nan")})
  writer.close()
  page = page_of(tmp_path)
  assert "Training run" in page and "7.000" in page
  assert len(pictures(page)) == 2


def test_best_may_be_absent_or_the_last(workdir):
  for best in (None, {"step": 10_000, "top1": 0.76512}):
    (workdir / "final.json").write_text(json.dumps(FINAL | {"best": best}))
    assert "top-1, the best of the run" in page_of(workdir)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: (path / "events").mkdir()])
def test_nothing_to_report(tmp_path, make):
  make(tmp_path)
  with pytest.raises(ValueError, match="has nothing to report"):
    report.write_report(str(tmp_path))
  assert not (tmp_path / "report.html").exists()


def test_command(workdir, tmp_path):
  def run(folder):
    return subprocess.run(
      [sys.executable, "-m", "trainer.report", folder],
      capture_output=True,
      text=True,
      timeout=120,
      check=False,
    )

  done, empty = run(workdir), run(tmp_path)
  assert (done.returncode, done.stdout.strip()) == (0, str(workdir / "report.html")), done.stderr
  assert empty.returncode == 2
  assert empty.stderr.strip().count("\n") == 0 and "has nothing to report" in empty.stderr


def test_picture_of_a_finished_an_unfinished_and_a_short_run(workdir, tmp_path, capsys):
  def picture_of(folder):
    path = tmp_path / "picture.png"
    assert report.main([str(folder), f"--picture={path}"]) == 0
    assert path.stat().st_size < 60_000
    image = Image.open(path)
    assert image.format == "PNG" and image.width > 900
    return np.asarray(image.convert("RGB"))

  finished = picture_of(workdir)
  (workdir / "final.json").unlink()
  unfinished = picture_of(workdir)
  assert finished.shape == unfinished.shape and (finished != unfinished).any()
  short = tmp_path / "short"
  writer = events.EventWriter(str(short / "events"))
  writer.write_scalars(1, {"train/loss": 7.0})
  writer.close()
  picture_of(short)
  capsys.readouterr()
  assert report.main([str(short), f"--picture={tmp_path}/absent/picture.png"]) == 2
  assert "absent" in capsys.readouterr().err
