"""clu's metric writers and periodic actions, imported without TensorFlow.

`clu.metric_writers` (0.0.12) imports TensorFlow for one of its writers as soon as it is imported
itself, and `clu.periodic_actions` imports `clu.metric_writers`. The trainer writes event files with
`trainer.reporting.events.EventWriter`, so a stand-in takes the place of that one module while the
package is imported, whether or not TensorFlow is installed:

    from trainer.reporting.clu import metric_writers, periodic_actions

If clu has been imported before, it is used as it is. Later imports of clu need no precaution.
"""

import sys
import types

_NEEDS_TENSORFLOW = "clu.metric_writers.summary_writer"


class _SummaryWriter:
  """What `clu.metric_writers.SummaryWriter` is where this module was the first to import it."""

  def __init__(self, logdir: str):
    raise NotImplementedError(
      "clu's SummaryWriter needs TensorFlow, which is not imported here; use "
      "trainer.reporting.events.EventWriter."
    )


_stand_in = types.ModuleType(_NEEDS_TENSORFLOW)
_stand_in.__dict__["SummaryWriter"] = _SummaryWriter
_added = sys.modules.setdefault(_NEEDS_TENSORFLOW, _stand_in) is _stand_in
try:
  from clu import metric_writers, periodic_actions
finally:
  if _added:
    del sys.modules[_NEEDS_TENSORFLOW]

__all__ = ["metric_writers", "periodic_actions"]
