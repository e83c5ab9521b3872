"""Weights in and out of workdirs and files: bit for bit, by name, or refused in a sentence."""

import dataclasses
import hashlib
import io
import json

import jax
import ml_dtypes
import numpy as np
import pytest

from configs import base
from tests.trainer import tiny, torch_files
from tests.trainer.shared import call
from tests.trainer.weights_fuzz import Fuzz
from trainer import config as config_lib
from trainer import train
from trainer.errors import FAILED
from trainer.weights import __main__ as command
from trainer.weights import export, foreign, read, run_folder, safetensors, torch_file
from trainer.weights import net as net_lib
from trainer.weights.about import About
from trainer.weights.errors import WeightsError

CONFIG = tiny.__file__
NAMES = ["ant", "bee", "crane", "dhole", "emu", "fox"]


def main(*arguments):
  """Return the exit code of a verb, as in a process of its own."""
  return call(command.main, "trainer.weights", *arguments)


def run(capsys, *arguments):
  """Return exit code, output and errors of a verb."""
  code = main(*arguments)
  printed = capsys.readouterr()
  return code, printed.out, printed.err


def in_bytes(*parts):
  return np.frombuffer(b"".join(parts), np.uint8)


@pytest.fixture(scope="module")
def fuzz(tmp_path_factory):
  return Fuzz(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(scope="module")
def imported(fuzz, tmp_path_factory):
  """A file of torch.save, and the workdir that it was imported into."""
  folder = tmp_path_factory.mktemp("imported")
  (folder / "weights.pth").write_bytes(fuzz.file("zip"))
  (folder / "names.txt").write_text("\n".join(NAMES))
  code = main(
    *("import", folder / "weights.pth", f"--config={CONFIG}", f"--workdir={folder / 'run'}"),
    *(f"--classes={folder / 'names.txt'}", "--config.optimizer.ema_decay=0.9"),
    "--config.data.kind=synthetic",
  )
  assert code == 0
  return folder / "weights.pth", folder / "run"


ARRAYS = {
  "a.b": np.arange(6, dtype=np.float32).reshape(2, 3),
  "half": np.array([1.5, -2], np.float16),
  "wide": np.array([[1e-300]]),
  "count": np.array(7, np.int64),
}


class TestFormats:
  def test_safetensors(self):
    arrays = ARRAYS | {"brain": np.array([3.25, 1e30], ml_dtypes.bfloat16)}
    found, words = safetensors.decode(in_bytes(*safetensors.encode(arrays, {"classes": "é"})))
    assert words == {"classes": "é"}
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
      assert found[name].dtype == array.dtype
      np.testing.assert_array_equal(found[name], array, strict=True)

  @pytest.mark.parametrize("write", [torch_files.zipped, torch_files.legacy])
  def test_torch(self, write):
    found = torch_file.decode(in_bytes(write(ARRAYS)))
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
      np.testing.assert_array_equal(found[name], array, strict=True)

  def test_prefers_averages_unless_asked(self):
    inner = torch_files.state_dict(ARRAYS)[2:-1]  # without protocol and stop
    other = inner.replace(b"a.b", b"a.c")
    pickled = b"\x80\x02}(" + torch_files.text("state_dict") + inner
    pickled += torch_files.text("state_dict_ema") + other + b"u."
    data = in_bytes(torch_files.zipped(ARRAYS, pickled))
    assert "a.c" in torch_file.decode(data)
    assert "a.b" in torch_file.decode(data, averaged=False)


class TestRoundTrips:
  def test_import_export_import(self, imported, fuzz, tmp_path, capsys):
    file, workdir = imported
    out, again = tmp_path / "out.safetensors", tmp_path / "again"
    code, printed, _ = run(
      capsys, "export", workdir, "--format=safetensors", f"--out={out}", "--weights=raw"
    )
    assert code == 0
    assert (
      "the same top-5 on 16 of 16 images, largest relative difference of the logits 0" in printed
    )
    code, _, error = run(
      capsys,
      *("import", out, f"--config={CONFIG}", f"--workdir={again}", "--config.data.kind=synthetic"),
    )
    assert code == 0, error
    for other in (file, out, again):
      assert run(capsys, "diff", workdir, other)[:2] == (0, "all 47 leaves are equal\n")
    net, leaves, about = run_folder.read(str(again), averaged=True)
    for leaf, array in fuzz.leaves.items():
      np.testing.assert_array_equal(leaves[leaf], array, strict=True)
    assert about.classes == tuple(NAMES)  # by way of workdir, file and workdir
    assert json.loads((again / "classes.json").read_text()) == {"classes": NAMES}
    assert (about.step, about.weights, net.config.model.width) == (0, "raw", 0.25)

  def test_evaluates_and_trains_from_it(self, imported, fuzz, tmp_path):
    config = tiny.get_config()
    config.data.kind, config.optimizer.ema_decay = "synthetic", 0.9
    _, workdir = imported
    assert train.evaluate_only(config, str(workdir))["step"] == 0
    config.optimizer.lr_per_256, config.total_steps = 1e-30, 2
    path = tmp_path / "run"
    run_folder.write(str(path), config, fuzz.net, fuzz.leaves, ())
    assert train.train(config, str(path))["step"] == 2
    _, leaves, about = run_folder.read(str(path), averaged=False)
    assert (about.step, about.weights) == (2, "raw")
    assert about.top1 is not None
    assert about.classes == tuple("012345")  # of the data: the import brought none
    for leaf in ("head/kernel", "stem_bn/scale"):  # a rate of nothing leaves them as imported
      np.testing.assert_array_equal(leaves[leaf], fuzz.leaves[leaf])
    _, averages, about = run_folder.read(str(path), averaged=True)
    assert about.weights == "ema"
    assert not np.array_equal(averages["stem_bn/mean"], leaves["stem_bn/mean"])

  def test_older_whole_checkpoint_is_read_if_the_newest_is_damaged(self, imported, tmp_path, fuzz):
    config = tiny.get_config()
    path = tmp_path / "run"
    run_folder.write(str(path), config, fuzz.net, fuzz.leaves, ())
    (path / "checkpoints" / "7").mkdir()
    assert run_folder.read(str(path), averaged=True)[2].step == 0

  def test_narrow_numbers(self, fuzz, tmp_path):
    narrow = {name: tensor.astype(ml_dtypes.bfloat16) for name, tensor in fuzz.tensors.items()}
    path = tmp_path / "narrow.safetensors"
    path.write_bytes(b"".join(safetensors.encode(narrow, {})))
    leaves, _ = read.read_weights(str(path), fuzz.net)
    for leaf, array in fuzz.leaves.items():
      np.testing.assert_array_equal(
        leaves[leaf], array.astype(ml_dtypes.bfloat16).astype(np.float32), strict=True
      )


@pytest.mark.parametrize("family", ["nf_resnet", "mdeq"])
def test_leaves_without_axes(family, tmp_path):
  net = net_lib.build(tiny.get_config(family))
  leaves = net_lib.random_leaves(net)
  assert any(not leaf.ndim for leaf in leaves.values())
  path = tmp_path / "weights.safetensors"
  export._safetensors(net, leaves, About(config=config_lib.flatten(net.config)), path, "timm")
  tensors = safetensors.decode(in_bytes(path.read_bytes()))[0]
  again, _ = read.read_weights(str(path), net)
  for name, leaf in leaves.items():
    np.testing.assert_array_equal(again[name], leaf, strict=True)
    if not leaf.ndim:
      assert tensors[net.torch_name(name)].shape == ()


@pytest.mark.slow
def test_a_net_with_a_loop_becomes_stablehlo_and_is_refused_as_onnx(tmp_path):
  net = net_lib.build(tiny.get_config("mdeq"))
  TestGraphs.write(net, tmp_path / "weights.safetensors")
  for needed in ("flatbuffers", "onnx", "onnxruntime"):
    pytest.importorskip(needed, reason=f"{needed} comes with [export]")
  out = tmp_path / "graph"
  agreement = export.export(str(tmp_path / "weights.safetensors"), "stablehlo", str(out))
  assert agreement.top5 == agreement.images == 16 and agreement.difference < 1e-5
  with pytest.raises(WeightsError, match=r"^MDEQ-tiny, .* ONNX: it has a loop; --format=stableh"):
    export.export(str(tmp_path / "weights.safetensors"), "onnx", str(out))


# Each part of the family that makes operations of its own.
GRAPHS = {
  "projection": ("cifar_resnet", {"depth": 8, "width": 0.5}),
  "zeros": ("cifar_resnet", {"depth": 8, "width": 0.5, "shortcut": "pad"}),
  "max-pool": ("resnet", {"depth": 18, "width": 0.125}),
  "deep, pool, SE, blur": (
    "resnet",
    {"depth": 18, "width": 0.125, "stem": "deep", "shortcut": "pool", "se_ratio": 0.25}
    | {"blurpool": "all"},
  ),
  "preact, groups": ("resnet", {"depth": 50, "width": 0.125, "preact": True, "groups": 4}),
  "layer norm, depthwise": ("convnext", {"width": 1 / 24, "repeats": 0.34}),
}


class TestGraphs:
  @pytest.mark.parametrize("kind", ["onnx", "stablehlo"])
  @pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=[pytest.mark.slow] * (f == "convnext")) for n, (f, _) in GRAPHS.items()],
  )
  def test_agrees(self, name, kind, tmp_path):
    for needed in export._NEEDED[kind]:
      pytest.importorskip(needed, reason=f"{needed} comes with [export]")
    family, fields = GRAPHS[name]
    config = base.get_config(family)
    config.model.update(fields)
    config.model.num_classes, config.data.eval_image_size = 10, 32
    net = net_lib.build(config)
    path = tmp_path / "weights.safetensors"
    self.write(net, path)
    for pixels in (False, True) if name == "projection" else (True,):
      out = tmp_path / f"{pixels}.graph"
      agreement = export.export(str(path), kind, str(out), pixels=pixels)
      assert out.exists()
      assert (agreement.images, agreement.top5) == (16, 16)
      assert agreement.difference < 1e-5

  @staticmethod
  def write(net, path):
    """Write random leaves with the config of their net, as export does."""
    leaves = net_lib.random_leaves(net)
    names = {leaf: net.torch_name(leaf) for leaf in leaves}
    tensors = {n: np.asarray(foreign.theirs(k, n, leaves[k]), order="C") for k, n in names.items()}
    words = About(config=config_lib.flatten(net.config)).words()
    path.write_bytes(b"".join(safetensors.encode(tensors, words)))

  def test_batch_norm_is_part_of_the_convolution(self, imported, tmp_path):
    onnx = pytest.importorskip("onnx", reason="onnx comes with [export]")
    pytest.importorskip("onnxruntime", reason="onnxruntime comes with [export]")
    out = tmp_path / "model.onnx"
    export.export(str(imported[1]), "onnx", str(out))
    model = onnx.load(out)
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("Conv") == 9
    assert kinds.count("Add") == 3 + 1  # of three blocks and the head
    assert not {"Sub", "Mul", "Transpose"}.intersection(kinds)
    dims = model.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["batch", 3, 16, 16]
    words = {entry.key: entry.value for entry in model.metadata_props}
    assert json.loads(words["classes"]) == NAMES
    assert json.loads(words["preprocessing"])["eval_image_size"] == 16

  def test_stablehlo_brings_its_words(self, imported, tmp_path):
    pytest.importorskip("flatbuffers", reason="flatbuffers comes with [export]")
    out = tmp_path / "model.hlo"
    export.export(str(imported[1]), "stablehlo", str(out))
    assert json.loads(json.loads((tmp_path / "model.hlo.json").read_text())["classes"]) == NAMES

  def test_a_graph_that_differs_is_not_kept(self, imported, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "_safetensors", lambda *_: lambda images: np.ones((len(images), 6)))
    out = tmp_path / "out"
    with pytest.raises(WeightsError, match="was not kept: read back, it gives the same top-5 on"):
      export.export(str(imported[1]), "safetensors", str(out))
    assert not list(tmp_path.iterdir())


class TestVerbs:
  def test_show(self, imported, capsys):
    code, printed, _ = run(capsys, "show", imported[0])
    lines = printed.splitlines()
    assert code == 0
    assert lines[0].endswith(
      "weights.pth: torch.save, a CIFAR ResNet-8 with option B with 6 classes"
    )
    assert lines[1] == "5,146 parameters in 29 leaves, 168 running averages in 18"
    (row,) = (line for line in lines if line.startswith("fc.weight"))
    assert "[6, 16]" in row
    assert "float32" in row

  def test_diff(self, imported, fuzz, tmp_path, capsys):
    tensors = dict(fuzz.tensors)
    tensors["fc.bias"] = tensors["fc.bias"] + np.float32(0.5)
    tensors["fc.weight"] = tensors["fc.weight"][:5]
    tensors["more"] = tensors.pop("bn1.bias")
    path = tmp_path / "other.pth"
    path.write_bytes(torch_files.legacy(tensors))
    code, printed, _ = run(capsys, "diff", imported[0], path)
    assert code == 1
    bias = np.abs(fuzz.tensors["fc.bias"]).max()
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert lines == [
      f"bn1.bias only in {imported[0]}",
      f"fc.bias [6] max abs 5.000e-01, {0.5 / bias:.2e} of the largest",
      "fc.weight shape [6, 16] and [5, 16]",
      f"more only in {path}",
      "4 of 48 leaves differ",
    ]

  @pytest.mark.parametrize(
    ("arguments", "words"),
    [
      ("show {none}", "There is no file or folder {none}."),
      ("show {config}", "{config} is neither safetensors nor what torch.save writes."),
      ("export {run} --format=safetensors --out={empty}/x.onnx", "is named as onnx, but --format="),
      (
        "export {empty} --format=safetensors --out={empty}/x",
        "{empty} holds no checkpoint; give the",
      ),
      ("export {none} --format=safetensors --out={empty}/x", "There is no file or folder {none}."),
      (
        "export {pth} --format=safetensors --out={empty}/x",
        "{pth} does not say of which model it is",
      ),
      ("export {run} --format=safetensors --out={none}/x", "there is no folder {none}."),
      (
        "export {run} --format=safetensors --out={empty}/x --images={empty}",
        "--images={empty} holds no image",
      ),
      (
        "export {run} --format=safetensors --out={empty}/x --images={broken}",
        "--images={broken} holds no image that can be read.",
      ),
      (
        "import {pth} --config={config} --workdir={none} --config.model.depth=14",
        "not in the file (layer1.1.bn1.bias, layer1.1.bn1.running_mean, layer1.1.bn1.running_var, ",
      ),
      (
        "import {pth} --config={config} --workdir={none} --config.model.num_classes=7",
        "option B with 6 classes; give --config.model.num_classes=6.",
      ),
      (
        "import {pth} --config={config} --workdir={none} --config.model.depth=9",
        "config.model.depth must be 6n+2",
      ),
      ("import {pth} --config={config} --workdir={none} --config.nonsense=9", "nonsense"),
      ("import {pth} --config={config} --workdir={run}", "{run} holds checkpoints already"),
      (
        "import {pth} --config={config} --workdir={none} --classes={two}",
        "--classes={two} names 2 classes, but config.model.num_classes is 6",
      ),
      (
        "import {pth} --config={config} --workdir={none} --classes={none}",
        "--classes={none} cannot be read",
      ),
      ("show http://example.com/x.pth", "is neither a folder nor gs://"),
      ("show https://127.0.0.1:1/x.pth", "has no checksum; add #sha256=HEX"),
      (
        "show https://127.0.0.1:1/x-01234567.pth",
        "https://127.0.0.1:1/x-01234567.pth cannot be read",
      ),
    ],
  )
  def test_bad_input(self, arguments, words, imported, tmp_path, capsys):
    two = tmp_path / "two"
    two.write_text("a\nb\n")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "x.jpg").write_bytes(b"no image")
    names = {"none": tmp_path / "none", "empty": tmp_path / "empty", "two": two, "config": CONFIG}
    names |= {"pth": imported[0], "run": imported[1], "broken": tmp_path / "broken"}
    code, _, error = run(capsys, *[part.format(**names) for part in arguments.split()])
    assert code == FAILED
    assert words.format(**names) in error
    assert error.count("\n") == 1
    assert not (tmp_path / "none").exists()
    assert not list((tmp_path / "empty").iterdir())

  def test_unknown_arguments(self, capsys):
    with pytest.raises(SystemExit) as raised:
      run(capsys, "show", "x", "--config.model.depth=5")
    assert raised.value.code == FAILED

  @pytest.mark.parametrize("verb", ["import", "export", "show", "diff"])
  def test_help_has_an_example(self, verb, capsys):
    with pytest.raises(SystemExit) as raised:
      run(capsys, verb, "--help")
    assert raised.value.code == 0
    assert f"python -m trainer.weights {verb} " in capsys.readouterr().out

  def test_missing_extra(self, imported, tmp_path, monkeypatch):
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
      WeightsError, match=r"onnx and onnxruntime; run: pip install -e '\.\[export"
    ):
      export.export(str(imported[1]), "onnx", str(tmp_path / "x"))


def test_download(fuzz, monkeypatch):
  data = fuzz.file("zip")
  right = hashlib.sha256(data).hexdigest()
  monkeypatch.setattr(read.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(data))
  for address in (f"https://host/net-{right[:8]}.pth", f"https://host/net.pth#sha256={right}"):
    assert len(read.load(address).tensors) == 47
  with pytest.raises(WeightsError, match=f"has the SHA-256 {right}, not 00000000"):
    read.load("https://host/net-00000000.pth")


def test_altered_value_of_our_own_file_is_seen(fuzz, tmp_path):
  data = bytearray(fuzz.file("safetensors"))
  data[-1] ^= 1
  (tmp_path / "x").write_bytes(data)
  with pytest.raises(WeightsError, match="do not have the SHA-256"):
    read.load(str(tmp_path / "x"))


def test_damaged_files_are_refused(fuzz):
  outcomes = fuzz.run(150)
  assert sum(outcomes.values()) == 150
  assert sum(count for name, count in outcomes.items() if name.endswith("refused")) > 120


def test_facts_of_a_checkpoint_of_an_earlier_version():
  values = {
    "model.name": "cifar_resnet",
    "model.depth": 14,
    "gone.field": 3,
    "data.mean": [1, 2, 3],
  }
  config = net_lib.config_of(values)
  assert (config.model.depth, config.data.mean) == (14, (1, 2, 3))
  assert dataclasses.is_dataclass(net_lib.build(config))
  assert jax.tree.leaves(net_lib.build(config).shapes)
