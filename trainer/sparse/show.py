"""The sparse weights of a run in words: a line for the first screen, a table of all layers."""

from trainer.sparse.method import Sparse


def line(sparse: Sparse) -> str:
  """Return "rigl, erk: 5,100,607 of 25,502,912 weights, ..."."""
  fields = sparse.config.sparsity
  share = 100 * sparse.kept / sparse.size
  words = f"{fields.name}, {fields.distribution}: {sparse.kept:,} of {sparse.size:,} weights"
  words += f" ({share:.1f} %) in {len(sparse.layers)} layers"
  if dense := sum(layer.dense for layer in sparse.layers):
    words += f", {dense} of them dense"
  if fields.name == "static":
    return words
  begin, end = max(sparse.begin - sparse.offset, 0), sparse.end - sparse.offset
  words += f"; changes every {fields.every_steps:,} steps from {begin:,} to {end:,}"
  if fields.name == "gradual":
    return words
  return f"{words}, of {100 * fields.drop_fraction:g} % of a layer ({fields.drop_anneal})"


def table(sparse: Sparse) -> str:
  """Return the weights that each layer keeps, of a gradual run at its end."""
  rows = [(layer.name, f"{layer.kept:,}", f"{layer.size:,}") for layer in sparse.layers]
  width = max(len(name) for name, *_ in rows)
  lines = [f"  {'sparse leaves':{width}} {'kept':>13} {'of':>13}  density"]
  lines += [
    f"  {name:{width}} {kept:>13} {size:>13}  {layer.kept / layer.size:.4f}"
    for (name, kept, size), layer in zip(rows, sparse.layers, strict=True)
  ]
  return "\n".join(lines)
