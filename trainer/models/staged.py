"""Nets of blocks, in stages or not: how they run them, with stochastic depth and dropout."""

from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from trainer.models import norm, stack
from trainer.models.family import Family


class Stacked(Family):
  """A net of blocks that `stack.run` runs.

  Attributes:
    head: linear, in the dtype of the parameters.
    scan: see stack.run.
    remat: likewise.
    drop_path_rates: share of examples that skip the branches of each block in training; () for
      none.
    drops: whether there is dropout.
  """

  head: nnx.Linear

  def _keep(self, fields: Mapping[str, Any], rates: Sequence[float], rngs: nnx.Rngs) -> None:
    """Keep how the blocks are run.

    Args:
      fields: of the family: scan, remat and dropout.
      rates: `drop_path_rates`.
      rngs: streams of dropout and of stochastic depth.
    """
    self.scan, self.remat = fields["scan"], fields["remat"]
    self.drop_path_rates = tuple(rates)
    # Streams exist only where they are drawn from; they are seeded anew in each step.
    if self.drop_path_rates:
      self.paths = rngs.drop_path.fork()
      self.deterministic = False  # the name that nnx.Module.train() and eval() look for
    self.drops = fields["dropout"] > 0
    if self.drops:
      self.dropout = nnx.Dropout(fields["dropout"], rngs=rngs)

  def _draw_paths(self, **options: Any) -> stack.Paths | None:
    """Return what is drawn for this micro-batch; None where no branch is skipped.

    Args:
      options: further attributes of stack.Paths.
    """
    if not self.drop_path_rates or self.deterministic:
      return None
    rates = np.asarray(self.drop_path_rates, self.head.dtype)
    return stack.Paths(self.paths(), rates, **options)


class Staged(Stacked):
  """A net whose blocks are attributes `stage{s}_block{b}`, both counted from 1."""

  @classmethod
  def check_split(cls, fields: Mapping[str, Any], *, examples: int, shards: int) -> None:
    """Refuse BN groups that do not lie evenly on the batch and on the devices; see Family."""
    if "bn_group" in fields:
      norm.check_groups(fields["bn_group"], examples=examples, shards=shards)

  def _keep_stages(
    self,
    fields: Mapping[str, Any],
    numbers: Sequence[int],
    rates: Sequence[float],
    rngs: nnx.Rngs,
  ) -> None:
    """Keep how the blocks are run; `numbers` are the blocks of each stage, the rest as `_keep`."""
    self.numbers = tuple(numbers)
    self.blocks = tuple(
      f"stage{s}_block{b}" for s, number in enumerate(numbers, 1) for b in range(1, number + 1)
    )
    self._keep(fields, rates, rngs)

  def _run_stages(self, x: jax.Array, extras: stack.Extras | None) -> dict[str, jax.Array]:
    """Return the output of each stage for the input of the first: "stage1", "stage2", ..."""
    outputs, first = {}, 0
    for s, number in enumerate(self.numbers, 1):
      blocks = [getattr(self, name) for name in self.blocks[first : first + number]]
      x = stack.run(blocks, x, first=first, extras=extras, scan=self.scan, remat=self.remat)
      outputs[f"stage{s}"] = x
      first += number
    return outputs

  def _classify(self, x: jax.Array) -> jax.Array:
    """Return the logits of feature maps: of their mean, with dropout."""
    x = jnp.mean(x, axis=(1, 2), dtype=self.head.dtype)
    return self.head(self.dropout(x) if self.drops else x)


def rates_by_block(rate: float, blocks: int, last: bool) -> tuple[float, ...]:
  """Return rates of stochastic depth that grow with the number of the block; () if all are 0.

  Args:
    rate: of the last block, or of the one that would follow it.
    blocks: of the net.
    last: whether the last block has it: rate * i/(N - 1); else rate * i/N.
  """
  return tuple(rate * i / max(1, blocks - last) for i in range(blocks)) if rate else ()
