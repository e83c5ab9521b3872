"""The code that hosts run: the tree of this repository as it is on disk, named by its hash."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import pathlib
import subprocess
import tempfile

from launch.cloud.settings import UsageError

ROOT = pathlib.Path(__file__).resolve().parents[2]
AGENT = pathlib.Path(__file__).with_name("agent.py")
# Untracked files are taken from these folders only, because others may hold what should stay at home.
_FOLDERS = ("configs", "input_pipeline", "launch", "trainer")
_MAX_BYTES = 50 << 20


@dataclasses.dataclass(frozen=True)
class Bundle:
  """A tree of git.

  Attributes:
    tree: its hash, the name of the code.
    commit: that it is nearest to.
    dirty: whether it differs from that.
  """

  tree: str
  commit: str
  dirty: bool


def _git(*words: str, index: str | None = None) -> str:
  environment = dict(os.environ) | ({"GIT_INDEX_FILE": index} if index else {})
  try:
    done = subprocess.run(
      ["git", *words], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
  except OSError as error:
    raise UsageError(f"git cannot be run ({error.strerror}); the code is shipped by it.") from error
  if done.returncode:
    raise UsageError(
      f"git {words[0]} failed in {ROOT}: {(done.stderr.strip().splitlines() or ['?'])[-1]}"
    )
  return done.stdout.strip()


def look() -> Bundle:
  """Takes down the tree of all tracked files as they are on disk, and of new ones in the packages.

  Raises:
    UsageError: if this is no clone.
  """
  commit = _git("rev-parse", "HEAD")
  with tempfile.TemporaryDirectory() as folder:
    index = f"{folder}/index"
    _git("read-tree", "HEAD", index=index)
    _git("add", "--update", index=index)
    _git("add", "--", *(name for name in _FOLDERS if (ROOT / name).is_dir()), index=index)
    tree = _git("write-tree", index=index)
  return Bundle(tree[:12], commit, tree != _git("rev-parse", "HEAD^{tree}"))


def pack(bundle: Bundle, folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
  """Writes the archive of a tree, and its difference to the commit, into a folder.

  Raises:
    UsageError: if it is too large to be code.
  """
  archive, diff = folder / f"code-{bundle.tree}.tar.gz", folder / f"dirty-{bundle.tree}.diff"
  _git("archive", "--format=tar.gz", f"--output={archive}", bundle.tree)
  if archive.stat().st_size > _MAX_BYTES:
    raise UsageError(
      f"The code is {archive.stat().st_size >> 20} MiB as an archive; keep data out of git and of "
      f"{', '.join(_FOLDERS)} (.gitignore)."
    )
  _git("diff", "--binary", f"--output={diff}", bundle.commit, bundle.tree)
  return archive, diff


def agent_sha() -> str:
  """Returns the hash of the agent, which is part of its name on hosts."""
  return hashlib.sha256(AGENT.read_bytes()).hexdigest()[:12]
