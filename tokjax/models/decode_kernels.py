"""The two kernels of which a token's pass on a GPU is made.

A token's pass reads every weight once and computes next to nothing: it is as fast as the memory as
long as few kernels are started. `project` is a product with all that surrounds it (the norm before
it; scale, bias, gate and residual behind it); `attend` is rotation, the cache's update and
attention. Five kernels make a layer. Both are Pallas kernels compiled by Triton.
"""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

from tokjax.models.transposed import Transposed

try:
    from jax.experimental.pallas import triton as pltriton
except ImportError:  # a JAX without Triton; `available` says so
    pltriton = None

ROWS = 16  # least rows of a product on tensor cores; fewer than that, but one, are padded
MOST_ROWS = 64
_EXCLUDED = -1e30
_UNROLLED = 16  # most tiles of a row that are written out, so that their loads start together


def available() -> bool:
    """Returns whether this JAX has what the kernels are written in."""
    return pltriton is not None


@dataclass(frozen=True)
class Norm:
    """A root-mean-square norm of what a product reads.

    Attributes:
        eps: added to the mean of squares.
        plus_one: the weights are off by one.
    """

    eps: float
    plus_one: bool

    def scale(self, weights: jax.Array) -> jax.Array:
        """Returns the factors of normalised inputs."""
        weights = weights.astype(jnp.float32)
        return weights + 1.0 if self.plus_one else weights


@dataclass(frozen=True)
class Tile:
    """How a product is cut.

    Attributes:
        outputs: of one program.
        inputs: read at a time.
        warps: of one program.
        stages: reads on their way at a time, for several rows.
    """

    outputs: int
    inputs: int
    warps: int = 4
    stages: int = 4


def padded_rows(batch: int) -> int:
    """Returns the rows of states that the kernels compute with for a batch."""
    return 1 if batch == 1 else -(-batch // ROWS) * ROWS


def fits(width: int) -> bool:
    """Returns whether products may have this many inputs or outputs."""
    return width % 64 == 0


def _power_of_two(width: int, most: int) -> int:
    return min(width & -width, most)


def tile(rows: int, inputs: int, outputs: int, gated: bool) -> Tile:
    """Returns how to cut a product of so many rows of states.

    Args:
        rows: of states.
        inputs: numbers of each.
        outputs: of the product; with a gate, of each half.
        gated: the product has two halves.
    """
    # Found by timing on an H100: a tile for each number of rows, matrices of 2048 x 2048 and up.
    if rows == 1:
        most = Tile(4, 256, 1, 1) if gated else Tile(4, 512, 4, 1)
    else:
        most = Tile(16, 256, 1, 3) if outputs >= 4096 else Tile(16, 256, 2, 4)
    return dataclasses.replace(
        most,
        outputs=_power_of_two(outputs, most.outputs),
        inputs=_power_of_two(inputs, most.inputs),
    )


def project(
    x: Float[Array, "R N"],
    w: Transposed,
    *,
    squares: tuple[Norm, Float[Array, "R P"]] | None = None,
    bias: Float[Array, "M"] | None = None,
    residual: Float[Array, "R M"] | None = None,
    gate: Callable | None = None,
    following: tuple[Norm, Float[Array, "M"]] | None = None,
    dtype: Any = None,
    interpret: bool = False,
    cut: Tile | None = None,
) -> Any:
    """Returns x times a matrix, plus what is given to be added: [R, F].

    A norm between two products costs no kernel of its own. The first product also returns its
    result times the norm's weights, and sums of its squares; the second reads the former and
    divides its own result by the root of the latter.

    Args:
        x: one row, or a multiple of `ROWS`.
        w: the matrix.
        squares: where x is to be normalised still: by which norm, and sums of squares that add up
            to those of its rows.
        bias: added to the product.
        residual: added to the result.
        gate: an activation; the first half of the product goes through it and multiplies the other.
        following: the norm behind the result and its weights; the result is then a triple of
            itself, itself times the weights, and sums of its squares.
        dtype: of the result; default that of x.
        interpret: runs without a GPU.
        cut: how to cut the product; default `tile`.
    """
    R, N = x.shape
    M = w.values.shape[0]
    width = M if gate is None else M // 2
    cut = tile(R, N, width, gate is not None) if cut is None else cut
    dtype = x.dtype if dtype is None else dtype
    optional = {
        "squares": None if squares is None else squares[1],
        "scale": w.scale,
        "bias": bias,
        "residual": residual,
        "following": None if following is None else following[1],
    }
    given = {"x": x, "w": w.values} | {k: v for k, v in optional.items() if v is not None}
    programs = width // cut.outputs
    shapes = [jax.ShapeDtypeStruct((R, width), dtype)]
    if following is not None:
        shapes += [shapes[0], jax.ShapeDtypeStruct((R, programs), jnp.float32)]
    kernel = functools.partial(
        _project,
        names=tuple(given),
        cut=cut,
        norms=tuple(None if n is None else n[0] for n in (squares, following)),
        halves=(0,) if gate is None else (0, width),
        gate=gate,
    )
    found = pl.pallas_call(
        kernel,
        out_shape=shapes,
        grid=(programs,),
        name="project",
        **_compiled(cut.warps, cut.stages, interpret),
    )(*given.values())
    return found[0] if following is None else tuple(found)


def _compiled(warps: int, stages: int, interpret: bool) -> dict[str, Any]:
    if interpret:
        return {"interpret": True}
    assert pltriton is not None
    params = pltriton.CompilerParams(num_warps=warps, num_stages=stages)
    return {"compiler_params": params}


def _project(*refs, names, cut: Tile, norms, halves, gate) -> None:
    given, (out, *more) = dict(zip(names, refs, strict=False)), refs[len(names) :]
    x, w = given["x"], given["w"]
    rows, inputs = x.shape
    number = pl.program_id(0)
    first, count = number * cut.outputs, inputs // cut.inputs
    places = [pl.ds(half + first, cut.outputs) for half in halves]
    products = _of_one_row if rows == 1 else _of_many_rows
    found = []
    for place, y in zip(places, products(x, w, places, cut, count), strict=True):
        if "squares" in given:
            total = _row_sums(given["squares"])
            y = y * jax.lax.rsqrt(total / inputs + norms[0].eps)[:, None]
        if "scale" in given:
            y = y * given["scale"][place].astype(jnp.float32)[None, :]
        if "bias" in given:
            y = y + given["bias"][place].astype(jnp.float32)[None, :]
        # Rounded where separate kernels would round.
        found.append(y.astype(x.dtype).astype(jnp.float32) if gate is not None else y)
    y = found[0] if gate is None else gate(found[0]) * found[1]
    here = places[0]
    if "residual" in given:
        y = y.astype(x.dtype).astype(jnp.float32) + given["residual"][:, here].astype(jnp.float32)
    y = y.astype(out.dtype)
    out[:, here] = y
    if "following" in given:
        wide = y.astype(jnp.float32)
        weights = norms[1].scale(given["following"][here])
        more[0][:, here] = (wide * weights[None, :]).astype(out.dtype)
        more[1][:, number] = (wide * wide).sum(axis=1)


def _of_one_row(x, w, places, cut: Tile, count: int) -> list[jax.Array]:
    """One row of states: products and sums, without tensor cores."""

    def add(j, sums):
        at = pl.ds(j * cut.inputs, cut.inputs)
        states = x[0, at].astype(jnp.float32)
        values = [w[place, at] for place in places]
        return [
            s + v.astype(jnp.float32) * states[None, :] for s, v in zip(sums, values, strict=True)
        ]

    sums = [jnp.zeros((cut.outputs, cut.inputs), jnp.float32) for _ in places]
    if count > _UNROLLED:
        sums = jax.lax.fori_loop(0, count, add, sums)
    else:
        for j in range(count):
            sums = add(j, sums)
    return [each.sum(axis=1)[None, :] for each in sums]


def _of_many_rows(x, w, places, cut: Tile, count: int) -> list[jax.Array]:
    """Rows that fill a tile of the tensor cores."""

    def add(j, sums):
        at = pl.ds(j * cut.inputs, cut.inputs)
        states = x[:, at]
        return [
            s + _product(states, w[place, at].astype(states.dtype))
            for s, place in zip(sums, places, strict=True)
        ]

    zeros = [jnp.zeros((x.shape[0], cut.outputs), jnp.float32) for _ in places]
    return jax.lax.fori_loop(0, count, add, zeros)


def _row_sums(ref: Any) -> jax.Array:
    """Returns the sums over an axis of any length."""
    rows, columns = ref.shape
    size = 1 << (columns - 1).bit_length()
    if size == columns:
        return ref[:, :].sum(axis=1)
    mask = jnp.broadcast_to((jnp.arange(size) < columns)[None, :], (rows, size))
    return _load(ref, (pl.ds(0, rows), pl.ds(0, size)), mask).sum(axis=1)


@dataclass(frozen=True)
class Attention:
    """What is static about a layer's attention.

    Attributes:
        heads: of queries.
        kv_heads: of keys and values.
        width: of a head.
        scale: of the products of queries and keys.
        softcap: bound on a score, or None.
        norm: of each head's query and key, or None.
    """

    heads: int
    kv_heads: int
    width: int
    scale: float
    softcap: float | None = None
    norm: Norm | None = None


@dataclass(frozen=True)
class Walk:
    """How a row's slots are walked over.

    Attributes:
        block: slots read at a time.
        splits: parts of the slots, each a program's.
        warps: of one program.
        stages: blocks on their way at a time.
    """

    block: int
    splits: int
    warps: int
    stages: int


def walk(rows: int, kv_heads: int, slots: int) -> Walk:
    """Returns how to walk over so many rows' slots: long ones in parts that fill a GPU."""
    programs = rows * kv_heads
    splits = max(1, min(-(-slots // 512), -(-264 // programs)))
    return Walk(64, splits, 2, 3) if programs >= 128 else Walk(128, splits, 4, 3)


def attend(
    settings: Attention,
    qkv: Float[Array, "R W"],
    keys: Float[Array, "B K S d"],
    values: Float[Array, "B K S d"],
    lengths: Int[Array, "B"],
    rotary: tuple[Float[Array, "B r"], Float[Array, "B r"]],
    norms: tuple[Float[Array, "d"], Float[Array, "d"]] | None = None,
    *,
    interpret: bool = False,
    by: Walk | None = None,
) -> tuple[Float[Array, "R F"], Float[Array, "B K S d"], Float[Array, "B K S d"]]:
    """Returns what each row's new token attends to, and the cache with its key and value.

    Args:
        settings: of the layer.
        qkv: queries, keys and values side by side, before norm and rotation.
        keys: of earlier tokens; written in place.
        values: likewise.
        lengths: number of earlier tokens.
        rotary: cosines and sines of half a head's width.
        norms: weights of the norms of queries and of keys.
        interpret: runs without a GPU.
        by: how to walk over the slots; default `walk`.
    """
    R, (B, K, S, d), H = qkv.shape[0], keys.shape, settings.heads
    by = walk(B, K, S) if by is None else by
    given = [qkv.reshape(R, -1, d), keys, values, lengths, *rotary, *(norms or ())]
    shapes = [
        jax.ShapeDtypeStruct(keys.shape, keys.dtype),
        jax.ShapeDtypeStruct(values.shape, values.dtype),
    ]
    if by.splits == 1:
        shapes.append(jax.ShapeDtypeStruct((R, H, d), qkv.dtype))
    else:
        for shape in ((R, H, by.splits, d), (R, H, by.splits), (R, H, by.splits)):
            shapes.append(jax.ShapeDtypeStruct(shape, jnp.float32))
    keys, values, *found = pl.pallas_call(
        functools.partial(_attend, settings=settings, by=by, n=len(given)),
        out_shape=shapes,
        grid=(B, K, by.splits),  # what lies in padded rows is nobody's
        input_output_aliases={1: 0, 2: 1},
        name="attend",
        **_compiled(by.warps, by.stages, interpret),
    )(*given)
    if by.splits == 1:
        return found[0].reshape(R, H * d), keys, values
    sums, largest, totals = found
    share = jnp.exp(largest - largest.max(-1, keepdims=True))
    out = (sums * share[..., None]).sum(2) / (totals * share).sum(-1)[..., None]
    return out.astype(qkv.dtype).reshape(R, H * d), keys, values


def _attend(*refs, settings: Attention, by: Walk, n: int) -> None:
    qkv, keys, values, lengths, cosines, sines, *norms = refs[:n]
    new_keys, new_values, *outs = refs[n:]
    row, kv, part = (pl.program_id(axis) for axis in range(3))
    _, kv_heads, slots, d = keys.shape
    half, group, block = d // 2, settings.heads // kv_heads, by.block
    size = max(ROWS, 1 << (group - 1).bit_length())
    length = lengths[row]
    cos, sin = cosines[row, :], sines[row, :]
    members = jnp.arange(size) < group

    def heads_of(first: Any, count: int, start: int, width: int) -> jax.Array:
        """Returns part of the vectors of heads from `first` on, [size, width]."""
        mask = jnp.broadcast_to((jnp.arange(size) < count)[:, None], (size, width))
        return _load(qkv, (row, pl.ds(first, size), pl.ds(start, width)), mask)

    def turned(first: Any, count: int, which: int) -> tuple:
        """Returns both halves of rotated queries or keys."""
        low, high = (
            heads_of(first, count, at, half).astype(jnp.float32) for at in (0, half)
        )  # fmt: skip
        if settings.norm is not None:
            squares = ((low * low).sum(axis=1) + (high * high).sum(axis=1)) / d
            factor = jax.lax.rsqrt(squares + settings.norm.eps)[:, None]
            scales = [settings.norm.scale(norms[which][pl.ds(at, half)]) for at in (0, half)]
            low, high = (
                (a * factor * g[None, :]).astype(qkv.dtype).astype(jnp.float32)
                for a, g in zip((low, high), scales, strict=True)
            )
        c, s = cos[None, :], sin[None, :]
        return tuple(a.astype(keys.dtype) for a in (low * c - high * s, high * c + low * s))

    query = turned(kv * group, group, 0)
    # The new key and value lie in the first of the rows, zeros in the others.
    key = turned(settings.heads + kv, 1, 1)
    value = heads_of(settings.heads + kv_heads + kv, 1, 0, d).astype(values.dtype)
    slot = jnp.minimum(length, slots - 1)
    writes = (part == 0) & (length < slots)
    alone = (jnp.arange(size) == 0) & writes

    def put(ref: Any, at: int, new: jax.Array) -> None:
        width = new.shape[1]
        mask = jnp.broadcast_to(alone[:, None], (size, width))
        _store(ref, (row, kv, pl.ds(slot, size), pl.ds(at, width)), new, mask)

    put(new_keys, 0, key[0])
    put(new_keys, half, key[1])
    put(new_values, 0, value)

    def capped(score: Any) -> jax.Array:
        score = score * settings.scale
        if settings.softcap is None:
            return score
        return settings.softcap * jnp.tanh(score / settings.softcap)

    # The new token is in no program's part of the cache: the first one adds it.
    own_key = [k.astype(jnp.float32).sum(axis=0) for k in key]
    own: Any = sum(
        (q.astype(jnp.float32) * k[None, :]).sum(axis=1)
        for q, k in zip(query, own_key, strict=True)
    )
    has_own = jnp.broadcast_to(part == 0, (size,))
    largest = jnp.where(has_own, capped(own), _EXCLUDED)
    total = jnp.broadcast_to(jnp.maximum(1 - part, 0).astype(jnp.float32), (size,))
    own_value = value.astype(jnp.float32).sum(axis=0)
    out = total[:, None] * own_value[None, :]

    def add(j, carry):
        largest, total, out = carry
        at = j * block + jnp.arange(block)
        seen = (at < length)[None, :]
        inside = at < slots
        place = pl.ds(j * block, block)

        def stored(ref: Any, start: int, width: int) -> jax.Array:
            mask = jnp.broadcast_to(inside[:, None], (block, width))
            return _load(ref, (row, kv, place, pl.ds(start, width)), mask)

        score: Any = sum(
            _product(q, stored(keys, start, half))
            for q, start in zip(query, (0, half), strict=True)
        )
        score = jnp.where(seen, capped(score), _EXCLUDED)
        now = jnp.maximum(largest, score.max(axis=1))
        share = jnp.where(seen, jnp.exp(score - now[:, None]), 0.0)
        before = jnp.exp(largest - now)
        found = _product(share.astype(values.dtype), stored(values, 0, d), transposed=False)
        return now, total * before + share.sum(axis=1), out * before[:, None] + found

    blocks = -(-slots // block)
    each = -(-blocks // by.splits)
    first = part * each
    last = jnp.minimum((part + 1) * each, (jnp.minimum(length, slots) + block - 1) // block)
    largest, total, out = jax.lax.fori_loop(first, last, add, (largest, total, out))
    mine = (row, pl.ds(kv * group, size))
    wide = jnp.broadcast_to(members[:, None], (size, d))
    if len(outs) == 1:
        _store(outs[0], (*mine, pl.ds(0, d)), (out / total[:, None]).astype(qkv.dtype), wide)
        return
    _store(outs[0], (*mine, part, pl.ds(0, d)), out, wide)
    _store(outs[1], (*mine, part), largest, members)
    _store(outs[2], (*mine, part), total, members)


def _product(x: jax.Array, w: jax.Array, transposed: bool = True) -> jax.Array:
    """Returns x @ w.T, or x @ w, on tensor cores."""
    return pltriton.dot(x, w, trans_b=transposed)  # type: ignore[union-attr]


def _load(ref: Any, at: tuple, mask: jax.Array) -> jax.Array:
    """Returns part of an array, zeros where the mask is false."""
    return pltriton.load(ref.at[at], mask=mask, other=0.0)  # type: ignore[union-attr]


def _store(ref: Any, at: tuple, value: jax.Array, mask: jax.Array) -> None:
    pltriton.store(ref.at[at], value, mask=mask)  # type: ignore[union-attr]
