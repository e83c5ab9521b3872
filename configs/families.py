"""Model families by name; a family owns its fields, see `trainer.models.family.Family`."""

from typing import Any

from configs import names, own_packages
from configs.fields import Fields

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
}
# Their fields, where a module without JAX has them: a help or a refusal then comes in a moment.
FIELDS = {
  "resnet": "trainer.models.resnet_fields:RESNET",
  "cifar_resnet": "trainer.models.resnet_fields:CIFAR_RESNET",
  "cifar_resnet_v2": "trainer.models.resnet_fields:CIFAR_RESNET_V2",
  "resnet_rs": "trainer.models.resnet_fields:RESNET_RS",
  "vit": "trainer.models.vit_fields:VIT",
  "efficientnet": "trainer.models.efficientnet_fields:EFFICIENTNET",
  "nfnet": "trainer.models.nfnet_fields:NFNET",
  "nf_resnet": "trainer.models.nfnet_fields:NF_RESNET",
  "mdeq": "trainer.models.mdeq_fields:MDEQ",
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
  if name in FIELDS:
    own_packages.check("trainer")  # of those who have imported none of it so far
    table: Fields = names.find(FIELDS, name, "config.model.name")
    return table
  own: Fields = find(name).FIELDS
  return own
