"""The command line: errors in one sentence, one level of quoting, lines shown before they run."""

import argparse
import hashlib
import os
import pathlib
import shlex
import shutil
import socket
import subprocess
import sys

import pytest

from launch.cloud import bundle, checks, cli, commands, dry, preflight, verbs
from launch.cloud.settings import Place, UsageError, duration, label

ROOT = pathlib.Path(__file__).parents[3]
WHERE = ["--project=my-project", "--zone=us-west4-a", "--bucket=gs://my-bucket"]
UP = ["up", "r1", "--type=v5litepod-16", "--spot", "--config=configs/smoke.py", *WHERE]


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch, tmp_path):
  for name in ("CLOUDSDK_CORE_PROJECT", "CLOUDSDK_COMPUTE_ZONE", "TPU_BUCKET"):
    monkeypatch.delenv(name, raising=False)
  monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
  monkeypatch.setenv("TPU_GCLOUD", "/nowhere/gcloud")
  monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


def settings(*words):
  args, unknown = cli.parser()[0].parse_known_args([*UP, *words])
  return cli.settings_of(args, unknown)


@pytest.mark.parametrize(
  "words, told",
  [
    (["up"], "RUN, --type"),
    (["status", "r1"], "--project is needed"),
    (["status", "r1", "--project=my-project"], "--zone is needed"),
    (["status", "r1", *WHERE[:2]], "--bucket is needed"),
    (["status", "r1", *WHERE, "--fast"], "no option --fast"),
    (["status", "Run", *WHERE], "run name 'Run'"),
    (["down", *WHERE], "run name ''"),
    (["logs", "r1", *WHERE, "--worker=1-2"], "--worker '1-2'"),
    (["up", "r1", "--type=v5litepod-16", *WHERE, "--config=configs/smoke.py"], "--max-hours"),
    ([*UP, "--reserved"], "not allowed with"),
    ([*UP, "--slices=0"], "--slices 0"),
    ([*UP, "--type=v9-8"], "GKE only"),
    ([*UP, "--type=tpu7x-64"], "GKE only"),
    ([*UP, "--type=new-8"], "--runtime-version"),
    ([*UP, "--type=big"], "--type 'big'"),
    ([*UP, "--type=v5e-64"], "the API names it v5litepod-64"),
    ([*UP, "--type=v5litepod-63"], "the nearest is v5litepod-64"),
    ([*UP, "--type=v4-12"], "v4-8"),
    ([*UP, "--max-hour=3"], "did you mean --max-hours?"),
    ([*UP, "--tpye=v4-8"], "did you mean --type?"),
    ([*UP, "--confg=x"], "did you mean --config?"),
    ([*UP, "--frobnicate"], "no option --frobnicate"),
    ([*UP, "--keep"], "--keep needs --max-hours"),
    ([*UP, "--reservation=one"], "--reservation needs --reserved"),
    ([*UP[:3], *UP[4:], "--flex-start"], "--flex-start needs --max-hours"),
    ([*UP, "--secret=WANDB=0123456789abcdef0123456789abcdef01234567"], "never its value"),
    ([*UP, "--secret=hf_abcdefghijklmnop"], "never its value"),
    ([*UP, "--max-wait=soon"], "soon"),
    ([*UP, "--max-hours=0"], "--max-hours 0"),
    ([*UP, "--autocheckpoint"], "--autocheckpoint"),
    ([*UP, "--label=Team=x"], "--label Team=x"),
    ([*UP, "--label=run=x"], "set by the launcher"),
    ([*UP, "--label=team"], "KEY=VALUE"),
    ([*UP, "--secret=KEY=the value itself"], "never its value"),
    ([*UP, "--service-account=me"], "--service-account"),
    ([*UP, "--env-file=/nowhere/x"], "--env-file /nowhere/x"),
    ([*UP[:4], *WHERE, "--config=configs/none.py"], "configs/none.py"),
    ([*UP, "--config=configs/base.py"], "--config is given 2 times"),
    ([*UP[:4], *WHERE], "--config"),
    ([*UP, "--workdir=here"], "--workdir=here"),
    ([*UP, "x", "y"], "not a flag of the trainer"),
    ([*UP, "--zone=us west"], "--zone"),
    ([*UP, "--bucket=my-bucket"], "gs://BUCKET"),
    ([*UP, "--project=p;rm"], "--project"),
    (["prepare", "p1", *WHERE, "--source=/tmp/x", "--out=gs://my-bucket/x"], "--source"),
  ],
)
def test_what_is_wrong_is_told_in_one_sentence(words, told, capsys):
  assert cli.main(words) == 2
  error = capsys.readouterr().err
  assert told in error and error.startswith("launch/tpu: ") and error.count("\n") == 1


@pytest.mark.parametrize(
  "text, told",
  [
    ("export KEY=a", "line 2: write NAME=VALUE without export"),
    ("the secret", "line 2 is not NAME=VALUE"),
    ("A-B=c", "line 2 is not NAME=VALUE"),
  ],
)
def test_lines_of_the_file_of_secrets_are_checked_and_not_repeated(text, told, tmp_path, capsys):
  path = tmp_path / "env"
  path.write_text(f"# comment\n{text}\n")
  path.chmod(0o600)
  assert cli.main([*UP, f"--env-file={path}"]) == 2
  error = capsys.readouterr().err
  assert told in error and "secret" not in error.replace(str(path), "")


@pytest.mark.parametrize("words", [[], ["fly"], ["staus"]])
def test_without_a_verb_the_usage_is_shown(words, capsys):
  assert cli.main(words) == 2
  error = capsys.readouterr().err
  assert "launch/tpu VERB [RUN]" in error
  if words:
    assert f"no verb {words[0]}" in error
  assert ("did you mean status?" in error) == (words == ["staus"])


@pytest.mark.parametrize("verb", cli._VERBS)
def test_the_help_of_a_verb_begins_with_a_sentence_and_an_example(verb, capsys):
  with pytest.raises(SystemExit):
    cli.main([verb, "--help"])
  text = capsys.readouterr().out
  assert cli._VERBS[verb][0].split(";")[0] in text and f"    launch/tpu {verb} " in text


def test_a_config_that_hosts_would_not_get(monkeypatch):
  tree = bundle.Bundle("HEAD", "HEAD", False)
  checks.shipped(tree, ["--config=configs/smoke.py:x"])
  with pytest.raises(UsageError, match=r"git add -f runs/mine.py"):
    checks.shipped(tree, ["--config=runs/mine.py"])


def test_the_trainer_checks_its_config_on_this_machine(monkeypatch, tmp_path):
  python = tmp_path / ".venv" / "bin" / "python"
  monkeypatch.setattr(bundle, "ROOT", tmp_path)
  assert "was not checked" in checks.trainer_accepts(["--config=configs/smoke.py"])
  python.parent.mkdir(parents=True)
  python.write_text(f'#!/bin/sh\ncd {ROOT}; PYTHONPATH={ROOT} exec {sys.executable} "$@"\n')
  python.chmod(0o755)
  assert checks.trainer_accepts(["--config=configs/smoke.py", "--workdir=x"]) is None
  with pytest.raises(UsageError, match="dpeth"):
    checks.trainer_accepts(["--config=configs/smoke.py", "--config.model.dpeth=18"])


@pytest.mark.parametrize(
  "type_, topology",
  [
    ("v5litepod-1", "v5e:1x1"),
    ("v5litepod-8", "v5e:2x4"),
    ("v5litepod-128", "v5e:8x16"),
    ("v6e-64", "v6e:8x8"),
    ("v3-8", "v3:2x2"),
    ("v4-8", "v4:2x2x1"),
    ("v4-16", "v4:2x2x2"),
    ("v4-64", "v4:2x4x4"),
    ("v5p-128", "v5p:4x4x4"),
  ],
)
def test_the_topology_of_a_type(type_, topology):
  assert preflight.topology(type_) == topology


@pytest.mark.parametrize("type_", ["v4-24", "v9-8"])
def test_a_type_without_a_known_topology(type_):
  with pytest.raises(UsageError, match=f"topology of {type_} is not known"):
    preflight.topology(type_)


@pytest.mark.parametrize("code, result", [(0, "driven"), (3, 3), (2, 2), (1, 2)])
def test_preflight_comes_before_anything_is_created(monkeypatch, tmp_path, capfd, code, result):
  def refuse(*_):
    raise AssertionError("this would create something")

  monkeypatch.setattr(bundle, "look", lambda: bundle.Bundle("HEAD", "HEAD", False))
  monkeypatch.setattr(verbs.Store, "read", lambda self: None)
  monkeypatch.setattr(verbs.doctor, "check_removal", lambda *_: None)
  monkeypatch.setattr(verbs, "_drive", refuse if code else lambda *_: "driven")
  wanted = settings("--slices=2", "--dollars-per-chip-hour=1.2", "--config.model.depth=18")
  monkeypatch.setattr(cli, "settings_of", lambda args, trainer: wanted)
  monkeypatch.setattr(preflight.bundle, "ROOT", tmp_path)
  monkeypatch.setattr(verbs.checks, "shipped", lambda *_: None)
  command = [*UP, "--preflight", "--no-check"]
  assert cli.main(command) == 2  # without an environment
  assert "launch/smoke.sh" in capfd.readouterr().err
  python = tmp_path / ".venv" / "bin" / "python"
  python.parent.mkdir(parents=True)
  python.write_text(f'#!/bin/sh\necho "$@"\nexit {code}\n')
  python.chmod(0o755)
  assert cli.main(command) == result
  told = capfd.readouterr()
  assert (
    "-m launch.preflight --topology=v5e:4x4 --slices=2 --config=configs/smoke.py "
    "--config.model.depth=18 --dollars_per_chip_hour=1.2"
  ) in told.err
  assert ("nothing was created" in told.err) == (result == 2)


@pytest.mark.parametrize(
  "run", ["a$(touch x)", "a b", "-a", "a;b", "a'b", "a\nb", "../a", "ä", "a" * 41, "1a", "a-"]
)
def test_hostile_run_names_are_refused(run, capsys):
  for words in (["up", run, *UP[2:]], ["down", run, *WHERE], ["logs", run, *WHERE]):
    assert cli.main(words) == 2
  assert "launch/tpu: " in capsys.readouterr().err


HOSTILE = [
  "--config.data.path=/a b/c",
  "--config.x='\"$(touch /tmp/x)`id`\\",
  "--config.y=line\nline",
  "--config.z=a,b=c%^&*",
  "--config.u=é",
  "--config.e=",
]


def test_values_of_the_trainer_are_not_touched_and_not_on_any_line():
  wanted = settings(*HOSTILE)
  assert wanted.argv[1:-1] == tuple(HOSTILE)
  for line in dry.up(wanted):
    assert not any(word in text for text in line for word in ("/a b/c", "touch", "é"))


def test_flag_and_value_may_be_two_words_in_any_order():
  args, unknown = cli.parser()[0].parse_known_args(
    [*UP[:4], *WHERE, "--config.seed", "3", "--config", "configs/smoke.py"]
  )
  assert cli.settings_of(args, unknown).argv == (
    "--config=configs/smoke.py",
    "--config.seed=3",
    "--workdir=gs://my-bucket/r1/workdir",
  )


def test_every_line_survives_a_shell():
  for line in commands.every_line():
    assert shlex.split(commands.shell(line)) == line
    printed = subprocess.run(
      ["bash", "-c", f"printf '%s\\0' {commands.shell(line)}"],
      capture_output=True,
      text=True,
      check=True,
    ).stdout
    assert printed.split("\0")[:-1] == line


def test_the_command_of_hosts_reaches_the_agent_as_words(tmp_path):
  place = Place("r1", "p", "z", "gs://b/it's $(a) folder")
  folder = tmp_path / "a state" / "r1"
  folder.mkdir(parents=True)
  program = folder / "agent-abc.pyz"
  program.write_text("import sys; print(sys.argv[1:])")
  sha = hashlib.sha256(program.read_bytes()).hexdigest()
  (tmp_path / "tpu-r1.env").write_text("A=b")
  binaries = tmp_path / "bin"
  binaries.mkdir()
  for name, text in {
    "sudo": 'shift; exec "$@"',
    "gcloud": 'echo altered >"$4"; exit ${REFUSED:-0}',
  }.items():
    (binaries / name).write_text(f"#!/bin/sh\n{text}\n")
    (binaries / name).chmod(0o755)

  def run(sha, *words, **environment):
    command = commands.agent(place, program.name, sha, *words)
    return subprocess.run(
      ["bash", "-c", command],
      cwd="/",
      capture_output=True,
      text=True,
      check=True,
      env=os.environ
      | {
        "HOME": str(tmp_path),
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "TPU_STATE": str(tmp_path / "a state"),
      }
      | environment,
    ).stdout

  assert run(sha, "tail", "3 ; false") == f"{[place.url, 'tail', '3 ; false']}\n"
  assert (folder / "env").read_text() == "A=b" and not (tmp_path / "tpu-r1.env").exists()
  # What comes from the bucket is run only if it is what the launcher has put there.
  assert run("0" * 64, "status").startswith("tpu-agent-failed 82 ")
  assert run("0" * 64, "status", REFUSED="1").startswith("tpu-agent-failed 81 ")
  assert list(folder.glob("agent-*")) == [program]


@pytest.mark.parametrize(
  "verb", ["up", "watch", "status", "logs", "stop", "down", "list", "doctor", "prepare"]
)
def test_dry_run_prints_lines_and_runs_none(verb, capsys):
  words = {
    "up": UP,
    "list": ["list", *WHERE],
    "prepare": [
      "prepare",
      "p1",
      *WHERE,
      "--source=gs://my-bucket/tars",
      "--out=gs://my-bucket/imagenet",
    ],
  }
  assert cli.main([*words.get(verb, [verb, "r1", *WHERE]), "--dry-run"]) == 0
  lines = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
  assert lines and all(line[0] == "gcloud" for line in lines)
  assert all(
    line[1:4] != ["compute", "tpus", "queued-resources"] or "--zone=us-west4-a" in line
    for line in lines
  )


def test_the_request_says_what_was_asked_for():
  wanted = settings(
    "--slices=2",
    "--internal-ips",
    "--service-account=sa@p.iam.gserviceaccount.com",
    "--label=team=vision",
    "--network=net",
    "--max-wait=2h",
    "--owner=Ann.B",
  )
  line = commands.create(wanted, 3, wanted.max_wait, "boot.sh")
  for word in (
    "--node-count=2",
    "--node-prefix=r1",
    "--accelerator-type=v5litepod-16",
    "--runtime-version=v2-alpha-tpuv5-lite",
    "--spot",
    "--internal-ips",
    "--service-account=sa@p.iam.gserviceaccount.com",
    "--network=net",
    "--labels=run=r1,owner=ann-b,attempt=3,launcher=resnet-pod,team=vision",
    "--valid-until-duration=7200s",
    "--metadata-from-file=startup-script=boot.sh",
    "--project=my-project",
    "--zone=us-west4-a",
  ):
    assert word in line
  assert "--tunnel-through-iap" in commands.ssh(
    wanted, "true"
  )  # without external addresses there is no other way


@pytest.mark.parametrize(
  "text, seconds", [("90s", 90), ("15m", 900), ("6h", 21600), ("2d", 172800), ("0.5", 0.5)]
)
def test_durations(text, seconds):
  assert duration(text) == seconds


@pytest.mark.parametrize("text", ["", "0", "-1", "1w", "1h30m", "nan"])
def test_durations_that_are_none(text):
  with pytest.raises(UsageError, match="is not a duration"):
    duration(text)


@pytest.mark.parametrize(
  "user, account, owner",
  [
    ("ann", "x@y.com", "ann"),
    ("ubuntu", "Ann.B@y.com", "ann-b-y-com"),
    ("root", "", f"root-{socket.gethostname()}".lower()),
  ],
)
def test_two_people_who_are_both_ubuntu_are_told_apart(user, account, owner, monkeypatch):
  monkeypatch.setattr("getpass.getuser", lambda: user)
  monkeypatch.setattr(cli, "_gcloud_value", lambda line: account)
  args = argparse.Namespace(owner=None, run="")
  assert cli._owner(args) == label(owner)
  assert cli._owner(argparse.Namespace(owner="team", run="")) == "team"


def test_without_gcloud(capsys):
  assert cli.main(["list", *WHERE]) == 1
  assert "install the Google Cloud CLI" in capsys.readouterr().err


def test_the_launcher_imports_only_the_standard_library():
  code = (
    "import sys, launch.cloud.cli; print([n for n in sys.modules if n.split('.')[0] not in "
    "set(sys.stdlib_module_names) | {'launch', '__main__', 'sitecustomize', 'usercustomize'}])"
  )
  done = subprocess.run(
    [sys.executable, "-S", "-c", code], capture_output=True, text=True, cwd=ROOT, check=True
  )
  assert done.stdout == "[]\n"


def test_without_a_python():
  bash = shutil.which("bash")
  done = subprocess.run(
    [bash, ROOT / "launch/tpu", "list"],
    capture_output=True,
    text=True,
    env={"PYTHON": "/nowhere/python3", "PATH": os.environ["PATH"]},
    check=False,
  )
  assert done.returncode == 1 and done.stderr.startswith(
    "launch/tpu: Python 3.11 or newer is needed"
  )
