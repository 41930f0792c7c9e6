"""Chapters 4 and 8: Triton kernels, each beside the torch function that specifies it.

One source runs on a GPU and, with TRITON_INTERPRET=1 set before the module is imported, on the CPU
in Triton's interpreter, which is how the tests hold every kernel to its specification without a
GPU. ``kernels.compiled`` shows what becomes of each on a Hopper chip. A GPU (an H200) has run
``act_quant``, ``weight_dequant`` and ``fp8_gemm``; **no GPU has run the others yet**: what is said
here of their bits holds in the interpreter, and ``python -m benchmarks.hopper --all`` asks a chip.
Nothing is imported here: only who wants a kernel pays for loading Triton, and where there is no
Triton everything else still works.

``cpu`` and the modules whose names begin so are for a CPU: loops that Numba compiles, beside the
same plain forms (``dsv3.fp8``, ``MLA.absorbed``, ``layers``). In fp8 they sum in float64, exactly
within a tile (``cpu_fp8`` says why), so a text is the one that comes without them, whatever its
batch, chunks, drafts and ranks. In fp32 and bf16 (attention, norms) they sum in float32, in another
order than torch.

What is the same on a GPU, bit for bit, as without kernels:

* codes, scales and dequantised weights (``act_quant``, ``column_quant``, ``weight_dequant``);
* the sum over a token's experts, given their outputs (``combine``).

What is not, because sums are taken in another order or from operands of fewer bits:

* FP8 products (``fp8_gemm``, ``persistent_gemm``, ``experts``): a tensor core keeps about 14 bits
  inside a block of 128, which is up to 1e-3 of a result's norm;
* the norm (``norm_quant`` sums in float64, torch in float32): a last bit of bfloat16 now and then;
* the router's weights: float32 sums in another order, about 1e-6. The experts are the same unless
  two scores are that close;
* attention (``mla_decode``, ``mla_prefill``): float32 operands are cut into two bfloat16 parts, so
  16 bits of each are kept where torch keeps 24; of bfloat16 operands nothing is lost.

What a token's numbers depend on. In each kernel: on the token alone, not on the rows beside it, nor
on how many keys are masked behind its own. Sums over keys, depth and K are cut at places that the
shape of the weights or the text fixes, and parts are added in their order. That holds as far as the
chip adds up the products of one instruction in one way for every shape of tile. A whole text on a
GPU can still change, at a near tie of two tokens, with the batch, the chunks of a prompt and with
drafts: torch's own products (the head, W^UK and W^UV around absorbed attention, the expanded keys;
in bf16 all) are cuBLAS's, which picks a kernel by shape, and many queries are computed in the
expanded form and few in the absorbed one. That no text changes is promised on a CPU.

How many there are. A layer of a decoding pass in FP8 launches 42 kernels with a dense feed-forward
and 56 with experts, 13 and 17 of them from here (a test counts; at the released sizes some are two,
of which the second adds up parts). The aim is 12 a layer, and it is not reached: torch still makes
the rotations, the latent's norm and its way into the cache, changes of dtype and the sorting of
tokens by expert, and w1 and w3, and wq_a and wkv_a, are products of their own. Under ``--compile``
neighbours among torch's become one, and all launches of a pass are one call (``dsv3.compiling``).
"""
