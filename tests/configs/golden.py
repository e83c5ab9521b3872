"""What is generated from the fields, so that a change of a default shows in the diff.

Every field of every recipe is a line of golden/RECIPE.txt, and of the families of a table in
configs/fields.md.

python -m tests.configs.golden     # writes all of it anew
"""

import pathlib

from configs import page, recipes
from trainer import config as config_lib

FOLDER = pathlib.Path(__file__).parent / "golden"
FIELDS = pathlib.Path(recipes.__file__).parent / "fields.md"
_BEGIN, _END = "<!-- fields: begin -->\n", "\n<!-- fields: end -->"


def path(name: str) -> pathlib.Path:
  return FOLDER / f"{name.replace(':', '.')}.txt"


def text(name: str) -> str:
  """Return a line for each field of a recipe."""
  fields = config_lib.flatten(recipes.load(name))
  return "".join(f"{field} = {fields[field]!r}\n" for field in sorted(fields))


def fields_page() -> str:
  """Return configs/fields.md with the tables of today."""
  before, _, rest = FIELDS.read_text().partition(_BEGIN)
  return before + _BEGIN + page.markdown() + _END + rest.partition(_END)[2]


def main() -> None:
  for old in FOLDER.glob("*.txt"):
    old.unlink()
  for name in recipes.names():
    path(name).write_text(text(name))
  FIELDS.write_text(fields_page())


if __name__ == "__main__":
  main()
