"""The report of finished, unfinished and empty workdirs; no network, nothing but one file."""

import base64
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

import numpy as np
from PIL import Image
import pytest

from configs import base
from trainer.reporting import classes, curves, events, report

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


def curves_of(page):
  """Return the numbers that report.js draws."""
  return json.loads(re.search(r'id="curves">(.*?)</script>', page, re.DOTALL)[1])


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
  drawn = curves_of(page)
  titles = [panel["title"] for panel in drawn["panels"]]
  # Ten with a loss panel for each definition: the base config smooths labels.
  assert len(titles) == len(curves.PANELS) + 1 and page.count("<figure data-panel=") == 11
  assert drawn["panels"][0]["note"] == "with label smoothing 0.1"
  scalars = events.read_scalars(workdir / "events")
  by_name = {
    ("Training loss", "train"): ("train/loss", 1),
    ("Evaluation loss", "eval"): ("eval/loss", 1),
    ("Accuracy, %", "eval top-5"): ("eval/top5", 100),
  }
  for panel in drawn["panels"]:
    for curve in panel["curves"]:
      if found := by_name.pop((panel["title"], curve["label"]), None):
        steps, values, _ = scalars[found[0]]
        assert curve["x"] == steps.tolist()
        np.testing.assert_allclose(curve["y"], found[1] * values, rtol=1e-4)
  assert not by_name and drawn["runs"][0]["epochs"] == pytest.approx(90 / 10_000)
  assert sorted(p.name for p in workdir.iterdir()) == [
    "config.json",
    "events",
    "final.json",
    "report.html",
  ]


def test_page_needs_nothing_from_outside(workdir):
  page = page_of(workdir)
  assert not re.search(r"https?://|<link|<script[^>]* src|url\(|import |fetch\(", page)
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
  assert [panel["title"] for panel in curves_of(page)["panels"]] == ["Loss", "Gradient norm"]
  assert curves_of(page)["panels"][1]["curves"][0]["y"] == [None]


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


def test_words_that_are_no_run_are_refused_before_anything_is_written(workdir, tmp_path, capsys):
  (tmp_path / "file").write_text("x")
  for words, says in (
    ([f"{tmp_path}/none"], "There is no folder"),
    ([f"{tmp_path}/file"], "is a file; give the folder of a run"),
    ([str(workdir), f"--out={tmp_path}/no/x.html"], "no/x.html cannot be written: there is no"),
    ([str(workdir), f"--picture={tmp_path}/no/x.png"], "no/x.png cannot be written: there is no"),
  ):
    assert report.main(words) == 2
    said = capsys.readouterr()
    assert says in said.err and not said.out and said.err.count("\n") == 1


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


def write_json(path, value):
  path.write_text(json.dumps(value))


def test_losses_of_one_definition_share_an_axis(workdir):
  config = base.get_config()
  config.label_smoothing = 0.0
  write_json(workdir / "config.json", config.to_dict())
  panel = curves_of(page_of(workdir))["panels"][0]
  assert panel["title"] == "Loss" and [c["label"] for c in panel["curves"]] == ["train", "eval"]


@pytest.mark.parametrize("failure", ["ended", "history"])
def test_a_failed_run_has_its_reason_with_and_without_curves(tmp_path, failure):
  reason = "Step 7 is not finite (loss nan). <Lower> the learning rate."
  if failure == "ended":
    write_json(tmp_path / "ended.json", {"reason": reason, "code": 2, "time": 0})
  starts = [{"step": 0, "time": 0.0, "failure": {"step": 7, "reason": reason}}]
  write_json(tmp_path / "starts.json", {"starts": 1, "first_start": 0.0, "history": starts})
  assert "This run failed: Step 7 is not finite (loss nan). &lt;Lower&gt;" in page_of(tmp_path)
  writer = events.EventWriter(str(tmp_path / "events"))
  writer.write_scalars(6, {"train/loss": 7.0})
  writer.close()
  page = page_of(tmp_path)
  assert "last logged step is 6" in page and "<h2>Starts</h2>" in page


def test_the_command_that_adds_the_mistakes_is_named(workdir):
  command = "r50 &lt;pod&gt;&#x27; --mistakes=1000</code> adds them"
  assert command in page_of(workdir)
  write_json(workdir / "mistakes.json", {"note": "Of 9 images.", "images": []})
  assert "adds them" not in page_of(workdir)


def test_a_run_under_way(workdir):
  (workdir / "final.json").unlink()
  write_json(workdir / "owner.json", {"renewed": time.time()})
  page = page_of(workdir)
  assert "This run is under way" in page and "adds them" not in page
  write_json(workdir / "owner.json", {"renewed": time.time() - 3600})
  assert "No process works on this run now" in page_of(workdir)


def test_classes_images_data_and_environment(workdir):
  pixel = base64.b64encode(b"no JPEG").decode()
  words = {"n01": "tench <fish>"}
  write_json(workdir / "classes.json", {"classes": ["n01", "n02"], "words": words})
  table = classes.table(np.array([[3, 1], [2, 2]]), ["n01", "n02"])
  write_json(workdir / "eval_classes.json", {"step": 9, "splits": {"val": table}})
  write_json(workdir / "samples.json", {"images": [{"jpeg": pixel, "class": "n01"}]})
  mistake = {"jpeg": pixel, "class": "n02", "predicted": "n01", "probability": 0.987}
  write_json(workdir / "mistakes.json", {"note": "Of 100 images.", "images": [mistake] * 3})
  facts = {"examples": 5_000, "revision": "", "class_counts": None, "digest": ""}
  data = {"path": "d", "classes": ["n01", "n02"], "train": facts, "eval": {"val": facts}}
  write_json(workdir / "data.json", data | {"left_out": {"empty": ["a", "b"]}})
  environment = {"time": 0.0, "hosts": 4, "versions": {"jax": "0.10.2"}, "commit": "abc, changed"}
  write_json(workdir / "environment.json", environment)
  page = page_of(workdir)
  for expected in (
    "Classes of val at step 9: mean top-1 62.50%",
    "<td>n02</td><td>tench &lt;fish&gt; (n01)</td><td>2</td><td>50.0%</td>",
    "99% tench &lt;fish&gt; (n01), but it is n02",
    "Training images as the model sees them",
    "<td>train</td><td>5,000 examples</td>",
    "2 files: empty",
    "jax 0.10.2",
    "abc, changed",
    "1970-01-01 00:00 UTC",
  ):
    assert expected in page, expected
  worst, best = "<td>n02</td><td>50.0%", "<td>tench &lt;fish&gt; (n01)</td><td>75.0%"
  assert page.index(worst) < page.index(best)


def test_images_keep_the_page_below_two_megabytes(workdir):
  image = {"jpeg": "A" * 100_000, "class": "n01"}
  write_json(workdir / "samples.json", {"images": [image] * 16})
  write_json(workdir / "mistakes.json", {"images": [image] * 24})
  page = page_of(workdir)
  assert page.count("<img") == 14 and len(page) < 2_000_000
  write_json(workdir / "mistakes.json", {"note": "Of 9 images.", "images": []})
  assert "Of 9 images.</p>" in page_of(workdir)


def test_many_points_are_thinned_to_the_lowest_and_highest():
  values = np.sin(np.arange(100_000.0))
  values[51_234], values[77_777] = 50.0, -50.0
  kept = curves._thinned(values, 1000)
  assert len(kept) <= 1000 and {0, 51_234, 77_777, 99_999} <= set(kept)
  assert (np.diff(kept) > 0).all()


def test_three_runs_side_by_side(workdir, tmp_path, capsys):
  """As `runs/*` names them: with a folder of something else, and an earlier report of all."""
  runs = tmp_path / "runs"
  for name, rate in (("a", 0.1), ("b", 0.2), ("c", 0.3)):
    shutil.copytree(workdir, runs / name)
    config = json.loads((workdir / "config.json").read_text())
    config["optimizer"]["lr_per_256"] = rate
    write_json(runs / name / "config.json", config)
  (runs / "c" / "final.json").unlink()
  (runs / "other").mkdir()
  (runs / "report.html").write_text("of before")
  assert report.main([*map(str, sorted(runs.iterdir()))]) == 0
  told = capsys.readouterr()
  assert told.out.strip() == str(runs / "report.html") and "Left out: " in told.err
  page = (runs / "report.html").read_text()
  assert "<h1>3 runs</h1>" in page and page.count("<details>") == 3 and len(page) < 2_000_000
  assert "<td>optimizer.lr_per_256</td><td>0.1</td><td>0.2</td><td>0.3</td>" in page
  assert "<td>c</td><td>ResNet-50</td><td>stopped</td><td>75.59%</td>" in page
  drawn = curves_of(page)
  assert [run["name"] for run in drawn["runs"]] == ["a", "b", "c"]
  assert [curve["run"] for curve in drawn["panels"][0]["curves"]] == [0, 1, 2]
  assert report.main([str(runs / "a"), str(runs / "b"), f"--out={tmp_path}/two.html"]) == 0
  assert "<h1>2 runs</h1>" in (tmp_path / "two.html").read_text()
  assert report.main([str(runs / "a"), str(runs / "b"), "--mistakes=4"]) == 2


NODE = """
const elements = {}, figures = [];
function element(html) {
  return {dataset: {}, clientWidth: 500, innerHTML: "", style: {}, attributes: {}, parts: {},
    addEventListener(kind, f) { this[kind] = f; }, setAttribute(k, v) { this.attributes[k] = v; },
    querySelector(what) { return this.parts[what] ??= element(); }, offsetWidth: 100,
    getBoundingClientRect: () => ({left: 0, top: 0, width: 476})};
}
globalThis.document = {
  documentElement: element(),
  getElementById: id => elements[id] ??= element(),
  querySelectorAll: () => figures,
  querySelector: () => element(),
};
globalThis.addEventListener = () => {};
document.getElementById("curves").textContent = CURVES;
JSON.parse(CURVES).panels.forEach((_, i) => {
  figures.push(Object.assign(element(), {dataset: {panel: String(i)}}));
});
const drawn = () => figures.map(f => f.parts[".plot"].innerHTML);
const all = [];
SCRIPT
all.push(drawn());
for (const value of ["epochs", "time"]) {
  elements.axis.change({target: {value}});
  all.push(drawn());
}
elements.smooth.input({target: {value: "0.9"}}); all.push(drawn());
figures[0].parts[".log"].click({target: element()}); all.push(drawn());
figures[0].parts[".plot"].pointermove({clientX: 300, clientY: 10});
const told = elements.tip.innerHTML;
figures[0].parts[".keys"].click({target: {closest: () => ({dataset: {key: "0 train"}})}});
all.push(drawn());
console.log(JSON.stringify({all, tip: told}));
"""


@pytest.mark.skipif(not shutil.which("node"), reason="node is not installed")
def test_the_script_draws_every_panel_on_every_axis(workdir):
  page = page_of(workdir)
  script = re.search(r"<script>\n(.*)</script>", page, re.DOTALL)[1]
  numbers = re.search(r'id="curves">(.*?)</script>', page, re.DOTALL)[1]
  program = NODE.replace("SCRIPT", script).replace("CURVES", json.dumps(numbers))
  ended = subprocess.run(["node", "-"], input=program, capture_output=True, text=True, check=False)
  assert ended.returncode == 0, ended.stderr
  said = json.loads(ended.stdout)
  steps, epochs, seconds, smooth, log, hidden = said["all"]
  for drawn in said["all"]:
    assert len(drawn) == 11 and all("<svg" in svg for svg in drawn)
    assert not any("NaN" in svg or "undefined" in svg or "Infinity" in svg for svg in drawn)
  assert all('class="curve"' in svg for svg in steps)
  # Other marks on the axis, faint raw curves, other heights, no curve.
  assert ">10k<" in steps[0] and ">80<" in epochs[0] and steps != seconds
  assert "faint" in smooth[0] and "faint" not in steps[0]
  assert log[0] != smooth[0] and log[1:] == smooth[1:]
  assert 'class="curve"' not in hidden[0]
  assert "step " in said["tip"] and "epoch " in said["tip"] and "train <b>" in said["tip"]


@pytest.mark.slow
@pytest.mark.skipif("CHROMIUM" not in os.environ, reason="CHROMIUM names no Chromium")
def test_in_headless_chromium(workdir, tmp_path):
  """With node and `npm install puppeteer-core` on NODE_PATH; ARTEFACTS keeps the pictures."""
  folder = os.environ.get("ARTEFACTS", tmp_path)
  page = report.write_report(str(workdir))
  script = pathlib.Path(__file__).with_name("chromium.cjs")
  ended = subprocess.run(
    ["node", script, page, folder], capture_output=True, text=True, timeout=300, check=False
  )
  assert ended.returncode == 0, ended.stderr
  seen = json.loads(ended.stdout)
  assert seen["said"] == []  # no error, no request
  for name in ("light", "dark", "phone"):
    assert seen[name]["overflow"] == 0 and seen[name]["drawn"] >= 11
  assert seen["light"]["back"] != seen["dark"]["back"]
  assert re.match(r"step [\d,]+, epoch [\d.]+, .*\ntrain [\d.]+", seen["tip"])
