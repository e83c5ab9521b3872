"""Model families by name; a family owns its fields, see `trainer.models.family.Family`."""

from collections.abc import Mapping
import importlib.util
from typing import Any

from configs import names, own_packages
from configs.fields import Fields

# Its fields may stand in a module without JAX, so that a help or a refusal comes in a moment: those
# of trainer.models.vit:ViT in trainer.models.vit_fields, by the name of the family in capitals.
FAMILIES = {
  "resnet": "trainer.models.resnet:ResNet",
  "cifar_resnet": "trainer.models.resnet:CifarResNet",
  "cifar_resnet_v2": "trainer.models.resnet:CifarResNetV2",
  "resnet_rs": "trainer.models.resnet:ResNetRS",
  "vit": "trainer.models.vit:ViT",
  "efficientnet": "trainer.models.efficientnet:EfficientNet",
  "nfnet": "trainer.models.nfnet:NFNet",
  "nf_resnet": "trainer.models.nfnet:NFResNet",
  "mdeq": "trainer.models.mdeq:MDEQ",
  "convnext": "trainer.models.convnext:ConvNeXt",
}


def find(name: str) -> Any:
  """Return the class of a family: one of FAMILIES, or any "package.module:Class".

  It is imported by name, and only here: nothing in `configs` depends on the trainer otherwise.

  Raises:
    ValueError: one sentence that names the field and what there is.
  """
  return names.find(FAMILIES, name, "config.model.name")


def fields(name: str) -> Fields:
  """Return the fields of a family, by their names without "model.".

  Raises:
    ValueError: as `find`.
  """
  if name in FAMILIES:
    own_packages.check("trainer")  # of those who have imported none of it so far
    module, _, _ = FAMILIES[name].partition(":")
    if importlib.util.find_spec(f"{module}_fields"):
      own: Fields = names.find({}, f"{module}_fields:{name.upper()}", "config.model.name")
      return own
  found = getattr(find(name), "FIELDS", None)
  if not isinstance(found, Mapping):
    raise ValueError(
      f"config.model.name is {name!r}, which is no subclass of trainer.models.family.Family with "
      "FIELDS."
    )
  return found
