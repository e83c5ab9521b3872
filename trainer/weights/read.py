"""Reads weights of any origin: a workdir, a file of safetensors or torch.save, here or remote."""

from collections.abc import Callable, Mapping
import dataclasses
import hashlib
import http.client
import pathlib
import re
from typing import TypeVar
import urllib.error
import urllib.parse
import urllib.request

import ml_collections
import numpy as np

from trainer.errors import ConfigError
from trainer.models import names
from trainer.weights import about as about_lib
from trainer.weights import foreign, run_folder, safetensors, torch_file
from trainer.weights import net as net_lib
from trainer.weights.about import About
from trainer.weights.errors import WeightsError, unreadable
from trainer.workdir import storage

T = TypeVar("T")

DIGEST = "sha256_of_tensors"  # metadata of our own files
_TIMEOUT_SECONDS = 60.0
_CHUNK = 1 << 20
_KINDS = {b"PK": "torch.save", b"\x80\x02": "torch.save, before zip archives"}


@dataclasses.dataclass(frozen=True)
class Loaded:
  """Tensors as torchvision or timm would keep them.

  Attributes:
    origin: path or address.
    kind: of file, in words.
    tensors: in torch's layout, by torchvision's names.
    about: what is known of them.
    metadata: all that a file says beside its tensors.
  """

  origin: str
  kind: str
  tensors: dict[str, np.ndarray]
  about: About
  metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)

  @property
  def guess(self) -> names.Looks:
    """What the names and shapes look like."""
    return foreign.guess({name: tensor.shape for name, tensor in self.tensors.items()})


def load(origin: str, averaged: bool = True) -> Loaded:
  """Read all tensors of a file or a workdir.

  Args:
    origin: workdir or file, local or gs://; or the https:// address of a file, whose SHA-256 is in
      its name as in `resnet50-0676ba61.pth`, or behind it as in `FILE#sha256=HEX`.
    averaged: whether averages over steps are taken where there are both.

  Raises:
    WeightsError: one sentence, if it is missing, damaged, refused, or not the one meant; or if its
      storage cannot be read, which a later try may do.
  """
  if origin.startswith("https://"):
    data = _download(origin)
  else:
    try:
      path = storage.path_of(origin)
    except ConfigError as error:
      raise WeightsError(str(error).replace("--workdir ", "")) from error
    if _asked(origin, lambda: run_folder.is_one(path)):
      net, leaves, facts = run_folder.read(origin, averaged)
      tensors = {net.torch_name(leaf): net.theirs(leaf, leaves[leaf]) for leaf in leaves}
      return Loaded(origin, "a workdir", tensors, facts)
    try:
      data = np.frombuffer(_asked(origin, path.read_bytes), np.uint8)
    except MemoryError as error:
      raise WeightsError(f"{origin} needs more memory than there is.") from error
  try:
    return _decode(origin, data, averaged)
  except WeightsError as error:
    raise WeightsError(f"{origin} {error}.") from error
  except MemoryError as error:
    raise WeightsError(f"{origin} needs more memory than there is.") from error


def _decode(origin: str, data: np.ndarray, averaged: bool) -> Loaded:
  kind = _KINDS.get(data[:2].tobytes())
  # The header of safetensors begins with a brace, behind 8 bytes of length that may be any.
  if kind and data[8:9].tobytes() != b"{":
    tensors, metadata = torch_file.decode(data, averaged), dict[str, str]()
  else:
    kind = "safetensors"
    if data[8:9].tobytes() not in (b"", b"{"):
      raise WeightsError("is neither safetensors nor what torch.save writes")
    tensors, metadata = safetensors.decode(data)
    if DIGEST in metadata and digest(tensors) != metadata[DIGEST]:
      raise WeightsError(
        "is damaged: its tensors do not have the SHA-256 that they were saved with"
      )
  facts = about_lib.about(metadata)
  return Loaded(origin, kind, foreign.plain_names(tensors), facts, metadata)


def digest(tensors: Mapping[str, np.ndarray]) -> str:
  """Return the SHA-256 of the names and values of tensors, in their order."""
  result = hashlib.sha256()
  for name, tensor in tensors.items():
    result.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
    result.update(np.ascontiguousarray(tensor).reshape(-1).view(np.uint8).data)
  return result.hexdigest()


def _asked(origin: str, question: Callable[[], T]) -> T:
  """Return the answer of the storage of weights; raise WeightsError if there is none."""
  try:
    return question()
  except FileNotFoundError as error:
    raise WeightsError(f"There is no file or folder {origin}.") from error
  except Exception as error:
    if not storage.is_failure(error):
      raise
    raise unreadable(origin, error) from error


def _download(address: str) -> np.ndarray:
  """Return the file at an address once it has the checksum that is part of the address."""
  url, _, fragment = address.partition("#")
  stem = pathlib.PurePosixPath(urllib.parse.urlsplit(url).path).stem
  match = re.fullmatch("sha256=([0-9a-f]{64})", fragment) or re.search("-([0-9a-f]{8,64})$", stem)
  if match is None:
    raise WeightsError(
      f"{address} has no checksum; add #sha256=HEX, from sha256sum where you trust the file."
    )
  found, parts = hashlib.sha256(), []
  try:
    with urllib.request.urlopen(url, timeout=_TIMEOUT_SECONDS) as response:
      while chunk := response.read(_CHUNK):
        found.update(chunk)
        parts.append(chunk)
  except urllib.error.HTTPError as error:
    raise unreadable(url, error) from error
  except (OSError, ValueError, http.client.HTTPException) as error:
    # What urllib wraps says whether it may pass.
    reason = getattr(error, "reason", None)
    raise unreadable(url, reason if isinstance(reason, Exception) else error) from error
  if not found.hexdigest().startswith(match[1]):
    raise WeightsError(
      f"{url} has the SHA-256 {found.hexdigest()}, not {match[1]}; it is damaged, or another file."
    )
  return np.frombuffer(b"".join(parts), np.uint8)


def read_weights(
  origin: str, net: net_lib.Net, averaged: bool = True
) -> tuple[net_lib.Leaves, About]:
  """Return the leaves of a model by path, and what is known about them.

  Args:
    origin: as of `load`.
    net: the model.
    averaged: as of `load`.

  Raises:
    WeightsError: as `load`, and if anything is missing, of another shape, or left over: with the
      first of these, and what the weights are.
  """
  loaded = load(origin, averaged)
  return _whole(loaded, net), loaded.about


def read_model(
  origin: str, averaged: bool = True, config: ml_collections.ConfigDict | None = None
) -> tuple[net_lib.Net, net_lib.Leaves, About]:
  """Return the model of weights, its leaves by path, and what is known about them.

  Args:
    origin: as of `load`.
    averaged: as of `load`.
    config: validated, of the model; None if the weights bring their own, as those of a workdir and
      of a file that was exported from one do.

  Raises:
    WeightsError: as `read_weights`, and if nothing says of which model the weights are.
  """
  if config is None and not origin.startswith("https://"):
    path = storage.path_of(origin)
    if not _asked(origin, path.exists):
      raise WeightsError(f"There is no file or folder {origin}.")
    if _asked(origin, lambda: run_folder.is_one(path)):
      return run_folder.read(origin, averaged)
  loaded = load(origin, averaged)
  if config is None:
    if not loaded.about.config:
      raise WeightsError(
        f"{origin} does not say of which model it is; import it into a workdir first, python -m "
        f"trainer.weights import {origin} --config=configs/X.py --workdir=DIR, or give the "
        "--config of its model to a command that takes one."
      )
    config = net_lib.config_of(loaded.about.config)
  net = net_lib.build(config)
  return net, _whole(loaded, net), loaded.about


def _whole(loaded: Loaded, net: net_lib.Net) -> net_lib.Leaves:
  """Return the leaves of a model, all of them, from tensors that are nothing else."""
  found = fit(loaded, net)
  if not found.complete:
    raise misfit(loaded, net, found)
  return found.found


def fit(loaded: Loaded, net: net_lib.Net, leaves: net_lib.Leaves | None = None) -> foreign.Fit:
  """Return how tensors fit a model, also in part.

  Args:
    loaded: the tensors.
    net: the model.
    leaves: shape and dtype of those that are wanted; None for all.

  Raises:
    WeightsError: if a tensor that has a place holds what is no weight.
  """
  try:
    wanted = net.leaves if leaves is None else leaves
    return foreign.fit(loaded.tensors, wanted, net.torch_name, net.convolutions)
  except WeightsError as error:
    raise WeightsError(f"{loaded.origin} {error}.") from error


def misfit(
  loaded: Loaded, net: net_lib.Net, found: foreign.Fit, any_head: bool = False
) -> WeightsError:
  """Return the sentence about weights that do not fit.

  Args:
    loaded: the weights.
    net: the model.
    found: what `fit` has returned.
    any_head: whether the number of classes may differ.
  """
  return WeightsError(
    f"{loaded.origin} does not fit config.model ({net.describe()}, "
    f"{net.config.model.num_classes:,} classes): {found.problems()}. "
    f"{_advice(loaded.guess, net, any_head)}"
  )


def _advice(guess: names.Looks, net: net_lib.Net, any_head: bool) -> str:
  """Return what the weights look like, and which fields would make their model."""
  model, fields = net.config.model, []
  if guess.depth and "depth" in model and guess.depth != model.depth:
    fields.append(f"--config.model.depth={guess.depth}")
  if guess.classes and guess.classes != model.num_classes and not any_head:
    fields.append(f"--config.model.num_classes={guess.classes}")
  return f"The weights look like {guess}" + (f"; give {' '.join(fields)}." if fields else ".")
