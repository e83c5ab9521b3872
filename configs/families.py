"""Model families by name; a family owns its fields, see `trainer.models.family.Family`."""

from typing import Any

from configs import names

FAMILIES = {
  "resnet": "trainer.models.resnet:ResNet",
  "cifar_resnet": "trainer.models.resnet:CifarResNet",
  "cifar_resnet_v2": "trainer.models.resnet:CifarResNetV2",
  "resnet_rs": "trainer.models.resnet:ResNetRS",
  "vit": "trainer.models.vit:ViT",
  "efficientnet": "trainer.models.efficientnet:EfficientNet",
  "nfnet": "trainer.models.nfnet:NFNet",
  "nf_resnet": "trainer.models.nfnet:NFResNet",
}


def find(name: str) -> Any:
  """Return the class of a family: one of FAMILIES, or any "package.module:Class".

  It is imported by name, and only here: nothing in `configs` depends on the trainer otherwise.

  Raises:
    ValueError: one sentence that names the field and what there is.
  """
  return names.find(FAMILIES, name, "config.model.name")
