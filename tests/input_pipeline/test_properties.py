"""What is read from outside: accepted with every file accounted for, or refused in a sentence."""

import collections
import io
import json
import os
import shutil
import tarfile

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
import pytest

from input_pipeline import records, sources
from input_pipeline.errors import DataError
from input_pipeline.prepare import tars
from input_pipeline.sources import catalog, layout, local, parquet_files, splits
from tests.input_pipeline.conftest import data_config

quick = settings(
  max_examples=150,
  deadline=None,
  derandomize=True,
  suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
few = settings(quick, max_examples=30)

# Names as people have them, and any others.
ODD = st.text(
  st.characters(blacklist_characters="/\0", blacklist_categories=["Cs"]), min_size=1, max_size=6
).filter(lambda name: name not in (".", ".."))
NAMES = st.one_of(
  st.sampled_from(
    [
      *(
        "train",
        "val",
        "valid",
        "Test",
        "training",
        "validation",
        "cat",
        "dog",
        "10",
        "9",
        "images",
      ),
      *(".git", "__MACOSX", "@eaDir", "caf\u00e9", "cafe\u0301", "a b#?", "x.jpg"),
    ]
  ),
  ODD,
)
ENDINGS = st.sampled_from([".jpg", ".JPEG", ".png", ".webp", ".tif", ".txt", ".cls", ".tar", ""])
FILES = st.lists(st.tuples(st.lists(NAMES, max_size=4), NAMES, ENDINGS), min_size=1, max_size=12)
# Splits and classes as they should be, to which the files above are added.
TIDY = st.dictionaries(
  st.tuples(st.sampled_from(["train", "val", "test"]), st.sampled_from(["cat", "dog", "fox"])),
  st.integers(1, 3),
  max_size=6,
)
KINDS = st.sampled_from([layout.FILE] * 8 + ["dangling", "special"])


def refused(error):
  """Assert that a refusal is a sentence that can be acted on."""
  text = str(error)
  assert text.isprintable() and text.endswith((".", '."')) and len(text) > 20, text
  return text


def paths(tidy, files):
  """Return the paths of files, none of which lies in another."""
  found = [f"{s}/{c}/{i}.jpg" for (s, c), n in tidy.items() for i in range(n)]
  found += ["/".join([*folders, name + ending]) for folders, name, ending in files]
  taken, folders = set(), set()
  for path in found:
    above = {path[:i] for i, c in enumerate(path) if c == "/"}
    if path not in folders and path not in taken and not above & taken:
      taken.add(path)
      folders |= above
  return sorted(taken)


def assert_accounted(contents, expected):
  """Assert that each file is one image of one class, or left out under one reason."""
  images = [
    image.entry.path
    for classes in contents.splits.values()
    for found in classes.values()
    for image in found
  ]
  left_out = [path for found in contents.left_out.values() for path in found]
  assert collections.Counter(images + left_out) == collections.Counter(expected)
  assert all(layout.is_image(path) for path in images)
  assert contents.left_out.keys() <= layout.REASONS.keys()
  for name, classes in contents.splits.items():
    for each, found in classes.items():
      for image in found:
        assert f"{contents.folders[name]}{image.name}" == image.entry.path
        assert layout._nfc(image.name.partition("/")[0]) == each


@quick
@given(TIDY, FILES, st.data())
def test_any_listing(tidy, files, data):
  names = paths(tidy, files)
  kinds = data.draw(st.lists(KINDS, min_size=len(names), max_size=len(names)))
  entries = [layout.Entry(name, kind) for name, kind in zip(names, kinds)]
  allow = data.draw(st.sampled_from([(), ("deeper",), ("empty_class", "deeper")]))
  try:
    contents = layout.arrange(entries, "/data", allow)
  except DataError as e:
    refused(e)
    return
  assert_accounted(contents, names)
  meanings = [splits.canonical(name) for name in contents.splits]
  assert len(set(meanings)) == len(meanings)
  try:
    first = sorted(contents.splits, key=lambda name: splits.canonical(name) != "train")
    classes = layout.number(contents, first, allow)
  except DataError as e:
    refused(e)
    return
  assert sorted(classes) == sorted(contents.splits[first[0]])
  for name in first:
    assert contents.splits[name].keys() <= set(classes)
    if "empty_class" not in allow:
      assert all(contents.splits[name].get(each) for each in classes)


@few
@given(TIDY, FILES)
def test_a_folder_and_its_tar_have_one_answer(tmp_path, tidy, files):
  root = tmp_path / "x"
  shutil.rmtree(root, ignore_errors=True)
  names = [n for n in paths(tidy, files) if all(len(part.encode()) < 200 for part in n.split("/"))]
  root.mkdir()
  with tarfile.open(tmp_path / "x.tar", "w") as archive:
    for name in names:
      for depth in range(1, name.count("/") + 1):
        member = tarfile.TarInfo("/".join(name.split("/")[:depth]))
        member.type = tarfile.DIRTYPE
        archive.addfile(member)
      os.makedirs(os.path.dirname(root / name), exist_ok=True)
      (root / name).write_bytes(b"x")
      member = tarfile.TarInfo(name)
      member.size = 1
      archive.addfile(member, io.BytesIO(b"x"))

  def answer(entries):
    try:
      return layout.arrange(entries, "here")
    except DataError as e:
      return refused(e)

  walked = answer(local.walk(str(root)))
  listed = answer(tars.list_tar(str(tmp_path / "x.tar")))
  if isinstance(walked, str) or isinstance(listed, str):
    # What is in a system folder is listed in a tar alone.
    assert str(walked).partition(" (left out")[0] == str(listed).partition(" (left out")[0]
    return
  listed.left_out["system"] = [p for p in listed.left_out.get("system", ()) if p in names]
  assert_accounted(listed, names)
  for name, classes in listed.splits.items():
    assert {c: [i.name for i in found] for c, found in classes.items()} == {
      c: [i.name for i in found] for c, found in walked.splits[name].items()
    }


@quick
@given(st.binary(max_size=2000), st.integers(0, 3000), st.integers(0, 12))
def test_a_damaged_tar(tmp_path, noise, at, cut):
  buffer = io.BytesIO()
  with tarfile.open(fileobj=buffer, mode="w") as archive:
    for name in ("train/cat/0.jpg", "train/dog/0.jpg"):
      member = tarfile.TarInfo(name)
      member.size = 300
      archive.addfile(member, io.BytesIO(b"x" * 300))
  data = bytearray(buffer.getvalue())
  data[at : at + len(noise)] = noise
  path = tmp_path / "x.tar"
  path.write_bytes(bytes(data[: len(data) - 700 * cut]))
  try:
    found = tars.list_tar(str(path))
  except DataError as e:
    refused(e)
    return
  assert all(entry.offset + entry.size <= path.stat().st_size for entry in found)


JSON = st.recursive(
  st.none() | st.booleans() | st.integers(-5, 5) | st.floats(allow_nan=False) | st.text(max_size=4),
  lambda inner: (
    st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
  ),
  max_leaves=6,
)


def places(value, here=()):
  """Yield the path of every value in some JSON."""
  yield here
  if isinstance(value, dict | list):
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
      yield from places(inner, (*here, key))


def put(value, place, new):
  """Return JSON with another value at a place; None removes it."""
  if not place:
    return new
  *above, last = place
  parent = value
  for key in above:
    parent = parent[key]
  if new is None and isinstance(parent, dict):
    del parent[last]
  else:
    parent[last] = new
  return value


@pytest.fixture(scope="module")
def manifest(shards):
  return json.loads((shards / records.MANIFEST).read_text())


class Files:
  """A folder of shards with files of JSON of its own."""

  def __init__(self, shards, **files):
    self._sizes = {f.name: f.stat().st_size for f in shards.iterdir() if f.is_file()}
    self._files = files

  def path_of(self, name):
    return f"/data/{name}"

  def read_small(self, name):
    return self._files.get(name.partition(".")[0])

  def sizes(self):
    return self._sizes


@quick
@given(st.data())
def test_any_manifest(shards, manifest, data):
  wrong = json.loads(json.dumps(manifest))
  for _ in range(data.draw(st.integers(1, 2))):
    wrong = put(wrong, data.draw(st.sampled_from(list(places(wrong)))), data.draw(JSON))
  try:
    split = catalog.read(Files(shards, manifest=json.dumps(wrong).encode()), "train")
  except DataError as e:
    refused(e)
    return
  assert split.class_names and all(isinstance(name, str) for name in split.class_names)
  assert all(isinstance(s.count, int) and s.count > 0 for s in split.shards)
  if split.class_counts is not None:
    assert len(split.class_counts) == len(split.class_names)


@quick
@given(st.data())
def test_any_description_of_tfds(shards, data):
  lengths = {"name": "train", "shardLengths": ["3", "2"]}
  info = {"name": "x", "fileFormat": "array_record", "splits": [lengths]}
  label = {"pythonClassName": "tfds.ClassLabel", "classLabel": {"numClasses": "2"}}
  features = {
    "featuresDict": {"features": {"image": {"pythonClassName": "a.Image"}, "label": label}}
  }
  parts = {"dataset_info": info, "features": features}
  name = data.draw(st.sampled_from(list(parts)))
  parts[name] = put(
    parts[name], data.draw(st.sampled_from(list(places(parts[name])))), data.draw(JSON)
  )
  files = {name: json.dumps(part).encode() for name, part in parts.items()}
  if data.draw(st.booleans()):
    files["label"] = data.draw(st.binary(max_size=8))
  folder = Files(shards, **files)
  folder.sizes = lambda: None
  try:
    split = catalog.read(folder, "train")
  except DataError as e:
    refused(e)
    return
  assert split.class_names and all(s.count > 0 for s in split.shards)


@quick
@given(st.lists(st.lists(NAMES, min_size=1, max_size=3), min_size=1, max_size=6, unique_by=tuple))
def test_the_splits_of_parquet_by_their_names(names):
  for parts in names:
    path = "/" + "/".join(parts) + ".parquet"
    try:
      found = parquet_files.split_of(path)
    except DataError as e:
      assert "the words of several splits" in refused(e)
      continue
    assert found and found != ".parquet"


@few
@given(st.data())
def test_any_schema_of_parquet(tmp_path, data):
  datasets = pytest.importorskip("datasets", reason="the extra [hf] is not installed")
  pq = pytest.importorskip("pyarrow.parquet", reason="the extra [hf] is not installed")
  values = {
    "image": (datasets.Image(), lambda i: {"bytes": b"x", "path": None}),
    "binary": (datasets.Value("binary"), lambda i: b"x"),
    "class": (datasets.ClassLabel(names=["a", "b"]), lambda i: i % 2),
    "other": (datasets.ClassLabel(names=["b", "a"]), lambda i: i % 2),
    "int": (datasets.Value("int32"), lambda i: i % 3),
    "string": (datasets.Value("string"), lambda i: "ab"[i % 2]),
    "bool": (datasets.Value("bool"), lambda i: i % 2 == 0),
    "float": (datasets.Value("float32"), float),
    "list": (datasets.List(datasets.Value("int32")), lambda i: [i]),
    "null": (datasets.Value("int64"), lambda i: None),
  }
  columns = st.dictionaries(
    st.sampled_from(["image", "label", "x", "y"]), st.sampled_from(list(values)), min_size=1
  )
  shutil.rmtree(tmp_path / "set", ignore_errors=True)
  (tmp_path / "set").mkdir()
  used = {}
  for split in ("train", "val"):
    used[split] = (
      data.draw(columns) if split == "train" or data.draw(st.booleans()) else used["train"]
    )
    features = datasets.Features({n: values[kind][0] for n, kind in used[split].items()})
    made = {n: [values[kind][1](i) for i in range(4)] for n, kind in used[split].items()}
    table = datasets.Dataset.from_dict(made, features=features).data.table
    pq.write_table(table, tmp_path / "set" / f"{split}.parquet", row_group_size=3)
  fields = {
    name: data.draw(st.sampled_from(["", "", *used["train"], "none"]))
    for name in ("image_column", "label_column")
  }
  for split in ("train", "val"):
    config = data_config(f"hf:{tmp_path / 'set'}", **fields)
    try:
      source = sources.open_source(config, split, data.draw(st.sampled_from([2, 3])))
    except DataError as e:
      refused(e)
      continue
    found = [record for group in source.row_groups for record in source.read(group)]
    assert len(found) == len(source) == 4
    assert all(0 <= record.label < source.num_classes for record in found)
    label = used[split][fields["label_column"] or "label"] if "label" in used[split] else None
    if label in ("class", "other", "string"):
      words = [str(values[label][1](i)) for i in range(4)]
      if label != "string":
        words = [values[label][0].names[int(word)] for word in words]
      assert [source.class_names[record.label] for record in found] == words
