"""Hosts get the code as it is on disk: with changes and new modules, without private files."""

import subprocess
import tarfile

import pytest

from launch.cloud import bundle
from launch.cloud.settings import UsageError


@pytest.fixture
def clone(tmp_path, monkeypatch):
  root = tmp_path / "a clone"
  (root / "trainer").mkdir(parents=True)
  monkeypatch.setattr(bundle, "ROOT", root)

  def git(*words):
    subprocess.run(
      ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words],
      cwd=root,
      check=True,
      capture_output=True,
    )

  git("init")
  (root / "trainer" / "train.py").write_text("one\n")
  (root / "gone.py").write_text("one\n")
  (root / ".gitignore").write_text("*.secret\n")
  git("add", "--all")
  git("commit", "-m", "first")
  return root


def status(root):
  return subprocess.run(
    ["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True
  ).stdout


def packed(out):
  out.mkdir()
  found = bundle.look()
  archive, diff = bundle.pack(found, out)
  with tarfile.open(archive) as tar:
    return found, {member.name for member in tar if member.isfile()}, diff.read_text()


def test_a_clean_clone(clone, tmp_path):
  found, names, diff = packed(tmp_path / "out")
  assert (found.dirty, names, diff) == (False, {"trainer/train.py", "gone.py", ".gitignore"}, "")


def test_changes_are_shipped_and_shown_and_the_index_is_left_alone(clone, tmp_path):
  clean = bundle.look()
  (clone / "trainer" / "train.py").write_text("two\n")
  (clone / "trainer" / "new.py").write_text("new\n")
  (clone / "trainer" / "key.secret").write_text("hush\n")
  (clone / "passwords.txt").write_text("hush\n")
  (clone / "gone.py").unlink()
  before = status(clone)
  found, names, diff = packed(tmp_path / "out")
  assert found.dirty and found.commit == clean.commit and found.tree != clean.tree
  assert names == {"trainer/train.py", "trainer/new.py", ".gitignore"}
  assert "+two" in diff and "+new" in diff and "hush" not in diff
  assert bundle.look() == found
  assert status(clone) == before


def test_what_is_too_large_to_be_code(clone, tmp_path, monkeypatch):
  monkeypatch.setattr(bundle, "_MAX_BYTES", 10)
  with pytest.raises(UsageError, match="keep data out of git"):
    packed(tmp_path / "out")


def test_no_clone(tmp_path, monkeypatch):
  monkeypatch.setattr(bundle, "ROOT", tmp_path)
  with pytest.raises(UsageError, match="git rev-parse failed"):
    bundle.look()
