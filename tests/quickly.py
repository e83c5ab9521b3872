"""How programs are compiled for the tests, of whose time that is the most.

The nets of the tests are so small that their steps run no slower for it.
"""

from importlib import metadata

_FLAGS = ["--xla_backend_optimization_level=0", "--xla_cpu_parallel_codegen_split_count=1"]
if metadata.version("jaxlib").startswith("0.10."):  # later ones refuse the flag
  # MLIR for each fusion takes two thirds of the time of a compilation.
  _FLAGS.append("--xla_cpu_use_fusion_emitters=false")
XLA_FLAGS = " ".join(_FLAGS)
