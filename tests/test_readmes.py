"""What the READMEs show exists: links, files, modules, fields, extras; what they show runs."""

import ast
import configparser
import importlib
import importlib.util
import pathlib
import re

import jax
import pytest

from configs import base, families
from tests.configs import golden
from tests.readme_tables import check_tests
from trainer import config as config_lib

ROOT = pathlib.Path(__file__).parents[1]
ROOMS = (
  *(".", "configs", "input_pipeline", "launch"),
  *("trainer", "trainer/models", "trainer/pod", "trainer/reporting"),
  *("trainer/sparse", "trainer/workdir"),
)
READMES = sorted(
  path.relative_to(ROOT) for folder in ROOMS for path in (ROOT / folder).glob("*.md")
)
SECTIONS = "distill|mesh|sharding|model|data|optimizer|eval|checkpoint|resume|pod|log"
each_readme = pytest.mark.parametrize("readme", READMES, ids=str)


def text_of(readme):
  return (ROOT / readme).read_text()


def exists(readme, path):
  """Whether a path is there, seen from the README or from the root; capitals stand for names."""
  placeholder = re.search(r"(^|/)[A-Z]+(\.py)?(/|$)", path)
  return placeholder or any((folder / path).exists() for folder in (ROOT, (ROOT / readme).parent))


def without_tables_of_fields(text):
  """The text without the output of `python -m configs --markdown`, which has a test of its own."""
  before, _, rest = text.partition("<!-- fields: begin -->")
  return before + rest.partition("<!-- fields: end -->")[2]


def python_blocks(readme):
  return re.findall(r"^```python\n(.*?)^```", text_of(readme), re.DOTALL | re.MULTILINE)


def anchors(text):
  headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
  return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_room_has_one():
  assert sum(path.name == "README.md" for path in READMES) == len(ROOMS)


def test_each_row_of_the_exit_codes_names_its_test():
  check_tests("trainer/README.md", "### Which failure gives which code", column=4, least=20)


@each_readme
def test_links_resolve(readme):
  links = re.findall(r"\]\(([^)]+)\)", text_of(readme))
  assert links
  for link in links:
    assert not re.match(r"\w+:", link), f"{link} leaves the repository"
    path, _, anchor = link.partition("#")
    target = (ROOT / readme).parent / path if path else ROOT / readme
    assert target.exists(), link
    if anchor:
      assert anchor in anchors(target.read_text()), link


@each_readme
def test_pictures_are_small(readme):
  for path in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text_of(readme)):
    assert ((ROOT / readme).parent / path).stat().st_size < 60_000, path


@each_readme
def test_files_and_folders_exist(readme):
  text = without_tables_of_fields(text_of(readme))
  own = ("my_run.py",)  # written by the reader
  files = re.findall(r"(?<![\w./-])[\w./-]+\.(?:py|sh|lock|cfg|toml)\b", text)
  folders = re.findall(
    r"(?<![\w./-])(?:configs|input_pipeline|trainer|launch|tests)/[\w./-]*", text
  )
  layout = re.findall(r"^    (?:.*   )?(\w+/)(?= )", text, re.MULTILINE)
  missing = {
    path
    for path in (*files, *(folder.rstrip(".") for folder in folders), *layout)
    if path not in own and not exists(readme, path)
  }
  assert not missing


@each_readme
def test_modules_exist(readme):
  for name in re.findall(r"python -m ([\w.]+)", text_of(readme)):
    spec = importlib.util.find_spec(name.rstrip("."))
    assert spec, name
    if spec.submodule_search_locations:
      assert importlib.util.find_spec(f"{name}.__main__"), name


@each_readme
def test_fields_exist(readme):
  text = text_of(readme)
  fields = {name for family in families.FAMILIES for name in base.all_fields(family)}
  named = re.findall(r"(?:--config\.)([a-z][\w.]*)", text)
  named += re.findall(rf"`((?:{SECTIONS})\.(?!py\b)\w+)", text)
  missing = {name for name in named if name not in fields and name != "field"}
  assert not missing


def test_tables_of_fields_are_current():
  assert golden.FIELDS.read_text() == golden.fields_page(), "python -m tests.configs.golden"


@each_readme
def test_extras_exist(readme):
  setup = configparser.ConfigParser()
  setup.read(ROOT / "setup.cfg")
  for extra in re.findall(r"pip install -e '\.\[(\w+)\]'", text_of(readme)):
    assert extra in setup["options.extras_require"]


@each_readme
def test_python_compiles_and_imports(readme):
  for block in python_blocks(readme):
    for node in ast.walk(ast.parse(block)):
      if isinstance(node, ast.ImportFrom):
        for alias in node.names:
          if not hasattr(importlib.import_module(node.module), alias.name):
            importlib.import_module(f"{node.module}.{alias.name}")


@pytest.mark.parametrize("readme", ["README.md", "configs/README.md"])
def test_config_is_valid(readme):
  (block,) = (block for block in python_blocks(readme) if "def get_config" in block)
  names = {}
  exec(block, names)
  config_lib.validate(names["get_config"]())


def test_model_is_built():
  (block,) = (block for block in python_blocks("README.md") if "models.create" in block)
  names = {}
  jax.eval_shape(lambda: exec(block, names))  # in a fraction of the time of its arithmetic
  assert names["logits"].shape == (2, 10)
