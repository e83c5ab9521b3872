"""The machine that makes the shards: its script as it is, with stand-ins for what is around it."""

import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import simplejpeg

from launch.cloud import cli

ROOT = pathlib.Path(__file__).parents[3]
GCLOUD = r"""#!/bin/bash
# Folders below CLOUD are buckets.
echo "$*" >>"$CLOUD/log"
words=()
for word in "$@"; do [[ $word == --* ]] || words+=("${word/gs:\/\//$CLOUD/}"); done
case "${words[*]:0:2}" in
  "storage cp") mkdir -p "$(dirname "${words[3]}")"; cp "${words[2]}" "${words[3]}" ;;
  "storage rsync")
    [[ -d ${words[2]} ]] && mkdir -p "${words[3]}" && cp -r "${words[2]}/." "${words[3]}" ;;
esac
"""
CURL = r"""#!/bin/bash
case "${@: -1}" in
  */prepare-url) echo gs://b/prep ;;
  */prepare-source) echo gs://b/images ;;
  */prepare-out) echo gs://b/shards ;;
  */name) echo prep ;; */zone) echo projects/1/zones/us-west4-a ;; *) exit 22 ;;
esac
"""
# Makes the environments without a network: pip does nothing, uv makes one with the Python of this
# test, whatever version it is asked for.
PYTHON = r"""#!/bin/bash
[[ $2 == venv ]] || exit 1
mkdir -p "$3/bin"
printf '#!/bin/bash\n' >"$3/bin/pip"
echo '#!/bin/bash
[[ $1 == venv ]] || exit 0
[[ $* == *" --python=3."[0-9]* ]] || exit 2
mkdir -p "${@: -1}/bin"
ln -s "$REAL" "${@: -1}/bin/python"' >"$3/bin/uv"
chmod +x "$3/bin/"*
"""


@pytest.fixture
def machine(tmp_path):
  binaries = tmp_path / "bin"
  binaries.mkdir()
  for name, text in (
    ("gcloud", GCLOUD),
    ("curl", CURL),
    ("python3", PYTHON),
    ("apt-get", "#!/bin/bash\n"),
  ):
    (binaries / name).write_text(text)
    (binaries / name).chmod(0o755)
  bucket = tmp_path / "cloud" / "b"
  (bucket / "prep").mkdir(parents=True)
  subprocess.run(
    [
      "tar",
      "czf",
      bucket / "prep" / "code.tar.gz",
      "-C",
      ROOT,
      "input_pipeline",
      "configs",
      "launch",
    ],
    check=True,
  )
  # A wrapper, because a link to the Python of an environment would be one of another environment.
  real = tmp_path / "real"
  real.write_text(f'#!/bin/bash\nexec "{sys.executable}" "$@"\n')
  real.chmod(0o755)
  environment = os.environ | {
    "PATH": f"{binaries}:{os.environ['PATH']}",
    "CLOUD": str(tmp_path / "cloud"),
    "REAL": str(real),
    "PREPARE_DATA": str(tmp_path / "a disk"),
  }

  def run(*arguments):
    (bucket / "prep" / "arguments").write_text("".join(f"{word}\n" for word in arguments))
    done = subprocess.run(
      ["bash", ROOT / "launch/prepare_imagenet.sh"],
      env=environment,
      capture_output=True,
      text=True,
      timeout=300,
      check=False,
    )
    return done.returncode, (bucket / "prep" / "prepare.log").read_text()

  run.bucket = bucket
  run.lines = lambda: (tmp_path / "cloud" / "log").read_text().splitlines()
  return run


def images(folder):
  rng = np.random.default_rng(0)
  for split in ("train", "val"):
    for label in ("a", "b"):
      for i in range(3):
        path = folder / "some images" / split / label / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(simplejpeg.encode_jpeg(rng.integers(0, 255, (24, 24, 3)).astype(np.uint8)))


def test_shards_go_to_the_bucket_and_the_machine_deletes_itself(machine):
  images(machine.bucket / "images")
  code, log = machine("--folder=some images", "--shards=1", "--val-shards=1", "--workers=1")
  assert code == 0, log
  assert (machine.bucket / "shards" / "manifest.json").exists()
  assert "ended with code 0" in log
  assert machine.lines()[-1] == "compute instances delete prep --zone=us-west4-a --quiet"


def test_a_machine_that_fails_says_why_and_deletes_itself_too(machine):
  images(machine.bucket / "images")
  code, log = machine("--folder=none")
  assert code != 0 and "prepare: " in log and "ended with code 1" in log
  assert not (machine.bucket / "shards").exists()
  assert machine.lines()[-1] == "compute instances delete prep --zone=us-west4-a --quiet"


def test_the_line_that_makes_the_machine(capsys, monkeypatch, tmp_path):
  monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
  assert (
    cli.main(
      [
        "prepare",
        "prep",
        "--project=my-project",
        "--zone=us-west4-a",
        "--bucket=gs://bbb",
        "--dry-run",
        "--source=gs://bbb/tars",
        "--out=gs://bbb/imagenet",
        "--max-time=3h",
      ]
    )
    == 0
  )
  line = capsys.readouterr().out.splitlines()[-1]
  for words in (
    "instances create prep",
    "--max-run-duration=10800s",
    "--instance-termination-action=DELETE",
    "prepare-url=gs://bbb/prep,prepare-source=gs://bbb/tars,prepare-out=gs://bbb/imagenet",
    f"startup-script={ROOT}/launch/prepare_imagenet.sh",
  ):
    assert words in line
