"""Parquet and TFDS as people report them, each with its right answer by every way in."""

import json

import pytest

from input_pipeline import records, sources
from input_pipeline.errors import DataError
from input_pipeline.sources import catalog
from input_pipeline.tools import inspect
from tests.input_pipeline.conftest import data_config, failure, tfds_folder, write_shard
from tests.input_pipeline.ways import all_ways, by_prepare, by_training, picture, right

datasets = pytest.importorskip("datasets", reason="the extra [hf] is not installed")
pq = pytest.importorskip("pyarrow.parquet", reason="the extra [hf] is not installed")

PETS = ("cat", "dog")
NAMED = datasets.ClassLabel(names=list(PETS))
INTEGER = datasets.Value("int64")
ROWS = [{"image": {"bytes": picture(PETS[i % 2]), "path": None}, "label": i % 2} for i in range(8)]
BOTH = {split: {"cat": 4, "dog": 4} for split in ("train", "val")}
SPLITS = ("train", "validation")


def write(folder, name, rows=ROWS, label=NAMED, features=None, **options):
  """Write a parquet file; columns that are not described are images."""
  (folder / name).parent.mkdir(parents=True, exist_ok=True)
  described = datasets.Features(
    {key: (features or {}).get(key, datasets.Image()) for key in rows[0]}
    | ({"label": label} if "label" in rows[0] else {})
  )
  columns = {key: [row[key] for row in rows] for key in rows[0]}
  table = datasets.Dataset.from_dict(columns, features=described).data.table
  pq.write_table(table, folder / name, **options)
  return folder


def both(folder, rows=ROWS, label=NAMED, **options):
  for split in SPLITS:
    write(folder, f"{split}-00000-of-00001.parquet", rows, label, **options)
  return folder


def relabelled(change):
  return [row | {"label": change(row["label"])} for row in ROWS]


def check(tmp_path, wanted, flags=(), name="set", **fields):
  path = f"hf:{tmp_path / name}"
  all_ways(tmp_path / "out", path, ("--from", path, *flags), wanted, **fields)


@pytest.mark.parametrize("name", ["set", "a::b #c"])
def test_plain_and_with_hashes_and_junk(name, tmp_path):
  folder = both(tmp_path / name)
  (folder / "._train-00000-of-00001.parquet").write_bytes(b"\0\5\x16\7")
  (folder / "README.md").write_text("x")
  (folder / "train-00000-of-00001.parquet").rename(
    folder / f"train-00000-of-00001-{'0123456789abcdef'}.parquet"
  )
  check(tmp_path, BOTH, name=name)
  left_out = json.loads((tmp_path / "out" / "left_out.json").read_text())
  assert left_out == {"no_parquet": ["README.md"], "system": ["._train-00000-of-00001.parquet"]}


def test_splits_and_files_that_number_the_classes_differently(tmp_path):
  flipped = datasets.ClassLabel(names=["dog", "cat"])
  turned = relabelled(lambda label: 1 - label)
  folder = both(tmp_path / "set")
  write(folder, "validation-00000-of-00001.parquet", turned, flipped)
  check(tmp_path, BOTH)
  write(folder, "train-00000-of-00001.parquet").joinpath("train-00000-of-00001.parquet").rename(
    folder / "train-00000-of-00002.parquet"
  )
  write(folder, "train-00001-of-00002.parquet", turned, flipped)
  made = by_prepare(tmp_path / "two", "--from", f"hf:{folder}", "--shards", "2")
  assert made == {"train": right(cat=8, dog=8), "val": right(cat=4, dog=4)}
  source = sources.open_source(data_config(f"hf:{folder}"), "train", 2)
  assert "1 files number the classes otherwise: labels are mapped by name" in source.notes
  half = source.subset([0, 1, 8, 9])
  found = [record for group in half.row_groups for record in half.read(group)]
  assert [(r.label, r.image == picture(PETS[r.label])) for r in found] == [(0, True), (1, True)] * 2
  other = datasets.ClassLabel(names=["cat", "wolf"])
  write(folder, "validation-00000-of-00001.parquet", turned, other)
  assert "has the class wolf, which other files" in by_training(f"hf:{folder}", "val")
  write(folder, "validation-00000-of-00001.parquet", turned, INTEGER)
  assert "does not name the classes of its column label" in by_training(f"hf:{folder}", "val")


@pytest.mark.parametrize(
  ("change", "label", "names"),
  [
    (lambda i: PETS[i], datasets.Value("string"), {"cat": "cat", "dog": "dog"}),
    (bool, datasets.Value("bool"), {"cat": "False", "dog": "True"}),
    (str, datasets.Value("string"), {"cat": "0", "dog": "1"}),
  ],
)
def test_labels_that_are_words(change, label, names, tmp_path):
  path = f"hf:{both(tmp_path / 'set', relabelled(change), label)}"
  wanted = {(names[name], name): 4 for name in PETS}
  assert by_prepare(tmp_path / "out", "--from", path) == {"train": wanted, "val": wanted}
  for split in ("train", "val"):
    assert by_training(path, split, 2) == wanted


def test_a_word_that_training_lacks(tmp_path):
  folder = both(tmp_path / "set", relabelled(lambda i: PETS[i]), datasets.Value("string"))
  odd = relabelled(lambda i: ("cat", "wolf")[i])
  write(folder, "validation-00000-of-00001.parquet", odd, datasets.Value("string"))
  assert "the label is 'wolf', but there are 2 classes" in by_training(f"hf:{folder}", "val")


def test_integers_without_names(tmp_path, capsys):
  path = f"hf:{both(tmp_path / 'set', ROWS, INTEGER)}"
  message = failure(capsys, "--out", tmp_path / "x", "--from", path)
  assert "their number is unknown, though the labels are 0 to 1" in message
  wanted = {(str(i), name): 4 for i, name in enumerate(PETS)}
  made = by_prepare(tmp_path / "out", "--from", path, "--classes", "2")
  assert made == {"train": wanted, "val": wanted}
  assert by_training(path, "val", 2) == wanted
  assert "describe --from" in failure(capsys, "--out", tmp_path / "x", "--digits", "--classes", "2")


@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize(
  ("rows", "says"),
  [
    (relabelled(lambda i: i + 1), "subtract 1 from each"),
    (relabelled(lambda i: -1), "all labels are -1, which stands for none"),
    ([*ROWS, ROWS[0] | {"label": -1}], "a label is -1, but there are 2 classes"),
    ([*ROWS, ROWS[0] | {"label": 7}], "a label is 7, but there are 2 classes; give config.model"),
    ([*ROWS, ROWS[0] | {"label": None}], "the label of 1 rows is null"),
  ],
)
def test_labels_are_checked_at_the_start(rows, says, statistics, tmp_path):
  path = f"hf:{both(tmp_path / 'set', rows, INTEGER, write_statistics=statistics)}"
  for split in ("train", "val"):
    with pytest.raises(DataError, match=says):
      sources.open_source(data_config(path), split, 2)
  made = by_prepare(tmp_path / "out", "--from", path, "--classes", "2")
  assert isinstance(made, str) and says in made


def test_a_test_split_without_labels_is_left_out_with_a_word(tmp_path, capsys):
  folder = both(tmp_path / "set")
  write(folder, "test-00000-of-00001.parquet", relabelled(lambda i: -1))
  check(tmp_path, BOTH)
  flags = ("--from", f"hf:{folder}", "--out", tmp_path / "x")
  assert "all labels are -1" in failure(capsys, *flags, "--split", "val=test")
  write(folder, "test-00000-of-00001.parquet")
  assert by_prepare(tmp_path / "y", *flags[:2])["test"] == right(cat=4, dog=4)


@pytest.mark.parametrize(
  ("label", "change", "says"),
  [
    (datasets.Value("float32"), float, "label is float32, which cannot be labels"),
    (datasets.List(NAMED), lambda i: [i], "label is a list, several to an image"),
  ],
)
def test_columns_that_are_no_labels(label, change, says, tmp_path):
  both(tmp_path / "set", relabelled(change), label)
  check(tmp_path, says)


def test_columns_are_chosen_by_a_field(tmp_path):
  rows = [{"img": r["image"], "fine": r["label"], "coarse": 0} for r in ROWS]
  features = {"fine": NAMED, "coarse": datasets.ClassLabel(names=["pet"])}
  both(tmp_path / "set", rows, features=features)
  check(tmp_path, "choose fine or coarse with config.data.label_column")
  check(tmp_path, BOTH, ("--label-column", "fine"), label_column="fine")
  path = f"hf:{tmp_path / 'set'}"
  coarse = by_training(path, "train", label_column="coarse", allow="one_class")
  assert coarse.keys() == {("pet", name) for name in PETS}
  assert "has one class, pet" in by_training(path, "train", label_column="coarse")
  for fields, says in (
    ({"label_column": "none"}, "has no column none, only img, fine, coarse"),
    ({"label_column": "img"}, "the column img cannot hold labels, it is Image"),
    ({"label_column": "fine", "image_column": "coarse"}, "cannot hold images, it is ClassLabel"),
  ):
    assert says in by_training(path, "train", **fields)


def test_two_columns_of_images(tmp_path):
  both(tmp_path / "set", [{"mask": {"bytes": picture("fox"), "path": None}} | r for r in ROWS])
  check(tmp_path, BOTH)
  path = f"hf:{tmp_path / 'set'}"
  source = sources.open_source(data_config(path), "train", 2)
  assert "the images are the column image, not mask" in source.notes
  assert by_training(path, "train", image_column="mask") == {(n, "fox"): 4 for n in PETS}


def test_a_label_inside_a_column_is_none(tmp_path):
  rows = [{"image": r["image"], "objects": {"label": r["label"]}} for r in ROWS]
  both(tmp_path / "set", rows, features={"objects": {"label": NAMED}})
  check(tmp_path, "it has image, objects: none of them can hold labels")


def test_images_that_are_not_in_the_files(tmp_path):
  rows = [{"image": {"bytes": None, "path": f"{i}.jpg"}, "label": i % 2} for i in range(8)]
  both(tmp_path / "set", rows)
  check(tmp_path, "holds the paths of images and not the images")


def test_webp_in_parquet(tmp_path):
  rows = [
    {"image": {"bytes": picture(PETS[i % 2], "WEBP"), "path": None}, "label": i % 2}
    for i in range(8)
  ]
  both(tmp_path / "set", rows)
  check(tmp_path, BOTH)


@pytest.mark.parametrize(
  ("names", "says"),
  [
    (["a/train-00000-of-00001", "b/train-00000-of-00001", "val"], "holds several data sets: /a/"),
    (["train-00000-of-00003", "train-00002-of-00003", "val"], "1 of the 3 files of train are miss"),
    (["my_train", "my_val_of_training_data"], "holds the words of several splits, train and val"),
    (["train", "val-00000-of-00001", "validation"], "which mean the same; rename the files of one"),
  ],
)
def test_names_of_files_that_are_not_clear(names, says, tmp_path):
  for name in names:
    write(tmp_path / "set", f"{name}.parquet")
  check(tmp_path, says)


def test_names_of_files(tmp_path):
  for name in ("data/train/0", "data/train/1", "data/Valid/0"):
    write(tmp_path / "set", f"{name}.parquet")
  check(tmp_path, {"train": {"cat": 8, "dog": 8}, "val": {"cat": 4, "dog": 4}})


def test_files_of_no_split_and_missing_ones_that_are_allowed(tmp_path, capsys):
  folder = tmp_path / "set"
  for name in ("data/part-0", "data/part-1", "test"):
    write(folder, f"{name}.parquet")
  flags = ("--from", f"hf:{folder}")
  assert "has the split other, which is none of" in failure(capsys, "--out", tmp_path / "x", *flags)
  made = by_prepare(tmp_path / "out", *flags, "--split", "train=other", "--split", "val=test")
  assert made == {"train": right(cat=8, dog=8), "val": right(cat=4, dog=4)}
  for name in ("train-00000-of-00002", "val"):
    write(tmp_path / "gap", f"{name}.parquet")
  path = f"hf:{tmp_path / 'gap'}"
  assert by_training(path, "train", allow="missing_file") == right(cat=4, dog=4)
  made = by_prepare(tmp_path / "y", "--from", path, "--allow", "missing_file")
  assert made["train"] == right(cat=4, dog=4)


def described(root, **features):
  """Describe the features of a folder of TFDS anew."""
  kinds = {"Image": {}, "ClassLabel": {"classLabel": {"numClasses": "2"}}}
  found = {
    name: {"pythonClassName": f"tfds.{kind}"} | kinds.get(kind, {})
    for name, kind in features.items()
  }
  (root / "features.json").write_text(json.dumps({"featuresDict": {"features": found}}))
  return root


@pytest.mark.parametrize(
  ("text", "names"),
  [
    ("x\ny\n", ("x", "y")),
    ("x\r\ny\r\n", ("x", "y")),
    ("x\ny", ("x", "y")),
    ("\ny\n", ("", "y")),
    ("x\n\n", ("x", "")),
    ("x\x85 z\ny\u2028\n", ("x\x85 z", "y\u2028")),
  ],
)
def test_the_classes_of_tfds_are_one_a_line(text, names, tmp_path):
  root = tfds_folder(tmp_path / "tfds", labels=())
  (root / "label.labels.txt").write_text(text, encoding="utf-8", newline="")
  assert sources.open_source(data_config(root), "train", 2).class_names == names


def test_features_of_tfds(tmp_path):
  root = tfds_folder(tmp_path / "tfds")
  (root / "label.labels.txt").write_text("x\n")
  with pytest.raises(DataError, match=r"has 1 lines, but features.json describes 2 classes"):
    sources.open_source(data_config(root), "train", 2)
  described(root, image="Image", fine="ClassLabel", coarse="ClassLabel")
  with pytest.raises(DataError, match=r"describes coarse and fine; choose one with .*label_column"):
    sources.open_source(data_config(root), "train", 2)
  with pytest.raises(DataError, match=r"has no feature 'fine', only file_name, image, label"):
    sources.open_source(data_config(root, label_column="fine"), "train", 2)
  described(root, image="Image", fine="ClassLabel")  # and not the label that the records have
  (root / "label.labels.txt").unlink()
  source = sources.open_source(data_config(root, label_column="label"), "train", 2)
  assert source.class_names == ("0", "1") and source[1].label == 1


def test_another_name_of_the_label_in_tfds(tmp_path):
  root = tfds_folder(tmp_path / "tfds", labels=())
  described(root, image="Image", label="ClassLabel")
  split = catalog.read(catalog.LocalFolder(str(root)), "train")
  assert split.keys == ("image", "label") and split.class_names == ["0", "1"]
  described(root, picture="Image", kind="ClassLabel")
  (root / "kind.labels.txt").write_text("a\nb\n")
  split = catalog.read(catalog.LocalFolder(str(root)), "train")
  assert split.keys == ("picture", "kind") and split.class_names == ["a", "b"]
  assert "the label of a record is its feature kind" in split.notes


def test_unlabelled_tfds_is_said_at_the_start(tmp_path):
  root = tmp_path / "tfds"
  tfds_folder(root)
  shard = root / "imagenet2012-train.array_record-00000-of-00002"
  write_shard(shard, [records.Record(picture("cat"), -1, f"{i}") for i in range(3)])
  assert "has label -1, but there are 2 classes, which stands for no label" in by_training(
    root, "train"
  )
  labels = (-1, 0, 1)
  write_shard(shard, [records.Record(picture("cat"), i, f"{i}") for i in labels])
  assert len(sources.open_source(data_config(root), "train", 2)) == 5


def test_a_picture_of_parquet(tmp_path):
  folder = both(tmp_path / "set")
  flags = [f"--data=hf:{folder}", f"--sheet={tmp_path / 'sheet.png'}", "--images=4"]
  assert inspect.main(["inspect", *flags]) == 0
  assert (tmp_path / "sheet.png").stat().st_size > 1000
