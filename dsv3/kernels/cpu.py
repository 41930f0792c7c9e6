"""What the loops for a CPU share: bits read as numbers, tensors as arrays, threads.

The loops are written in Python and compiled by Numba: the first call in a process compiles for its
processor, or loads what an earlier one left. (Numba asks whether the file of a loop has changed,
and not whether a module has that it uses: after a change here, empty ``__pycache__``.)
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types
from numba.core.cgutils import get_or_insert_function
from numba.extending import intrinsic, overload
from numba.np.numpy_support import as_dtype
from torch import Tensor

# What a compiler may do with a loop in which the order of sums does not matter.
ANY_ORDER = {"reassoc", "contract", "nsz"}
BF16_NAN = np.int16(0x7FC0)
LINE = 64  # bytes that come from memory at once
NEIGHBOURS = LINE // 4  # results that threads had better not part, lest two write to one line
# A number as loops see it, by what torch calls it; a bfloat16 is its bits.
ONE = {torch.float32: np.float32(0.0), torch.float64: np.float64(0.0), torch.bfloat16: np.int16(0)}
# Multiplications that are worth a thread of their own.
_FOR_A_THREAD = 1 << 21


def loop(**options) -> Callable[[Callable], Callable]:
    """Decorator: compiled when it is first called, and kept beside the source or in the user's
    cache, where one of them can be written."""

    def decorated(function: Callable) -> Callable:
        try:
            return njit(nogil=True, cache=True, **options)(function)
        except RuntimeError:  # Numba found no place to keep it
            return njit(nogil=True, **options)(function)

    return decorated


def _operation(written: Callable) -> Callable:
    """Decorator for what writes an operation of a loop in the compiler's own terms: ``intrinsic``,
    whose annotations say that such an operation takes what it takes when it is written."""
    return intrinsic(written)


def _moved_bits(result, argument) -> Callable:
    """An operation that reads the bits of a number as another number."""

    @_operation
    def moved(typing_context, value):
        def written(context, builder, signature, arguments):
            return builder.bitcast(arguments[0], context.get_value_type(result))

        return result(argument), written

    return moved


float_of_bits = _moved_bits(types.float32, types.int32)
double_of_bits = _moved_bits(types.float64, types.int64)
bits_of_float = _moved_bits(types.int32, types.float32)


@_operation
def float_of_half(typing_context, bits):
    """The float32 of these 16 bits as a float16: one instruction on most processors, subnormal
    numbers included."""

    def written(context, builder, signature, arguments):
        return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.int16), written


@_operation
def _pointer(typing_context, place):
    def written(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.int64), written


@_operation
def fetch_ahead(typing_context, place):
    """Ask for the line of the cache that ``place`` lies in. Nothing happens where nothing lies."""

    def written(context, builder, signature, arguments):
        pointer, flag = ir.IntType(8).as_pointer(), ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [pointer, flag, flag, flag])
        fetch = get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        to_read, keep, data = flag(0), flag(3), flag(1)
        builder.call(fetch, [builder.inttoptr(arguments[0], pointer), to_read, keep, data])
        return context.get_dummy_value()

    return types.void(types.int64), written


@njit(inline="always")
def numbers(place, shape, dtype):
    """The array that lies at ``place``, where ``Tensor.data_ptr`` says that a tensor begins.

    Loops that a step of decoding calls a hundred times are given places: to wrap a small tensor in
    an array takes longer than what is then done with it.
    """
    return carray(_pointer(place), shape, dtype)


def numbers_like(place, shape, one):
    """The same, of numbers of the kind that ``one`` has."""
    raise NotImplementedError("only in compiled loops")


@overload(numbers_like, inline="always")
def _numbers_like(place, shape, one):
    kind = as_dtype(one).type
    return lambda place, shape, one: carray(_pointer(place), shape, kind)


def number(x):
    """An element of ``array``: itself, or the float32 of the bits of a bfloat16."""
    raise NotImplementedError("only in compiled loops")


@overload(number, inline="always")
def _number(x):
    if isinstance(x, types.Integer):
        return lambda x: float_of_bits(np.int32(np.int32(x) << np.int32(16)))
    return lambda x: x


@njit(inline="always")
def to_bf16(value):
    """The bits of the bfloat16 nearest to a float32 that is not NaN, ties to even."""
    bits = bits_of_float(value)
    even = np.int32((bits >> np.int32(16)) & np.int32(1))
    return np.int16((bits + np.int32(0x7FFF) + even) >> np.int32(16))


def array(x: Tensor) -> np.ndarray:
    """The numbers of a tensor where they lie; codes as bytes with a sign, bfloat16 as its bits."""
    x = x.detach().contiguous()
    if x.dtype == torch.float8_e4m3fn:
        x = x.view(torch.int8)
    elif x.dtype == torch.bfloat16:
        x = x.view(torch.int16)
    return x.numpy()


def in_threads(run: Callable[[int, int], None], count: int, together: int, work: int) -> None:
    """run(first, last) over ``count`` things, of which ``together`` are never parted, in as many
    threads as torch has and the work is worth. It returns, or raises, when all of them have ended:
    nothing that they read or write may go before. run itself must not call this again.

    work: multiplications in all.
    """
    threads = min(torch.get_num_threads(), work // _FOR_A_THREAD)
    if threads <= 1:
        return run(0, count)
    each = -(-count // threads // together) * together
    firsts = range(each, count, each)
    pool = _others(os.getpid(), torch.get_num_threads() - 1)
    parts: list[Future] = []
    try:
        for first in firsts:
            parts.append(pool.submit(run, first, min(first + each, count)))
        run(0, min(each, count))
        wait(parts)
    finally:
        wait(parts)  # after an interrupt too
    for part in parts:
        part.result()


@cache
def _others(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads beside the one that asks. They are kept, for to start them takes as long as a small
    product; a process that was forked has lost its parent's, and gets its own."""
    return ThreadPoolExecutor(threads)
