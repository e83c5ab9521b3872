"""The code that hosts run: the tree of this repository as it is on disk, named by its hash."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
import os
import pathlib
import subprocess
import tempfile
import zipfile

from launch.cloud.settings import UsageError

ROOT = pathlib.Path(__file__).resolve().parents[2]
_HOST = pathlib.Path(__file__).resolve().parents[1] / "host"
# Untracked files are taken only from these folders: others may hold private files.
FOLDERS = ("configs", "input_pipeline", "launch", "trainer")
_MAX_BYTES = 50 << 20


@dataclasses.dataclass(frozen=True)
class Bundle:
  """A tree of git.

  Attributes:
    tree: its hash, the name of the code.
    commit: HEAD.
    dirty: whether the tree differs from it.
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
  """Record the tree of all tracked files as they are on disk, and of new ones in the packages.

  Raises:
    UsageError: if this is not a clone.
  """
  commit = _git("rev-parse", "HEAD")
  with tempfile.TemporaryDirectory() as folder:
    index = f"{folder}/index"
    _git("read-tree", "HEAD", index=index)
    _git("add", "--update", index=index)
    _git("add", "--", *(name for name in FOLDERS if (ROOT / name).is_dir()), index=index)
    tree = _git("write-tree", index=index)
  return Bundle(tree[:12], commit, tree != _git("rev-parse", "HEAD^{tree}"))


def holds(bundle: Bundle, path: str) -> bool:
  """Whether a file is in the tree."""
  return path in _git("ls-tree", "-r", "--name-only", bundle.tree, "--", path).splitlines()


def pack(bundle: Bundle, folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
  """Write the archive of a tree, and its difference to the commit, into a folder.

  Raises:
    UsageError: if it is too large to be code.
  """
  archive, diff = folder / f"code-{bundle.tree}.tar.gz", folder / f"dirty-{bundle.tree}.diff"
  _git("archive", "--format=tar.gz", f"--output={archive}", bundle.tree)
  if archive.stat().st_size > _MAX_BYTES:
    raise UsageError(
      f"The archive of the code has {archive.stat().st_size >> 20} MiB; keep data out of git and "
      f"out of {', '.join(FOLDERS)} (.gitignore)."
    )
  _git("diff", "--binary", f"--output={diff}", bundle.commit, bundle.tree)
  return archive, diff


def pack_agent(folder: pathlib.Path) -> pathlib.Path:
  """Write launch/host as one file that Python runs; its name holds its hash."""
  path = folder / agent_name()
  path.write_bytes(agent())
  return path


def agent_name() -> str:
  """Returns the name of the agent in the bucket and on hosts."""
  return f"agent-{agent_sha()[:12]}.pyz"


def agent_sha() -> str:
  """Returns the SHA-256 of the agent."""
  return hashlib.sha256(agent()).hexdigest()


@functools.cache
def agent() -> bytes:
  """Returns a zip file of launch/host, the same bytes on every machine."""
  files = {path.relative_to(ROOT).as_posix(): path.read_bytes() for path in _HOST.glob("*.py")}
  files["launch/__init__.py"] = b""
  files["__main__.py"] = b"from launch.host.__main__ import main\nmain()\n"
  buffer = io.BytesIO()
  with zipfile.ZipFile(buffer, "w") as archive:
    for name in sorted(files):
      archive.writestr(zipfile.ZipInfo(name), files[name])
  return buffer.getvalue()
