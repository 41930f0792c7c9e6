"""Chapters 4 and 8: Triton kernels, each beside the torch function that specifies it.

One source runs on a GPU and, with TRITON_INTERPRET=1 set before the module is imported, on the CPU
in Triton's interpreter, which is how the tests hold every kernel to its specification without a
GPU. Nothing is imported here: only who wants a kernel pays for loading Triton, and where there is
no Triton everything else still works.
"""
