"""Vision Transformers: patches as tokens, blocks of attention and MLP (arXiv:2010.11929).

Every net of the family is a set of fields: those of timm (the defaults), of big_vision
(arXiv:2106.10270, arXiv:2205.01580) and DeiT-III (arXiv:2204.07118); README.md lists them. timm's
and torchvision's weights fit one to one, by the table of vit_names.py.

Learned positions belong to the grid of the largest training images. For images of another size they
are resampled, so that a model takes any size that its patches divide. Parameters are whole where
they meet activations, however they are sharded, so heads are never split over devices.

The residual stream has the dtype of the config; norms, softmax, and all that follows the last block
are float32 at least.
"""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from configs.fields import Fields
from trainer.models import names, stack, staged, vit_names
from trainer.models.layers import LayerScale, layer_norm
from trainer.models.vit_fields import VARIANTS
from trainer.models.vit_fields import VIT as FIELDS

_XAVIER = nnx.initializers.xavier_uniform()


class Shape(NamedTuple):
  """Sizes of the blocks of a net.

  Attributes:
    width: channels of a token.
    depth: number of blocks.
    heads: of the attention.
    mlp: channels inside the MLP.
  """

  width: int
  depth: int
  heads: int
  mlp: int


def shape_of(fields: Mapping[str, Any]) -> Shape:
  """Return the sizes that `fields` give, or else the variant."""
  width, depth, heads = (
    fields[name] or default
    for name, default in zip(("width", "depth", "heads"), VARIANTS[fields["variant"]], strict=True)
  )
  return Shape(width, depth, heads, fields["mlp"] or 4 * width)


class Block(nnx.Module):
  """Attention, then an MLP, each behind a norm and beside a shortcut.

  Args:
    shape: sizes of the net.
    fields: values of ViT.FIELDS.
    dtype: of activations.
    rngs: with the stream `params`, and `dropout` where there is any.
  """

  def __init__(
    self, shape: Shape, fields: Mapping[str, Any], dtype: jax.typing.DTypeLike, rngs: nnx.Rngs
  ):
    wide = jnp.promote_types(dtype, jnp.float32)
    options: dict[str, Any] = {"dtype": dtype, "param_dtype": wide, "rngs": rngs}
    width, mlp = shape.width, shape.mlp
    tiny = nnx.initializers.normal(1e-6)
    self.dtype, self.heads, self.exact = dtype, shape.heads, fields["gelu"] == "exact"
    self.norm1, self.norm2 = (
      layer_norm(width, fields["norm_epsilon"], wide, rngs) for _ in range(2)
    )
    # Query, key and value in one product, each drawn as a [width, width] matrix by itself: twice
    # the variance makes up for a fan that is twice as large.
    self.qkv = nnx.Linear(
      width,
      3 * width,
      kernel_init=nnx.initializers.variance_scaling(2.0, "fan_avg", "uniform"),
      **options,
    )
    self.projection = nnx.Linear(width, width, kernel_init=_XAVIER, **options)
    self.mlp1 = nnx.Linear(width, mlp, kernel_init=_XAVIER, bias_init=tiny, **options)
    self.mlp2 = nnx.Linear(mlp, width, kernel_init=_XAVIER, bias_init=tiny, **options)
    self.scales = fields["layer_scale"] > 0
    if self.scales:
      self.scale1, self.scale2 = (LayerScale(width, fields["layer_scale"], wide) for _ in range(2))
    self.drops = fields["dropout"] > 0
    if self.drops:
      self.drop1, self.drop2, self.drop3 = (
        nnx.Dropout(fields["dropout"], rngs=rngs) for _ in range(3)
      )

  def __call__(self, x: jax.Array, branch_scale: jax.Array | None = None) -> jax.Array:
    """Return x [N, tokens, width], in its dtype.

    Args:
      x: tokens.
      branch_scale: [N, 2, 1], multiplies the two branches: stochastic depth. None for 1.
    """
    for branch in range(2):
      y = self._mlp(x) if branch else self._attend(x)
      if self.scales:
        y = (self.scale2 if branch else self.scale1)(y)
      if branch_scale is not None:
        y = (y * jax.lax.slice_in_dim(branch_scale, branch, branch + 1, axis=1)).astype(y.dtype)
      x = x + y
    return x

  def _attend(self, x: jax.Array) -> jax.Array:
    n, tokens, width = x.shape
    qkv = self.qkv(self.norm1(x).astype(self.dtype))
    qkv = qkv.reshape(n, tokens, 3, self.heads, width // self.heads)
    # Not by indices, which become gathers where the number of images is free.
    query, key, value = (jax.lax.index_in_dim(qkv, i, axis=2, keepdims=False) for i in range(3))
    y = self.projection(attend(query, key, value).reshape(n, tokens, width))
    return self.drop1(y) if self.drops else y

  def _mlp(self, x: jax.Array) -> jax.Array:
    y = self.mlp1(self.norm2(x).astype(self.dtype))
    y = nnx.gelu(y, approximate=not self.exact)
    y = self.mlp2(self.drop2(y) if self.drops else y)
    return self.drop3(y) if self.drops else y


def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
  """Return the attention of each head, of queries, keys and values [N, tokens, heads, channels].

  The softmax is of float32, or of float64 with it.
  """
  if query.dtype != jnp.float64:
    return jax.nn.dot_product_attention(query, key, value)
  # The library rounds to float32 before its softmax, here too.
  scores = jnp.einsum("nqhc,nkhc->nhqk", query, key) / query.shape[-1] ** 0.5
  return jnp.einsum("nhqk,nkhc->nqhc", jax.nn.softmax(scores), value)


class ViT(staged.Stacked):
  """Patch embedding, blocks, norm, class token or mean of tokens, linear head."""

  FIELDS: ClassVar[Fields] = FIELDS
  TRIAL: ClassVar[Mapping[str, Any]] = {"patch": 8, "width": 16, "depth": 3, "heads": 2, "mlp": 32}
  NO_DECAY = ("^class_token$", "^positions$")
  RESIZES = True

  @classmethod
  def describe(cls, fields: Mapping[str, Any]) -> str:
    """Return "ViT-S/16, pool mean" and the like, with all values that are not the default."""
    title = f"ViT-{fields['variant']}/{fields['patch']}"
    return cls.titled(title, fields, "variant", "patch")

  @classmethod
  def torch_name(cls, leaf: str, fields: Mapping[str, Any]) -> str:
    """Return the name that timm uses; see Family."""
    return vit_names.torch_name(leaf, fields)

  @classmethod
  def respell(cls, tensors: Mapping[str, np.ndarray], library: str) -> dict[str, np.ndarray]:
    """Return a state dict as torchvision has it, or timm; see Family."""
    return vit_names.respell(tensors, library)

  @classmethod
  def guess(cls, shapes: Mapping[str, tuple[int, ...]]) -> names.Looks | None:
    """Return "vit_base_patch16_224" and the like; see Family."""
    return vit_names.guess(shapes)

  @classmethod
  def check(cls, fields: Mapping[str, Any]) -> None:
    """Refuse heads that do not divide the width, and what the pool has no use for; see Family."""
    width, _, heads, _ = shape_of(fields)
    if width % heads:
      raise ValueError(
        f"config.model.heads makes {heads} heads, which do not divide the {width} channels of "
        "config.model.width."
      )
    if fields["positions"] == "sincos2d" and (width % 4 or width < 8):
      raise ValueError(
        "config.model.positions is 'sincos2d', which needs a config.model.width of 8 or more that "
        f"4 divides; it is {width}."
      )
    if fields["pool_first"] and fields["pool"] != "mean":
      raise ValueError(
        "config.model.pool_first is True, which needs config.model.pool to be 'mean'; it is "
        f"{fields['pool']!r}."
      )

  @classmethod
  def check_image(cls, fields: Mapping[str, Any], *, name: str, size: int, space: int) -> None:
    """Refuse sizes that patches do not divide, or whose rows do not lie evenly; see Family."""
    patch = fields["patch"]
    if size % patch:
      raise ValueError(
        f"{name} has {size} pixels, which patches of config.model.patch = {patch} do not divide; "
        f"the nearest that fits is {max(1, round(size / patch)) * patch}."
      )
    if size // patch % space:
      raise ValueError(
        f"{name} has {size} pixels, {size // patch} rows of patches, which config.mesh.space = "
        f"{space} does not divide."
      )

  @classmethod
  def build(
    cls,
    fields: Mapping[str, Any],
    *,
    num_classes: int,
    dtype: jax.typing.DTypeLike,
    image_size: int,
    shards: int,
    rngs: nnx.Rngs,
  ) -> Self:
    """Return a new model, with positions for images of this size; see Family."""
    del shards
    cls.check_image(fields, name="config.data.image_size", size=image_size, space=1)
    return cls(fields, num_classes, jnp.dtype(dtype), image_size // fields["patch"], rngs)

  @classmethod
  def resize(
    cls, leaf: str, array: np.ndarray, shape: tuple[int, ...], fields: Mapping[str, Any]
  ) -> np.ndarray | None:
    """Return learned positions, resampled to another grid; see Family."""
    apart = _has_token_position(fields)
    if leaf != "positions" or array.ndim != 3 or array.shape[::2] != shape[::2]:
      return None
    grids = [round((size - apart) ** 0.5) for size in (array.shape[1], shape[1])]
    if [grid**2 + apart for grid in grids] != [array.shape[1], shape[1]]:
      return None
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
      patches = resample(jnp.asarray(array[:, apart:]), grids[0], (grids[1], grids[1]))
    return np.concatenate([array[:, :apart], np.asarray(patches)], axis=1)

  def __init__(
    self,
    fields: Mapping[str, Any],
    num_classes: int,
    dtype: jax.typing.DTypeLike,
    grid: int,
    rngs: nnx.Rngs,
  ):
    """Build the embedding, the blocks and the head.

    Args:
      fields: values of FIELDS.
      num_classes: of the head.
      dtype: of activations.
      grid: rows of patches that learned positions are for, and columns.
      rngs: see Family.build.
    """
    shape = shape_of(fields)
    width = shape.width
    wide = jnp.promote_types(dtype, jnp.float32)
    options: dict[str, Any] = {"dtype": wide, "param_dtype": wide, "rngs": rngs}
    self.dtype, self.wide, self.width, self.grid = dtype, wide, width, grid
    self.patch = fields["patch"]
    self.pools_token, self.pools_first = fields["pool"] == "token", fields["pool_first"]
    self.patch_embed = nnx.Conv(
      3,
      width,
      (self.patch, self.patch),
      strides=self.patch,
      padding="VALID",
      **options | {"dtype": dtype},
    )
    if self.pools_token:
      self.class_token = nnx.Param(jnp.zeros((1, 1, width), wide))
    self.learns = fields["positions"] == "learned"
    self.apart = int(_has_token_position(fields))
    if self.learns:
      drawn = nnx.initializers.normal(width**-0.5)
      self.positions = nnx.Param(drawn(rngs.params(), (1, grid * grid + self.apart, width), wide))
    for i in range(1, shape.depth + 1):
      setattr(self, f"block{i}", Block(shape, fields, dtype, rngs))
    self.blocks = tuple(f"block{i}" for i in range(1, shape.depth + 1))
    self.norm = layer_norm(width, fields["norm_epsilon"], wide, rngs)
    self.represents = fields["pre_logits"]
    if self.represents:
      self.pre_logits = nnx.Linear(width, width, **options)
    self.head = nnx.Linear(
      width,
      num_classes,
      kernel_init=nnx.initializers.zeros_init()
      if fields["zero_init_head"]
      else nnx.initializers.lecun_normal(),
      bias_init=nnx.initializers.constant(fields["head_bias_init"]),
      **options,
    )
    rates = staged.rates_by_block(fields["drop_path"], shape.depth, last=True)
    self._keep(fields, rates, rngs)

  def tokens(self, x: jax.Array) -> jax.Array:
    """Return the output of the last block, [N, tokens, width] in the model's dtype.

    The class token, if there is one, is the first; patches follow row by row.

    Args:
      x: normalised images, floating point [N, H, W, 3].
    """
    if x.shape[1] % self.patch or x.shape[2] % self.patch:
      raise ValueError(
        f"Images have {x.shape[1]} x {x.shape[2]} pixels, which patches of {self.patch} do not "
        "divide."
      )
    x = self.patch_embed(x.astype(self.dtype))
    n, rows, columns, _ = x.shape
    x = x.reshape(n, rows * columns, self.width)
    if self.pools_token:  # it is added to zeros, which needs no copy of it for each image
      x = jnp.pad(x, ((0, 0), (1, 0), (0, 0)))
    x = (x + self._added(rows, columns)).astype(self.dtype)
    if self.drops:
      x = self.dropout(x)
    paths = self._draw_paths(shape=(2, 1))
    blocks = [getattr(self, name) for name in self.blocks]
    return stack.run(blocks, x, first=0, extras=paths, scan=self.scan, remat=self.remat)

  def _added(self, rows: int, columns: int) -> jax.Array:
    """Return what is added to the tokens of a grid of patches, [1, tokens, width]."""
    nothing = jnp.zeros((1, 0, self.width), self.wide)
    token = self.class_token.get_value() if self.pools_token else nothing
    if self.learns:
      patches = self.positions.get_value()
      if self.apart:
        token, patches = token + patches[:, :1], patches[:, 1:]
      if (rows, columns) != (self.grid, self.grid):
        patches = resample(patches, self.grid, (rows, columns))
    else:
      patches = jnp.asarray(sincos(rows, columns, self.width), self.wide)
    return jnp.concatenate([token, patches], axis=1)

  def __call__(self, x: jax.Array) -> jax.Array:
    """Return float32 logits [N, num_classes].

    Args:
      x: normalised images, floating point [N, H, W, 3], of any size that the patches divide.
    """
    x = self.tokens(x)
    if self.pools_token:
      x = self.norm(jax.lax.index_in_dim(x, 0, axis=1, keepdims=False))
    elif self.pools_first:
      x = self.norm(jnp.mean(x, axis=1, dtype=self.wide))
    else:
      x = jnp.mean(self.norm(x), axis=1)
    if self.represents:
      x = jnp.tanh(self.pre_logits(x))
    return self.head(x)


def _has_token_position(fields: Mapping[str, Any]) -> int:
  """Return how many of the learned positions are of no patch: 1 or 0."""
  learns, has_token = fields["positions"] == "learned", fields["pool"] == "token"
  return int(learns and has_token and fields["token_position"])


def resample(positions: jax.Array, grid: int, to: tuple[int, int]) -> jax.Array:
  """Return positions of another grid, by antialiased bicubic interpolation as in timm.

  Args:
    positions: [1, grid * grid, width], row by row.
    grid: rows and columns that they are for.
    to: rows and columns that are wanted.

  Returns:
    [1, rows * columns, width].
  """
  width = positions.shape[-1]
  square = positions.reshape(1, grid, grid, width)
  return jax.image.resize(square, (1, *to, width), "cubic").reshape(1, to[0] * to[1], width)


def sincos(rows: int, columns: int, width: int) -> np.ndarray:
  """Return sines and cosines of the place of each patch, float64 [1, rows * columns, width].

  A quarter of the channels each: sines and cosines along x, then along y, at frequencies that fall
  geometrically from 1 to 1/10000 (big_vision's sincos2d, after arXiv:2104.02057). timm's falls
  short of the last.
  """
  frequencies = 10_000.0 ** -np.linspace(0, 1, width // 4)
  y, x = np.divmod(np.arange(rows * columns), columns)
  parts = [np.outer(places, frequencies) for places in (x, y)]
  return np.concatenate([f(part) for part in parts for f in (np.sin, np.cos)], axis=1)[None]
