"""Every field of every recipe as text, one file a recipe: a change of a default shows in the diff.

python -m tests.configs.golden     # writes the files anew
"""

import pathlib

from configs import recipes
from trainer import config as config_lib

FOLDER = pathlib.Path(__file__).parent / "golden"


def path(name: str) -> pathlib.Path:
  return FOLDER / f"{name.replace(':', '.')}.txt"


def text(name: str) -> str:
  """Return a line for each field of a recipe."""
  fields = config_lib.flatten(recipes.load(name))
  return "".join(f"{field} = {fields[field]!r}\n" for field in sorted(fields))


def main() -> None:
  for old in FOLDER.glob("*.txt"):
    old.unlink()
  for name in recipes.names():
    path(name).write_text(text(name))


if __name__ == "__main__":
  main()
