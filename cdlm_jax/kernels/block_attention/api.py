"""The public function: checks, the choice of an implementation, and the mesh."""

from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from cdlm_jax.config import InputError
from cdlm_jax.kernels.block_attention import gpu, gpu_tiles, reference, tiles, tpu, xla
from cdlm_jax.kernels.block_attention.cache_write import writes_in_place
from cdlm_jax.kernels.block_attention.mesh import per_device, shapes_per_device
from cdlm_jax.mesh import sharding
from cdlm_jax.visibility import Span

Implementation = Literal["tpu", "gpu", "xla"]
KERNELS = {"tpu": (tpu, tiles), "gpu": (gpu, gpu_tiles)}  # platform -> the kernel, and how its work is cut


def block_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    visible_end: jax.Array,
    valid_start: jax.Array | None = None,
    own: Span | None = None,
    layer: jax.Array | int | None = None,
    kv_length: jax.Array | None = None,
    page_table: jax.Array | None = None,
    k_scale: jax.Array | None = None,
    v_scale: jax.Array | None = None,
    scale: float | None = None,
    implementation: Implementation | None = None,
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Attention in which query i of a row sees the keys j < visible_end[row, i].

    Args:
      q: [rows, Q, heads, D].
      k, v: [rows, S, kv_heads, D], or paged: [pages, page_size, kv_heads, D]. Query head h uses key head
        h // (heads / kv_heads). In q's dtype, or int8 with scales.
      visible_end: int32 [rows, Q], or [1, Q] where all rows have the same.
      valid_start: int32 [rows], the first visible key of each row (left padding).
      own: a second range of visible keys of each query (packed training rows).
      layer: int32 scalar, or an int; k, v (and scales) then have a leading axis of layers, of which this one is used. A
        kernel reads it where it is, while `k[layer]` would copy it.
      kv_length: int32 [rows], the slots of each row that hold anything; S if None.
      page_table: int32 [rows, max_pages]: slot j is slot j % page_size of page page_table[row, j // page_size]. Entries
        past a row's last visible key may hold anything.
      k_scale, v_scale: float32 [rows, kv_heads, S], or paged [pages, kv_heads, page_size]: what int8 k and v are
        multiplied by.
      scale: what scores are multiplied by, positive; 1 / sqrt(D) if None.
      implementation: "tpu", "gpu" (Pallas; no gradient, which `training_attention` has) or "xla"; None is the device's
        kernel, if it has one that takes these arguments without a copy of the cache, else "xla".
      return_lse: also return each query's log-sum-exp of scaled scores, by which results over parts of the keys merge.

    Returns:
      out [rows, Q, heads, D] in q's dtype; with return_lse, (out, float32 [rows, Q, heads]). Softmax and sums are in
      float32. Of a query that sees no key, out is finite and without meaning (0 if return_lse), lse is -inf. Slots that
      no query of the row sees are not read by the kernels; on the plain XLA path (no option that concerns keys) they
      must be finite.

    Raises:
      InputError: shapes that do not fit, an implementation that cannot run here, with the reason, or a gradient of a
        kernel.
    """
    _check(
        q, k, v, visible_end, layer, kv_length, valid_start, own, page_table, k_scale, v_scale, scale, implementation
    )
    layer = None if layer is None else jnp.asarray(layer, jnp.int32)
    if implementation is None:
        implementation = _default(q, k, layer, page_table, valid_start, own)
    elif implementation in KERNELS and (reason := _refusal(implementation, q, k, page_table, valid_start, own)):
        named = f"block_attention's implementation {implementation!r}"
        raise InputError(f"{named} cannot run here: {reason}; allowed: 'xla'")

    plain = kv_length is page_table is k_scale is None and not return_lse
    if implementation == "xla" and plain:
        return xla.block_attention(
            q, k, v, visible_end=visible_end, valid_start=valid_start, own=own, layer=layer, scale=scale
        )

    options = {
        "visible_end": jnp.broadcast_to(visible_end, q.shape[:2]),
        "valid_start": valid_start,
        "own": own and jax.tree.map(lambda x: jnp.broadcast_to(x, q.shape[:2]), own),
        "layer": layer,
        "kv_length": kv_length,
        "page_table": page_table,
        "k_scale": k_scale,
        "v_scale": v_scale,
    }
    options = {name: value for name, value in options.items() if value is not None}

    def local(q, k, v, options):
        if implementation == "xla":
            result = reference.block_attention(q, k, v, scale=scale, **options)
            return result if return_lse else result[0]
        kernel = partial(_on_kernel, implementation, scale=scale, return_lse=return_lse)
        return _without_gradient(kernel, implementation)(q, k, v, options)

    return per_device(local, q, k, v, options, return_lse)


def _without_gradient(kernel, implementation: str):
    """kernel(q, k, v, options), of which a gradient is refused with what to do instead."""
    called = jax.custom_jvp(lambda q, k, v, options: kernel(q, k, v, **options))

    @called.defjvp
    def refuse(primals, tangents):
        raise InputError(
            f"block_attention's implementation {implementation!r} has no gradient: use training_attention, or 'xla'"
        )

    return called


def _on_kernel(
    implementation, q, k, v, *, visible_end, layer=None, kv_length=None, page_table=None, scale, return_lse, **scales
):
    """Completes the arguments of the kernel. scales: int8's, which the TPU's alone takes."""
    if layer is None:
        k, v = k[None], v[None]
    else:
        scales = {name: each[layer] for name, each in scales.items()}
    pages = 0
    if page_table is not None:
        pages = page_table.shape[1]
        scales = {name: reference.dense_scale(each, page_table) for name, each in scales.items()}
    kernel, cut = KERNELS[implementation]
    return kernel.block_attention(
        q,
        k,
        v,
        visible_end=jnp.clip(reference.limited(visible_end, kv_length), 0, k.shape[2] * max(1, pages)),
        layer=jnp.zeros((), jnp.int32) if layer is None else layer,
        page_table=page_table,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
        tiles=cut.choose(sharding.device().device_kind, q, k, pages),
        return_lse=return_lse,
        **scales,
    )


def _default(q, k, layer, page_table, valid_start, own) -> Implementation:
    """The device's kernel, if it takes these arguments without a copy of the cache, else XLA."""
    platform = sharding.device().platform
    if platform not in KERNELS or _refusal(platform, q, k, page_table, valid_start, own):
        return "xla"
    # XLA writes such a cache, in a layout that the kernel cannot read.
    copied = platform == "tpu" and layer is not None and page_table is None and not writes_in_place(k, 1)
    return "xla" if copied else platform


def _refusal(implementation, q, k, page_table, valid_start, own) -> str | None:
    """Why this kernel cannot run here; None if it can."""
    if (device := sharding.device()).platform != implementation:
        return f"the device is a {device.platform}"
    if valid_start is not None or own is not None:
        return "it has neither valid_start nor own"
    page_size, pages = (None, 0) if page_table is None else (k.shape[-3], page_table.shape[1])
    q, k = shapes_per_device(q, k, page_table is not None)
    if implementation == "tpu":
        return tpu.refusal(q, k, page_size, pages)
    return gpu.refusal(q, k, page_size, device.device_kind)


def _check(
    q, k, v, visible_end, layer, kv_length, valid_start, own, page_table, k_scale, v_scale, scale, implementation
):
    if implementation is not None and implementation not in get_args(Implementation):
        allowed = ", ".join(map(repr, get_args(Implementation)))
        raise InputError(f"unknown implementation {implementation!r} of block_attention, allowed: {allowed}")
    shape = k.shape if layer is None else k.shape[1:]
    if q.ndim != 4 or len(shape) != 4 or k.shape != v.shape:
        stack = "" if layer is None else "layers, "
        raise InputError(
            f"q must be [rows, Q, heads, D] and k, v [{stack}rows, S, kv_heads, D], got {q.shape}, {k.shape}, {v.shape}"
        )
    if q.shape[2] % shape[2] or q.shape[3] != shape[3] or (page_table is None and q.shape[0] != shape[0]):
        raise InputError(f"q {q.shape} and k {k.shape} must agree in rows and D, with kv_heads a divisor of heads")
    if 0 in k.shape:
        raise InputError(f"k and v must hold a slot, got {k.shape}")
    if layer is not None and jnp.ndim(layer) != 0:
        raise InputError(f"layer must be a scalar, got {jnp.shape(layer)}")
    bounds = {"visible_end": visible_end} | ({} if own is None else {"own's start": own.start, "own's end": own.end})
    for name, bound in bounds.items():
        if bound.shape not in (q.shape[:2], (1, q.shape[1])):
            raise InputError(f"{name} must be [rows, Q] = {q.shape[:2]} (or one row for all), got {bound.shape}")
    for name, each in (("kv_length", kv_length), ("valid_start", valid_start)):
        if each is not None and jnp.shape(each) != q.shape[:1]:
            raise InputError(f"{name} must be [rows] = {q.shape[:1]}, got {jnp.shape(each)}")
    if page_table is not None and (page_table.ndim != 2 or page_table.shape[0] != q.shape[0]):
        raise InputError(f"page_table must be [rows, max_pages] of {q.shape[0]} rows, got {page_table.shape}")
    scales = [each for each in (k_scale, v_scale) if each is not None]
    expected = (*k.shape[:-3], k.shape[-2], k.shape[-3])
    if len(scales) != (2 if k.dtype == jnp.int8 else 0) or any(each.shape != expected for each in scales):
        got = [each if each is None else each.shape for each in (k_scale, v_scale)]
        raise InputError(f"int8 k and v, and no others, need k_scale and v_scale {expected}; k is {k.dtype}, got {got}")
    if k.dtype != v.dtype or (not scales and k.dtype != q.dtype):
        raise InputError(f"k and v must have q's dtype {q.dtype} or be int8, got {k.dtype}, {v.dtype}")
    if scale is not None and scale <= 0:
        raise InputError(f"scale must be positive, got {scale}")
