"""Runs that stream parquet: stopped, killed and gone on with, and on another number of hosts."""

import json
import os
import shutil
import signal
import subprocess

import pytest

from input_pipeline import sources
from tests.input_pipeline.conftest import data_config
from tests.trainer.shared import ENVIRONMENT, fingerprints, run, running
from tests.trainer.test_run import command

datasets = pytest.importorskip("datasets", reason="the extra [hf] is not installed")

SECRET = "hf_abcdefghijklmnopqrstuvwxyz"
FIELDS = (
  "data.hf_window=24",
  "data.hf_streams=2",
  "log.every_steps=10",
  "data.max_bad_fraction=0.1",
)


@pytest.fixture(scope="session")
def parquet(shards, tmp_path_factory):
  """The images of `shards` in three files a split, in row groups of 8."""
  folder = tmp_path_factory.mktemp("parquet")
  for split in ("train", "val"):
    source = sources.open_source(data_config(shards), split, 6)
    examples = [source[i] for i in range(len(source))]
    features = datasets.Features(
      {
        "image": datasets.Image(decode=False),
        "label": datasets.ClassLabel(names=source.class_names),
      }
    )
    for i in range(3):
      part = examples[i::3]
      table = datasets.Dataset.from_dict(
        {
          "image": [{"bytes": r.image, "path": r.name} for r in part],
          "label": [r.label for r in part],
        },
        features=features,
      )
      table.to_parquet(str(folder / f"{split}-{i:05d}-of-00003.parquet"), batch_size=8)
  return folder


def test_killed_and_gone_on_with_in_the_same_bits(tmp_path, parquet):
  overrides = (*FIELDS, "total_steps=200", "checkpoint.every_steps=20", "eval.every_steps=70")
  environment = os.environ | {"HF_TOKEN": SECRET}
  quiet = subprocess.run(
    command(tmp_path / "quiet", f"hf:{parquet}", *overrides),
    check=True,
    stderr=subprocess.PIPE,
    text=True,
    env=environment,
  ).stderr
  assert (
    "Streaming 72 examples" in quiet
    and "each host reads 2 at once and shuffles windows of 24" in quiet
  )
  assert SECRET not in quiet
  with subprocess.Popen(
    command(tmp_path / "killed", f"hf:{parquet}", *overrides),
    stderr=subprocess.PIPE,
    text=True,
    env=environment,
  ) as process:
    log = ""
    for line in process.stderr:
      log += line
      if "step 90/200" in line:
        process.kill()
    log += process.communicate(timeout=60)[0] or ""
  assert process.returncode == -signal.SIGKILL, log
  again = subprocess.run(
    command(tmp_path / "killed", f"hf:{parquet}", *overrides),
    check=True,
    stderr=subprocess.PIPE,
    text=True,
    env=environment,
  ).stderr
  assert "Resuming from checkpoint" in again and "order changes" not in again
  assert fingerprints(tmp_path / "killed", 200) == fingerprints(tmp_path / "quiet", 200)
  assert json.loads((tmp_path / "killed" / "final.json").read_text())["examples"] == 29
  for file in tmp_path.rglob("*"):
    assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file


@pytest.mark.slow
def test_two_hosts_stopped_then_on_two_and_on_one(tmp_path, parquet):
  def trainer(workdir, steps):
    return command(
      tmp_path / workdir,
      f"hf:{parquet}",
      *FIELDS,
      f"total_steps={steps}",
      "checkpoint.every_steps=20",
    )

  run(2, 1, trainer("quiet", 150))
  with running(2, 1, trainer("two", 150)) as pod:
    pod.wait_for("step 20/")
    os.kill(pod.pids()[1], signal.SIGTERM)
    pod.finish()
  assert "Stopped and saved at step" in pod.log, pod.log
  shutil.copytree(tmp_path / "two", tmp_path / "one")
  log = run(2, 1, trainer("two", 150))
  assert "order changes" not in log
  assert fingerprints(tmp_path / "two", 150) == fingerprints(tmp_path / "quiet", 150)
  alone = subprocess.run(
    trainer("one", 150), check=True, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT
  ).stderr
  assert alone.count("the order changes") == 1
  assert "is that of 2 hosts, not 1" in alone and "begins anew" in alone
  assert json.loads((tmp_path / "one" / "final.json").read_text())["examples"] == 29
