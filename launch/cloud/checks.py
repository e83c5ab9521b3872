"""Mistakes that can be seen before anything is bought: types, files, secrets, flags, the config."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
import difflib
import os
import pathlib
import re
import subprocess

from launch.cloud import bundle
from launch.cloud.settings import UsageError

_V5E = (1, 4, 8, 16, 32, 64, 128, 256)
# Sizes of the Cloud TPU API; v4 and v5p are any torus of 4 chips or more.
_SIZES: dict[str, Sequence[int]] = {
  "v2": (8, 32, 128, 256, 512),
  "v3": (8, 32, 64, 128, 256, 512, 1024, 2048),
  "v4": range(8, 8193, 8),
  "v5litepod": _V5E,
  "v5p": range(8, 12289, 8),
  "v6e": _V5E,
}
_OTHER_NAMES = {"v5e": "v5litepod", "v5lite": "v5litepod", "v6": "v6e", "trillium": "v6e"}
_KEYS = re.compile(r"[0-9a-fA-F]{32,}|(hf_|ghp_|github_pat_|sk-|AKIA|AIza|ya29\.|xox).{8,}")
_TRAINER = ("--config", "--workdir", "--mode")
_CHECK_SECONDS = 120.0


def accelerator_type(text: str) -> str:
  """Returns a type that the Cloud TPU API serves, or of a kind that is not known here.

  Raises:
    UsageError: for one that does not exist, with the nearest that does.
  """
  kind, _, size = text.rpartition("-")
  if not re.fullmatch(r"[a-z0-9]+-\d+", text):
    raise UsageError(f"--type {text!r} is not an accelerator type such as v5litepod-64.")
  if kind in _OTHER_NAMES:
    raise UsageError(f"--type {text}: the API names it {_OTHER_NAMES[kind]}-{size}.")
  if re.fullmatch(r"(tpu|v)?[789]x?|ironwood", kind):
    raise UsageError(
      f"--type {text}: the Cloud TPU API serves v2 to v6e; TPU7x and later are in GKE only."
    )
  sizes = _SIZES.get(kind)
  if sizes and int(size) not in sizes:
    nearest = min(sizes, key=lambda one: abs(one - int(size)))
    raise UsageError(f"--type {text} does not exist; the nearest is {kind}-{nearest}.")
  return text


def env_file(path: str) -> str:
  """Returns the absolute path of a file of secrets that hosts can read line by line.

  Raises:
    UsageError: naming the line that is wrong, never its value.
  """
  if not os.access(path, os.R_OK):
    raise UsageError(f"--env-file {path} cannot be read.")
  if os.stat(path).st_mode & 0o077:
    raise UsageError(f"--env-file {path} is readable by others; chmod 600 it.")
  for number, line in enumerate(pathlib.Path(path).read_text().splitlines(), 1):
    name = line.partition("=")[0]
    where = f"--env-file {path}, line {number}"
    if not line.strip() or line.startswith("#"):
      continue
    if re.match(r"\s*export\s", line):
      raise UsageError(f"{where}: write NAME=VALUE without export; no shell reads it.")
    if "=" not in line or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
      raise UsageError(f"{where} is not NAME=VALUE.")
  return os.path.abspath(path)


def secret(text: str) -> tuple[str, str]:
  """Returns (variable, name in Secret Manager) of NAME=SECRET.

  Raises:
    UsageError: if it is not that; the text is not repeated, since it may be the secret itself.
  """
  name, equals, value = text.partition("=")
  good = (
    equals
    and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name)
    and re.fullmatch(r"[A-Za-z0-9_-]+", value)
  )
  if not good or _KEYS.fullmatch(value):
    raise UsageError(
      f"--secret {name if equals else '...'}=...: give NAME=SECRET, the name of a variable and of "
      "a secret in Secret Manager, never its value."
    )
  return name, value


def trainer_flags(words: Iterable[str], options: Iterable[str]) -> None:
  """Refuse flags that are neither of `up` nor of the trainer.

  Args:
    words: flags that are not options of `up`, without those after --.
    options: those of `up`, for a suggestion.

  Raises:
    UsageError: naming the first one.
  """
  for word in words:
    name = word.partition("=")[0]
    if not name.startswith("--") or name in _TRAINER or name.startswith("--config."):
      continue
    near = difflib.get_close_matches(name, [*options, *_TRAINER], n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UsageError(
      f"launch/tpu up has no option {name}{hint} Flags for the trainer alone go after --."
      if near
      else f"launch/tpu up has no option {name}; flags for the trainer alone go after --."
    )


def config_of(argv: Sequence[str]) -> str:
  """Returns the path of the config file in the flags of the trainer, below the root of the code."""
  word = next(word for word in argv if word.startswith("--config="))
  return word[len("--config=") :].split(":")[0]


def shipped(tree: bundle.Bundle, argv: Sequence[str]) -> None:
  """Refuse a config file that is not in the archive that hosts get.

  Raises:
    UsageError: saying how to get it there.
  """
  path = config_of(argv)
  if not bundle.holds(tree, path):
    raise UsageError(
      f"{path} is not in the archive that hosts get: it is ignored by git, in a submodule, or new "
      f"outside {', '.join(bundle.FOLDERS)}; git add -f {path} takes it along."
    )


def trainer_accepts(argv: Sequence[str]) -> str | None:
  """Have the trainer check its config, in the environment of this clone.

  Returns:
    A sentence if that was not possible, else None.

  Raises:
    UsageError: with the sentence of the trainer.
  """
  python = bundle.ROOT / ".venv" / "bin" / "python"
  if not python.exists():
    return f"The config was not checked: there is no {python}."
  words = [word for word in argv if word.startswith("--config")]
  environment = dict(os.environ, JAX_PLATFORMS="cpu", PYTHONPATH=str(bundle.ROOT))
  try:
    done = subprocess.run(
      [python, "-m", "launch.check_config", *words],
      cwd=bundle.ROOT,
      env=environment,
      stdin=subprocess.DEVNULL,
      capture_output=True,
      text=True,
      timeout=_CHECK_SECONDS,
      check=False,
    )
  except (OSError, subprocess.TimeoutExpired) as error:
    return f"The config was not checked: {error}"
  lines = done.stderr.strip().splitlines()
  if done.returncode == 2 and lines:
    raise UsageError(lines[-1])
  return f"The config was not checked: {(lines or ['?'])[-1]}" if done.returncode else None
