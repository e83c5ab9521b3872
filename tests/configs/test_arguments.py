"""Commands without a --config: what they refuse is one line, and paths are what a person means."""

import os

import pytest

from configs import __main__ as fields
from configs import arguments
from input_pipeline.prepare import __main__ as prepare
from trainer import predict
from trainer.reporting import report, watch
from trainer.weights import __main__ as weights

COMMANDS = {
  "prepare": prepare.main,
  "report": report.main,
  "watch": watch.main,
  "predict": lambda words: predict.main(["predict", *words]),
  "weights": lambda words: weights.main(["weights", *words]),
  "configs": fields.main,
}


@pytest.mark.parametrize(
  ("command", "words", "says"),
  [
    ("prepare", ["--folder=x"], "--out"),
    ("prepare", ["--out=x", "--vall-fraction=1"], "did you mean --val-fraction?"),
    ("prepare", ["--out=x", "--class=5"], "--class=5; did you mean --classes?"),
    ("prepare", ["--out=x", "--workers=many"], "invalid int value: 'many'"),
    ("prepare", ["--out=x", "photos"], "unrecognized arguments: photos"),
    ("report", [], "workdir"),
    ("report", ["x", "--mistake=5"], "did you mean --mistakes?"),
    ("report", ["--workdir=runs/x"], "as in `runs/r50` for --workdir=runs/r50"),
    ("watch", ["--workdir", "runs/x"], "as in `runs/r50` for --workdir=runs/r50"),
    ("watch", ["x", "--every=often"], "invalid float value: 'often'"),
    ("predict", ["--workdir=runs/x", "photos"], "as in `runs/r50` for --workdir=runs/r50"),
    ("predict", ["runs/x"], "IMAGE|FOLDER"),
    ("predict", ["runs/x", "y", "--tops=3"], "did you mean --top?"),
    (
      "weights",
      ["export", "--workdir=runs/x", "--format=onnx", "--out=x"],
      "for --workdir=runs/r50",
    ),
    ("weights", ["export", "x", "--format=torch", "--out=x"], "invalid choice: 'torch'"),
    ("weights", ["inport"], "invalid choice: 'inport'"),
    ("weights", ["show", "x", "--nmaes"], "unknown argument of show: --nmaes"),
    ("configs", ["--serch=lr"], "did you mean --search?"),
    ("configs", ["resnot"], "families: resnet"),
  ],
)
def test_a_refusal_is_one_line(command, words, says, capsys):
  with pytest.raises(SystemExit) as ended:
    COMMANDS[command](words)
  said = capsys.readouterr().err
  assert ended.value.code == 2
  assert said.count("\n") == 1 and says in said and said.endswith("--help shows all flags.\n")


def test_a_home_folder_that_the_shell_has_left(monkeypatch, tmp_path):
  monkeypatch.setenv("HOME", str(tmp_path))
  assert arguments.path("~/data") == str(tmp_path / "data")
  assert arguments.path("gs://bucket/~x") == "gs://bucket/~x"
  assert prepare.main(["--out=~/out", "--folder=~/none"]) == 1
  assert os.listdir(tmp_path) == ["out"]
