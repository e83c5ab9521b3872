"""Files of weights against the libraries whose formats they have."""

import io
import pathlib

import numpy as np
import pytest

from configs import base
from tests.parity.test_models import NETS
from trainer import config as config_lib
from trainer.weights import export, foreign, read, safetensors, torch_file
from trainer.weights import net as net_lib
from trainer.weights.about import About

torch = pytest.importorskip("torch", reason="needs the extra parity")
torchvision = pytest.importorskip("torchvision", reason="needs the extra parity")
timm = pytest.importorskip("timm", reason="needs the extra parity")
library = pytest.importorskip("safetensors.torch", reason="needs the extra parity")

IMAGES = pathlib.Path(__file__).parents[2] / "../shared/data/imagenet-sample"
SIZE = 64


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
  """A ResNet-18 with random leaves, and the file that `export` makes of it."""
  config = base.get_config()
  config.model.depth, config.model.num_classes = 18, 100
  config.data.eval_image_size, config.data.eval_resize = SIZE, 73
  net = net_lib.build(config)
  leaves = net_lib.random_leaves(net)
  folder = tmp_path_factory.mktemp("ours")
  names = {leaf: net.torch_name(leaf) for leaf in leaves}
  tensors = {n: np.ascontiguousarray(foreign.theirs(k, n, leaves[k])) for k, n in names.items()}
  first, path = folder / "first.safetensors", folder / "weights.safetensors"
  words = About(config=config_lib.flatten(config)).words()
  first.write_bytes(b"".join(safetensors.encode(tensors, words)))
  agreement = export.export(str(first), "safetensors", str(path))
  assert (agreement.top5, agreement.difference) == (16, 0)
  return net, leaves, path


def test_torchvision_takes_our_file(ours):
  net, leaves, path = ours
  model = torchvision.models.resnet18(num_classes=100).eval()
  state = library.load_file(path)
  assert state.keys() == model.state_dict().keys()
  model.load_state_dict(state)
  images = np.random.default_rng(0).normal(size=(3, SIZE, SIZE, 3)).astype(np.float32)
  with torch.no_grad():
    theirs = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
  logits = np.asarray(net.logits(net.variables(leaves), images))
  assert np.abs(logits - theirs).max() <= 1e-4 * np.abs(theirs).max()


@pytest.mark.parametrize("legacy", [False, True])
def test_torch_save(legacy):
  model = torchvision.models.resnet18(num_classes=3)
  state = model.state_dict()
  state["bn1.weight"] = state["bn1.weight"].half()
  state["bn1.bias"] = state["bn1.bias"].bfloat16()
  state["fc.weight"] = torch.arange(3 * 512.0).reshape(512, 3).T  # a view in another order
  optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9).state_dict()
  file = io.BytesIO()
  torch.save(
    {"epoch": 3, "state_dict": state, "optimizer": optimizer, "numpy": np.float64(3)},
    file,
    _use_new_zipfile_serialization=not legacy,
  )
  found = torch_file.decode(np.frombuffer(file.getvalue(), np.uint8))
  assert found.keys() == state.keys()
  for name, tensor in state.items():
    np.testing.assert_array_equal(found[name].astype(np.float64), tensor.double().numpy())


def test_library_and_ours_read_each_other():
  arrays = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.array(3, np.int64)}
  back = library.load(b"".join(safetensors.encode(arrays, {"format": "pt"})))
  data = library.save({name: torch.from_numpy(a) for name, a in arrays.items()}, {"x": "y"})
  found, words = safetensors.decode(np.frombuffer(data, np.uint8))
  assert words == {"x": "y"}
  for name, array in arrays.items():
    np.testing.assert_array_equal(found[name], array, strict=True)
    np.testing.assert_array_equal(back[name].numpy(), array, strict=True)


@pytest.mark.parametrize(
  "name",
  [
    *(net.removeprefix("timm:") for net in NETS if net.startswith("timm:")),
    *("resnext50_32x4d", "wide_resnet50_2"),
    *("vit_tiny_patch16_224", "vit_base_patch32_384", "vit_large_patch16_384"),
  ],
)
def test_guesses_the_nets_of_timm(name):
  with torch.device("meta"):
    state = timm.create_model(name).state_dict()
  guess = foreign.guess({key: tuple(tensor.shape) for key, tensor in state.items()})
  # Nets with the padding of TensorFlow have the same leaves.
  assert (guess.name, guess.classes) == (name.removeprefix("tf_"), 1000)


@pytest.mark.parametrize(
  ("name", "fields"),
  [
    ("seresnet18", {"se_ratio": 0.0625}),
    ("resnet18d", {"stem": "deep", "shortcut": "pool"}),
    ("resnetv2_18", {"preact": True}),
    ("vit_tiny_patch16_224", {"name": "vit", "variant": "Ti", "depth": 0}),
  ],
)
def test_takes_the_weights_of_timm(name, fields, tmp_path):
  config = base.get_config(fields.get("name", "resnet"))
  config.model.update({"num_classes": 5, **({"depth": 18} | fields)})
  model = timm.create_model(name, num_classes=5)
  torch.save(model.state_dict(), tmp_path / "weights.pth")
  net = net_lib.build(config)
  leaves, _ = read.read_weights(str(tmp_path / "weights.pth"), net)
  state = model.state_dict()
  for leaf, array in leaves.items():  # and back, in timm's shapes
    expected = state[net.torch_name(leaf)].numpy()
    np.testing.assert_array_equal(net.theirs(leaf, array), expected, strict=True)


def test_takes_the_vision_transformers_of_torchvision(tmp_path):
  model = torchvision.models.VisionTransformer(
    image_size=32,
    patch_size=16,
    num_layers=2,
    num_heads=2,
    hidden_dim=32,
    mlp_dim=64,
    num_classes=5,
  ).eval()
  with torch.no_grad():
    for parameter in model.parameters():
      parameter.normal_(0.1, 0.2)
  torch.save(model.state_dict(), tmp_path / "weights.pth")
  config = base.get_config("vit")
  config.model.update({"width": 32, "depth": 2, "heads": 2, "mlp": 64, "num_classes": 5})
  config.data.image_size = 32
  net = net_lib.build(config)
  leaves, _ = read.read_weights(str(tmp_path / "weights.pth"), net)
  tensors = {net.torch_name(leaf): net.theirs(leaf, leaves[leaf]) for leaf in leaves}
  assert net.by_torchvision(tensors).keys() == model.state_dict().keys()
  images = np.random.default_rng(0).normal(size=(3, 32, 32, 3)).astype(np.float32)
  with torch.no_grad():
    theirs = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
  logits = np.asarray(net.logits(net.variables(leaves), images))
  assert np.abs(logits - theirs).max() <= 1e-4 * np.abs(theirs).max()


@pytest.mark.parametrize(
  ("origin", "family", "fields"),
  [
    ("timm:efficientnet_b0", "efficientnet", {"padding": "torch", "bn_epsilon": 1e-5}),
    ("torchvision:efficientnet_b0", "efficientnet", {"padding": "torch", "bn_epsilon": 1e-5}),
    ("torchvision:efficientnet_v2_s", "efficientnet", {"variant": "v2_s"}),
    ("timm:nf_resnet26", "nf_resnet", {"depth": 26, "skip_init": False}),
    ("torchvision:convnext_tiny", "convnext", {}),
  ],
)
def test_other_families_are_read_and_written(origin, family, fields, tmp_path):
  library, _, name = origin.partition(":")
  make = getattr(torchvision.models, name) if library == "torchvision" else timm.create_model
  model = make(num_classes=5) if library == "torchvision" else make(name, num_classes=5)
  torch.save(model.state_dict(), tmp_path / "weights.pth")
  config = base.get_config(family)
  config.model.update({"num_classes": 5, **fields})
  net = net_lib.build(config)
  leaves, _ = read.read_weights(str(tmp_path / "weights.pth"), net)
  state = model.state_dict()
  ours = {net.torch_name(leaf): net.theirs(leaf, leaves[leaf]) for leaf in leaves}
  if library == "torchvision":
    ours = net.by_torchvision(ours)
  for key, tensor in ours.items():
    np.testing.assert_array_equal(tensor, state[key].numpy(), strict=True)
  counters = {key for key in state if key.endswith("num_batches_tracked")}
  assert len(ours) == len(leaves) == len(state) - len(counters)


@pytest.mark.skipif(not IMAGES.is_dir(), reason="the original images are not here")
@pytest.mark.parametrize("kind", ["onnx", "stablehlo"])
def test_graphs_agree_on_photographs(kind, ours, tmp_path):
  for needed in export._NEEDED[kind]:
    pytest.importorskip(needed, reason=f"{needed} comes with [export]")
  _, _, path = ours
  agreement = export.export(
    str(path), kind, str(tmp_path / "graph"), pixels=True, images=str(IMAGES)
  )
  assert (agreement.images, agreement.top5) == (200, 200)
  assert agreement.difference <= 1e-4
