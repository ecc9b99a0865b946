"""Cases that both the tests of kernels and the cost model run: attention over a random cache."""

from __future__ import annotations

import numpy as np

from .counts import Counts
from .harness import Bench, core
from .scalars import Array

# Of kvq_cuda_attend_W (attend_args.h): warps of a block, channels of values that it sums.
_WARPS = {64: 4, 128: 4, 256: 2}
_SLICE = {64: 64, 128: 128, 256: 128}
# Of kvq_cuda_decode_KIND_W: the kind by the codec of values.
_KINDS = {"f16": "halves", "c8": "pairs", "t1": "trellis", "t2": "trellis"}


def attend_case(
    bench: Bench, file: str, *, keys: str, values: str, n_splits: int = 2, **options: int
) -> tuple[Array, Array, Counts]:
    """Attention of a pass over a cache with random contents.

    Args:
        bench: Where it runs.
        file: The kernels' file: "attend", or "decode" (of one token).
        keys: Codec of keys.
        values: Codec of values.
        n_splits: Parts of the context that blocks share out.
        options: Fields of attend_options that are not to have their default.

    Returns:
        The outputs, those of the C core, and the counts of the attention kernel alone.
    """
    ffi, lib = core().ffi, core().lib
    lib.reference_forget()
    fields = {
        **{"d_head": 64, "n_heads": 2, "group": 3, "sinks": 5, "window": 16, "held": 200, "n": 1},
        **{"chunk_blocks": 2, **options},
    }
    case = lib.attend_case_open(
        ffi.new(
            "attend_options *",
            {"keys": core().codec(keys), "values": core().codec(values), **fields},
        )
    )
    if not case:
        raise ValueError(f"no cache of {keys} and {values} has heads of width {fields['d_head']}")
    bench.share_all()
    heads, rows, d = fields["n_heads"], fields["n"] * fields["group"], int(case.cache.d)
    partial = bench.empty(n_splits * heads * rows * (d + 2) * 4, "partial")
    n_out = rows * heads * fields["d_head"]
    out = bench.empty(n_out * 4, "out")
    shared_fields = {"cache": case.cache, "partial": partial, "n_splits": n_splits}
    arguments = ffi.new("kvq_cuda_attend_args *", {**shared_fields, "q": case.q})
    widest = next(width for width in _WARPS if d <= width)
    per, width = 16 * _WARPS[widest], (d + 8) * 2
    name = f"kvq_cuda_{file}_{widest}"
    if file == "decode":
        name = f"kvq_cuda_decode_{_KINDS[values]}_{widest}"
        grid, threads, shared = (-(-rows // 8), heads, n_splits), 128, 0
    else:
        grid, threads = (-(-rows // per), heads, n_splits * -(-d // _SLICE[widest])), 2 * per
        shared = 2 * per * width + max(40 * width, 80 * _SLICE[widest]) + per * 64
    counts = bench.launch(file, name, grid, threads, arguments[0], dynamic_shared=shared)
    merge = ffi.new("kvq_cuda_merge_args *", {**shared_fields, "out": out})
    bench.launch("merge", "kvq_cuda_merge", (rows, heads), 128, merge[0])
    found = bench.get(out, n_out, "f4")
    wanted = np.frombuffer(bytes(ffi.buffer(case.expected, n_out * 4)), "f4")
    lib.attend_case_close(case)
    return found, wanted, counts
