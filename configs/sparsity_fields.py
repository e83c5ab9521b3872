"""The fields of `config.sparsity`: weights that are zero, and how they are chosen."""

from configs.fields import ASK, PATTERN, POSITIVE, SHARE, Check, Field, Fields, at_least, one_of

_CHOICE = ("sparsity", "distribution", "leaves", "dense")
_CHANGES = ("begin_share", "begin_steps", "end_share", "end_steps", "every_steps")
_EXCHANGES = ("drop_fraction", "drop_anneal")

# The fields that a method has no use for.
UNUSED: dict[str, tuple[str, ...]] = {
  "none": (*_CHOICE, *_CHANGES, *_EXCHANGES, "power"),
  "static": (*_CHANGES, *_EXCHANGES, "power"),
  "set": ("power",),
  "rigl": ("power",),
  "gradual": _EXCHANGES,
}

SPARSITY: Fields = {
  "sparsity.name": Field(
    "none",
    "Which weights are zero (trainer/sparse/README.md): none | static: a random choice | set: the "
    "smallest are exchanged for random ones (arXiv:1707.04780) | rigl: for those with the largest "
    "gradient (arXiv:1911.11134) | gradual: more and more of the smallest (arXiv:1710.01878).",
    check=one_of(*UNUSED),
  ),
  "sparsity.sparsity": Field(
    0.8, "Share of zeros among the weights of sparsity.leaves; gradual: in the end.", "", SHARE
  ),
  "sparsity.distribution": Field(
    "erk",
    "erk: more of the large layers (Erdos-Renyi-Kernel, arXiv:1911.11134) | uniform: the same "
    "share of each.",
    check=one_of("erk", "uniform"),
  ),
  "sparsity.leaves": Field(
    "kernel$",
    "Regular expression of the parameters that become sparse, searched for in their path; vectors "
    "and what optimizer.freeze names never do.",
    check=PATTERN,
  ),
  "sparsity.dense": Field(
    "",
    "Regular expression of those among them that stay dense, as in '^stem|^patch_embed' for the "
    "first layer or '^head/' for the last; the others keep their share.",
    check=PATTERN,
  ),
  "sparsity.begin_share": Field(
    0.0, "Part of the run before the first change.", "", SHARE, resume=ASK
  ),
  "sparsity.begin_steps": Field(
    0, "In place of begin_share, where not 0.", "steps", at_least(0), ASK
  ),
  "sparsity.end_share": Field(
    0.75,
    "Part of the run after which nothing changes.",
    "",
    Check("in (0, 1]", lambda v: 0 < v <= 1),
    ASK,
  ),
  "sparsity.end_steps": Field(0, "In place of end_share, where not 0.", "steps", at_least(0), ASK),
  "sparsity.every_steps": Field(
    100,
    "Steps between changes. A step that changes the choice takes no step of the optimizer.",
    "steps",
    at_least(1),
    ASK,
  ),
  "sparsity.drop_fraction": Field(
    0.3,
    "Of set and rigl: part of the weights of a layer that a change exchanges.",
    "",
    Check("in (0, 1)", lambda v: 0 < v < 1),
    ASK,
  ),
  "sparsity.drop_anneal": Field(
    "cosine",
    "Of set and rigl: cosine: the part falls to 0 from begin to end | constant.",
    check=one_of("cosine", "constant"),
    resume=ASK,
  ),
  "sparsity.power": Field(
    3.0,
    "Of gradual: sparsity * (1 - (1 - p) ** power), where p rises from 0 to 1 from begin to end.",
    "",
    POSITIVE,
    ASK,
  ),
}
