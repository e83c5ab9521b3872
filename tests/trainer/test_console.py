"""resnet-pod, and folders of a user that have the names of our packages."""

import configparser
import os
import pathlib
import subprocess
import sys

import pytest

from configs import own_packages
from trainer import console

ROOT = pathlib.Path(__file__).parents[2]
# As the script that pip writes.
SCRIPT = (
  "import sys; from trainer.console import main; sys.argv[0] = 'resnet-pod'; sys.exit(main())"
)


def run(folder, *command, path=""):
  environment = os.environ | {"PYTHONPATH": path or str(ROOT), "JAX_PLATFORMS": "cpu"}
  return subprocess.run(
    [sys.executable, *command],
    cwd=folder,
    env=environment,
    capture_output=True,
    text=True,
    timeout=120,
    check=False,
  )


@pytest.fixture
def home(tmp_path):
  """A folder with packages of a user that have our names."""
  for name in ("configs", "input_pipeline", "trainer"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("raise RuntimeError('of the user')\n")
  return tmp_path


def test_it_is_installed_and_every_module_is_there():
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg")
  scripts = setup["options.entry_points"]["console_scripts"]
  assert scripts.split() == ["resnet-pod", "=", "trainer.console:main"]
  data = setup["options.package_data"]["trainer.reporting"].split()
  assert data and all((ROOT / "trainer" / "reporting" / name).exists() for name in data)
  for module, _ in console.COMMANDS.values():
    file = ROOT.joinpath(*module.split("."))
    assert file.with_suffix(".py").exists() or (file / "__main__.py").exists(), module


def test_help_and_a_wrong_command(capsys, monkeypatch):
  monkeypatch.setattr(sys, "argv", ["resnet-pod"])
  with pytest.raises(SystemExit) as ended:
    console.main()
  assert ended.value.code == 0
  told = capsys.readouterr().out
  assert all(f"  {name} " in told for name in console.COMMANDS)
  monkeypatch.setattr(sys, "argv", ["resnet-pod", "fit"])
  with pytest.raises(SystemExit) as ended:
    console.main()
  assert (
    ended.value.code == 2 and "no command 'fit'; there is train, eval" in capsys.readouterr().err
  )


def test_ours_run_among_folders_of_the_same_names(home):
  # -P: as with a script, the working directory is not the first place to look.
  told = run(home, "-P", "-c", SCRIPT, "train", "--list")
  assert told.returncode == 0 and "imagenet_resnet50" in told.stdout, told.stderr
  told = run(home, "-P", "-c", SCRIPT, "eval", "--workdir=absent")
  assert told.returncode == 2 and "absent" in told.stderr and "of the user" not in told.stderr


def hide(home, *names):
  """Leave only packages of these names in the folder of a user."""
  for name in ("configs", "input_pipeline", "trainer"):
    if name not in names:
      (home / name / "__init__.py").unlink()
      (home / name).rmdir()


def test_a_folder_that_hides_a_package_is_named(home):
  hide(home, "configs")
  for module in ("trainer", "input_pipeline.inspect", "launch.preflight"):
    told = run(home, "-m", module, "--help")
    assert told.returncode == 2 and told.stderr.count("\n") == 1, told.stderr
    assert (
      f"{home}/configs hides the package configs" in told.stderr and "resnet-pod" in told.stderr
    )
  for package in ("trainer", "input_pipeline"):
    as_library = run(home, "-c", f"import {package}")
    assert as_library.returncode == 1 and "ImportError" in as_library.stderr


def test_a_python_that_lacks_libraries_or_is_too_old_is_named(home, monkeypatch):
  hide(home)
  for module in ("trainer", "input_pipeline.prepare"):
    told = run(home, "-S", "-m", module, "--help")  # without what is installed
    assert told.returncode == 2 and told.stderr.count("\n") == 1, told.stderr
    assert "has no ml_collections: type source .venv/bin/activate" in told.stderr
  assert run(home, "-S", "-m", "launch.local_pod", "--help").returncode == 0
  monkeypatch.setattr(sys, "version_info", (3, 10))
  monkeypatch.setattr(own_packages, "_is_command", lambda: False)
  with pytest.raises(ImportError, match=r"Python 3\.11 or newer is needed; "):
    own_packages.check.__wrapped__("configs")


def test_who_needs_no_trainer_runs_beside_another_one(home):
  hide(home, "trainer")
  assert run(home, "-m", "input_pipeline.prepare", "--help").returncode == 0
  for module in ("input_pipeline.inspect", "configs", "launch.preflight"):
    told = run(home, "-m", module)
    assert told.returncode == 2 and told.stderr.count("\n") == 1, told.stderr
    assert f"{home}/trainer hides the package trainer" in told.stderr


def test_folders_that_are_no_packages_hide_nothing(home):
  """As one of run files, which are named by their paths."""
  hide(home)
  for name in ("configs", "trainer"):
    (home / name).mkdir()
  mine = home / "configs" / "mine.py"
  mine.write_text("from configs import smoke\n\n\ndef get_config():\n  return smoke.get_config()\n")
  told = run(home, "-m", "trainer", "--config=configs/mine.py", "--help=crop")
  assert told.returncode == 0 and "--config.data.crop" in told.stdout, told.stderr
