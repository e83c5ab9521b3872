"""The start of a run from weights that there are: `config.init_from`."""

from collections.abc import Callable, Sequence
import dataclasses
import re
from typing import TypeVar

import jax
import ml_collections

from configs.names import natural
from trainer.errors import DONE, ConfigError, TrainerError
from trainer.models import packing
from trainer.pod.pod import Pod
from trainer.program import Program
from trainer.state import TrainState
from trainer.weights import foreign, read
from trainer.weights import net as net_lib
from trainer.weights.errors import WeightsError

T = TypeVar("T")

_SHOWN = 3  # names in a line


@dataclasses.dataclass(frozen=True)
class Start:
  """What a run begins with.

  Attributes:
    weights: where they are from, in words.
    leaves: arrays by path, in the shapes and dtypes of the model.
    resized: paths of those among them that are fitted to another image size.
    anew: paths of all other leaves, which are drawn as without these weights.
    left_over: tensors of the file that are not used.
    classes: names of the classes that the weights were trained on, if they are known.
    head: whether these include the layer whose shape follows from the number of classes.
  """

  weights: str
  leaves: net_lib.Leaves
  resized: Sequence[str]
  anew: Sequence[str]
  left_over: Sequence[str]
  classes: tuple[str, ...]
  head: bool

  def __str__(self) -> str:
    resized = f"; {_list(self.resized, 'resized')}" if self.resized else ""
    return (
      f"{self.weights}: {_list(list(self.leaves), 'loaded')}{resized}; "
      f"{_list(self.anew, 'made anew')}; {_list(self.left_over, 'left over')}"
    )


def read_start(program: Program, pod: Pod) -> Start:
  """Read the weights of `config.init_from` on every host; all get the same, or all end.

  Raises:
    TrainerError: one sentence: what `trainer.weights.read.load` raises; if leaves are missing or of
      another shape, but for the head; if tensors are left over that `config.init_exclude` does not
      name; or if hosts read different weights.
  """
  return on_all_hosts(
    pod,
    "config.init_from",
    program.config.init_from,
    lambda: _read(program),
    lambda start: read.digest(start.leaves),
  )


def on_all_hosts(
  pod: Pod, field: str, origin: str, make: Callable[[], T], digest: Callable[[T], str]
) -> T:
  """Return what `make` reads on this host, once all hosts have read the same.

  Args:
    pod: this host among the others.
    field: that names the weights.
    origin: its value.
    make: reads them.
    digest: of what it returns.

  Raises:
    TrainerError: one sentence: what `make` raises on any host; or if two hosts read different
      weights.
  """
  made, trouble, code = list[T](), "", DONE
  try:
    made.append(make())
  except TrainerError as error:
    trouble, code = f"{field}: {error}", error.exit_code
  seen = pod.gather(field, [trouble, digest(made[0]) if made and pod.hosts > 1 else "", code])
  for host, (words, theirs, code) in sorted(seen.items()):
    if words:
      raise WeightsError(words if host == pod.host else f"Host {host}: {words}", code)
    if theirs != seen[0][1]:
      raise ConfigError(
        f"Host {host} reads other weights at {field}={origin} than host 0; give all hosts the same "
        "file, or a workdir that no run writes to."
      )
  return made[0]


def _read(program: Program) -> Start:
  config = program.config
  loaded = read.load(config.init_from)
  net = net_lib.Net(config, program.model, program.abstract_checkpoint.raw())
  names = {leaf: net.torch_name(leaf) for leaf in net.leaves}
  excluded = _excluded(config.init_exclude, [*net.leaves, *loaded.tensors])
  anew = excluded.intersection(net.leaves)
  loaded, resized = _resize(loaded, net, [leaf for leaf in net.leaves if leaf not in anew])
  found = read.fit(loaded, net, {n: leaf for n, leaf in net.leaves.items() if n not in anew})
  head = _head(config, net)
  if head.intersection(found.misfits) or head <= found.missing.keys():
    anew |= head
  for kind in (found.found, found.missing, found.misfits):
    for leaf in anew.intersection(kind):
      kind.pop(leaf)
  found.left_over[:] = sorted(set(found.left_over).difference(names.values(), excluded))
  if not found.complete:
    raise read.misfit(loaded, net, found, any_head=True)
  if not found.found:
    raise WeightsError(
      f"config.init_exclude is {config.init_exclude!r}, which leaves nothing of {loaded.origin} to "
      "load."
    )
  about = loaded.about
  words = f"{config.init_from} ({loaded.kind}" + (
    f", {'averages' if about.weights == 'ema' else 'weights'} of step {about.step})"
    if about.step is not None
    else f", {loaded.guess})"
  )
  used = {names[leaf] for leaf in found.found}
  return Start(
    weights=words,
    leaves=found.found,
    resized=resized,
    anew=sorted(anew, key=natural),
    left_over=sorted(loaded.tensors.keys() - used, key=natural),
    classes=about.classes,
    head=not head & anew,
  )


def _resize(
  loaded: read.Loaded, net: net_lib.Net, leaves: Sequence[str]
) -> tuple[read.Loaded, list[str]]:
  """Return weights that are fitted to the image size of a model, and the leaves that had to be."""
  tensors, resized = dict(loaded.tensors), []
  for leaf in leaves:
    name = net.torch_name(leaf)
    if name in tensors:
      array = net.resized(leaf, foreign.ours(leaf, tensors[name]))
      if array is not None:
        tensors[name] = foreign.theirs(leaf, name, array)
        resized.append(leaf)
  return dataclasses.replace(loaded, tensors=tensors), resized


def _excluded(pattern: str, names: Sequence[str]) -> set[str]:
  """Return the names that `config.init_exclude` matches.

  Raises:
    WeightsError: if there are none.
  """
  if not pattern:
    return set()
  found = {name for name in names if re.search(pattern, name)}
  if not found:
    raise WeightsError(
      f"config.init_exclude is {pattern!r}, which no leaf of the model matches; they are "
      f"{', '.join(names[:_SHOWN])}, ..."
    )
  return found


def _head(config: ml_collections.ConfigDict, net: net_lib.Net) -> set[str]:
  """Return the leaves whose shape follows from the number of classes."""
  other = ml_collections.ConfigDict(config.to_dict())
  other.model.num_classes += 1
  theirs = net_lib.build(other).leaves
  return {name for name, leaf in net.leaves.items() if leaf.shape != theirs[name].shape}


def make_state(program: Program, start: Start) -> TrainState:
  """Return the state of step 0 with these weights, each leaf in place on all devices.

  What is made anew has the values that it has without them; averages are copies, the optimizer is
  new.
  """
  like = program.abstract_checkpoint.raw()
  net, shapes = net_lib.Net(program.config, program.model, like), net_lib.flatten(like)
  given = {
    name: jax.make_array_from_callback(leaf.shape, shapes[name].sharding, leaf.__getitem__)
    for name, leaf in start.leaves.items()
  }

  def begin(given: net_lib.Leaves) -> TrainState:
    drawn = program.init()
    leaves = net_lib.flatten(packing.unpack(drawn.raw()) if program.model.packed else drawn.raw())
    variables = net.variables(leaves | given)
    if program.model.packed:
      variables = packing.pack(variables)
    averages = {"params": variables.params, "batch_stats": variables.batch_stats}
    state = dataclasses.replace(
      drawn,
      **variables._asdict(),
      opt_state=program.optimizer.init(variables.params),
      ema=drawn.ema and drawn.ema | averages,
    )
    if program.sparse:
      masks = program.sparse.of_weights(state.params)
      state = program.sparse.started(state, program.optimizer, masks)
    return state

  return jax.jit(begin, out_shardings=program.state_shardings())(given)


def _list(names: Sequence[str], what: str) -> str:
  some = ", ".join(names[:_SHOWN]) + (", ..." if names[_SHOWN:] else "")
  return f"{len(names):,} {what}" + (f" ({some})" if names else "")
