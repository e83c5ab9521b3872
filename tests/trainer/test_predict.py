"""python -m trainer.predict: classes, files, pictures, and what is no image."""

import csv
import json
import subprocess
import sys

import numpy as np
from PIL import Image
import pytest

from input_pipeline import image
from tests.trainer import tiny
from tests.trainer.shared import call
from trainer import predict, weights
from trainer.weights import export, run_folder
from trainer.weights import net as net_lib

NAMES = ["ant", "bee", "crane", "dhole", "emü", "fox"]


def main(*arguments):
  return call(predict.main, "trainer.predict", *arguments)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  """A workdir and the same as a file, with a folder of images of which two are none."""
  folder = tmp_path_factory.mktemp("predict")
  config = tiny.get_config()
  config.data.kind = "synthetic"
  net = net_lib.build(config)
  run_folder.write(str(folder / "run"), config, net, net_lib.random_leaves(net), tuple(NAMES))
  export.export(str(folder / "run"), "safetensors", str(folder / "file.safetensors"))
  (folder / "photos" / "in").mkdir(parents=True)
  (folder / "empty").mkdir()
  rng = np.random.default_rng(0)
  for i in range(35):  # more than a batch
    pixels = rng.integers(0, 256, (20 + i, 30, 3), np.uint8)
    Image.fromarray(pixels).save(folder / "photos" / ("in" if i % 2 else ".") / f"{i}.png")
  (folder / "photos" / "text.jpg").write_text("no image")
  Image.new("RGB", (1, 1)).save(folder / "photos" / "pixel.png")
  (folder / "photos" / "notes.txt").write_text("not looked at")
  return folder


def expected(folder, file):
  """Probabilities computed by the model itself, from pixels normalised by numpy."""
  model, about = weights.load(str(folder / "file.safetensors"))
  assert about.classes == tuple(NAMES)
  config = tiny.get_config()
  pixels = image.eval_view(file.read_bytes(), 16, 16).astype(np.float32)
  normal = (pixels - np.float32(config.data.mean)) / np.float32(config.data.std)
  logits = np.asarray(model(normal[None]), np.float64)[0]
  return np.exp(logits) / np.exp(logits).sum()


def test_json_of_a_folder_and_what_is_skipped(folder, capsys):
  code = main(folder / "run", folder / "photos", "--json", "--top=3")
  printed = capsys.readouterr()
  assert code == predict.SKIPPED
  assert "text.jpg is skipped: is no JPEG" in printed.err
  assert "pixel.png is skipped: has 1 x 1 pixels" in printed.err
  rows = {row["image"]: row for row in json.loads(printed.out)}
  assert len(rows) == 37 and sum("error" in row for row in rows.values()) == 2
  for name in ("34.png", "in/33.png"):
    shares = expected(folder, folder / "photos" / name)
    found = rows[str(folder / "photos" / name)]["top"]
    assert [entry["label"] for entry in found] == np.argsort(-shares)[:3].tolist()
    assert [entry["class"] for entry in found] == [NAMES[entry["label"]] for entry in found]
    np.testing.assert_allclose(
      [entry["probability"] for entry in found], np.sort(shares)[::-1][:3], atol=1e-5
    )


def test_csv_and_sheet(folder, tmp_path, capsys):
  code = main(
    *(folder / "file.safetensors", folder / "photos" / "in", "--top=9"),
    *(f"--csv={tmp_path / 'x.csv'}", f"--sheet={tmp_path / 'x.png'}"),
  )
  assert code == 0 and "17 images, 0 skipped" in capsys.readouterr().out
  with open(tmp_path / "x.csv", newline="") as file:
    rows = list(csv.DictReader(file))
  assert len(rows) == 17 and rows[0]["image"].endswith("in/1.png")  # as a person counts
  assert sum(float(rows[3][f"probability_{rank}"]) for rank in range(1, 7)) == pytest.approx(1)
  with Image.open(tmp_path / "x.png") as sheet:
    assert sheet.width > 8 * 112 and sheet.height > 3 * 112


def test_a_table_with_other_names_for_weights_of_another_tool(folder, tmp_path, capsys):
  names = tmp_path / "names.txt"
  names.write_text("\n".join("uvwxyz"))
  file = folder / "photos" / "0.png"
  code = main(
    *(folder / "file.safetensors", file, f"--config={tiny.__file__}", f"--classes={names}"),
    "--config.data.eval_resize=16",
  )
  lines = capsys.readouterr().out.splitlines()
  assert code == 0 and len(lines) == 5
  best = int(np.argmax(expected(folder, file)))
  assert lines[0].startswith(str(file)) and lines[0].endswith(f"{'uvwxyz'[best]} ({best})")


def test_logits_that_are_not_finite_are_no_prediction(tmp_path, capsys):
  config = tiny.get_config()
  config.data.kind = "synthetic"
  net = net_lib.build(config)
  leaves = net_lib.random_leaves(net)
  (head,) = (name for name in leaves if name.endswith("head/kernel"))
  leaves[head] = np.full_like(leaves[head], 3e38)  # finite, as files of weights must be
  run_folder.write(str(tmp_path / "run"), config, net, leaves, tuple(NAMES))
  Image.new("RGB", (20, 20), (255, 0, 0)).save(tmp_path / "red.png")
  assert main(tmp_path / "run", tmp_path / "red.png", "--json") == predict.SKIPPED
  printed = capsys.readouterr()
  assert "red.png is skipped: the model returns no finite numbers for it." in printed.err
  assert "labels" not in printed.out


@pytest.mark.parametrize(
  ("arguments", "words"),
  [
    (["{}/run", "{}/empty"], "empty holds no image (.jpg"),
    (["{}/run", "{}/none.jpg"], "There is no"),
    (["{}/nothing", "{}/photos"], "There is no"),
    (["{}/empty", "{}/photos"], "holds no checkpoint"),
    (["{}/photos/0.png", "{}/photos"], "0.png"),
    (["{}/run", "{}/photos", "--top=0"], "--top=0 must be 1 or more"),
    (["{}/run", "{}/photos", "--csv={}/no/x.csv"], "there is no such folder"),
    (["{}/run", "{}/photos", "--sheet={}/x.jpg"], "must end in .png"),
    (["{}/run", "{}/photos", "--classes={}/photos/notes.txt"], "names 1 classes"),
    (["{}/run", "{}/photos", "--classes={}/none"], "--classes="),
    (
      ["{}/file.safetensors", "{}/photos", f"--config={tiny.__file__}", "--config.model.depth=14"],
      "does not fit config.model",
    ),
  ],
)
def test_refused_in_one_sentence(folder, capsys, arguments, words):
  assert main(*(argument.replace("{}", str(folder)) for argument in arguments)) == 2
  error = capsys.readouterr().err.strip()
  assert words in error and "\n" not in error and "Traceback" not in error


def test_torch_is_not_imported():
  code = "import sys, trainer.predict; sys.exit('torch' in sys.modules)"
  assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
