"""dsv3: DeepSeek-V3 as a package that a book builds, chapter by chapter.

The public face is five names; everything else is reached through its own module::

    from dsv3 import ModelConfig, Transformer, load_model, load_tokenizer, generate

    model = load_model("assets/dsv3-mini", precision="fp8")
    tokenizer = load_tokenizer("assets/dsv3-mini")
    ids = generate(model, [tokenizer.encode("To be, or not to be")], max_new_tokens=32)
    print(tokenizer.decode(ids[0]))

Beside ``generate`` stand ``dsv3.generation.loop.stream``, an iterator of tokens with their texts,
and ``complete``, with the full account; what may be asked of all three stands in
``dsv3.generation.sampling.Sampling``. The weights of a loaded model ask for no gradients.

Shapes stand beside the tensors: ``Float[Tensor, "b s d"]`` is a tensor of floating-point numbers
with three dimensions, and within one signature a name means one size. The names, everywhere:

* b texts in a batch, s new tokens of each, t tokens that attention can see, old and new;
* n tokens in one list, k chosen experts of each;
* d values of a token's state (hidden_size), v words of the vocabulary (vocab_size);
* d_h and d_r values of a head's plain and rotated part, d_v of its value; d_c of the latent;
* in and out: the two sizes of a weight matrix, which is stored as (out, in);
* ``*lead`` and ``*shape``: any dimensions, the same ones in the result; ``...``: any at all.

They are notes to the reader, and nothing is checked in use. In the tests every call is.

A name is imported when it is first used (PEP 562), so ``import dsv3`` itself costs next to nothing
and loads neither torch, nor Triton, nor matplotlib: the command line can print its help, or say
that torch is missing, at once. One thing it does: where torch is not loaded yet, it lets torch's
threads sleep while they wait, unless you have set how they wait (``dsv3.machine``). So import it
before torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from dsv3.machine import wait_passively

if TYPE_CHECKING:  # what an editor or a type checker reads
    from dsv3.checkpoint.loading import load_model
    from dsv3.config import ModelConfig
    from dsv3.generation.loop import generate
    from dsv3.generation.tokenizer import load_tokenizer
    from dsv3.model import Transformer

__version__ = "0.1.0"  # pyproject.toml reads it here
__all__ = ["ModelConfig", "Transformer", "load_model", "load_tokenizer", "generate"]

wait_passively()

_HOME = {
    "ModelConfig": "dsv3.config",
    "Transformer": "dsv3.model",
    "load_model": "dsv3.checkpoint.loading",
    "load_tokenizer": "dsv3.generation.tokenizer",
    "generate": "dsv3.generation.loop",
}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'dsv3' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
