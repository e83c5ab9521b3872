"""The parts of tensorboardX that write event files, imported without torch.

`tensorboardX` (2.6.5) imports torch, where that is installed, for type annotations of its
SummaryWriter as soon as any part of it is imported. Nothing here uses torch, which takes seconds to
import, so it is hidden meanwhile:

    from trainer.reporting.tensorboardx import event_pb2, record_writer, summaries, summary_pb2

If torch has been imported before, it stays. Later imports of torch need no precaution.
"""

import sys

_hidden = "torch" not in sys.modules
if _hidden:
  sys.modules["torch"] = None  # type: ignore[assignment]  # what an import takes for absent
try:
  from tensorboardX import record_writer
  from tensorboardX import summary as summaries
  from tensorboardX.proto import event_pb2, summary_pb2
finally:
  if _hidden:
    del sys.modules["torch"]

__all__ = ["event_pb2", "record_writer", "summaries", "summary_pb2"]
