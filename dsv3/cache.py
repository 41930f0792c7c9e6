"""What decoding remembers of a text, and where the tokens of one pass stand in it.

MLA keeps the latent and the rotated key of each token (eq. 1, 3), d_c + d_h^R values a layer, and
nothing else. Rows of a batch have lengths of their own; ``Step`` says for one forward pass which
positions are new, and which of them may see which.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from jaxtyping import Bool, Complex64, Float, Int, Shaped
from torch import Tensor

from dsv3.config import ModelConfig
from dsv3.errors import DSV3Error
from dsv3.rope import inverse_frequencies, rotation_scale, rotations

# Keys that are widened at a time: few enough for their copy to stay in a core's cache.
_WIDEN_KEYS = 512


@dataclass(frozen=True)
class Step:
    """Where the new tokens of one forward pass stand; made once, read by every layer.

    offset: position of the first new token (of the first row, when rows are ragged).
    total: keys that can be seen, t. rotation: of each pair of values, by position. mask: True
    where a query may look, or None when the causal rule says it all. take: for ragged rows,
    (row, column, position) of all n true tokens, else None.
    """

    offset: int
    total: int
    rotation: Complex64[Tensor, "b s pairs"]
    mask: Bool[Tensor, "b 1 s t"] | None
    take: tuple[Int[Tensor, " n"], Int[Tensor, " n"], Int[Tensor, " n"]] | None

    @classmethod
    def make(
        cls,
        config: ModelConfig,
        starts: list[int],
        counts: list[int],
        width: int,
        device: torch.device,
    ) -> Step:
        """starts: tokens already seen per row; counts: true new tokens per row; width: s."""
        total = max(start + count for start, count in zip(starts, counts))
        first = torch.tensor(starts, device=device)
        columns = torch.arange(width, device=device)
        positions = first[:, None] + columns  # (b, s)
        rotation = rotations(
            positions, inverse_frequencies(config).to(device), rotation_scale(config)
        )
        even = len(set(starts)) == 1 and all(count == width for count in counts)
        take = None
        if not even:
            row, column = (columns < torch.tensor(counts, device=device)[:, None]).nonzero(
                as_tuple=True
            )
            take = (row, column, first[row] + column)
        mask = None
        if not even or (starts[0] > 0 and width > 1):
            keys = torch.arange(total, device=device)
            mask = (keys <= positions[..., None])[:, None]  # (b, 1, s, t)
        return cls(starts[0], total, rotation, mask, take)

    def write(
        self, store: Shaped[Tensor, "b room *rest"], new: Shaped[Tensor, "b s *rest"]
    ) -> None:
        """Put what belongs to the new tokens into a store of all positions, at their places."""
        if self.take is None:
            store[:, self.offset : self.offset + new.shape[1]] = new
        else:
            row, column, position = self.take
            store[row, position] = new[row, column]


class LatentCache:
    """What decoding remembers: [c^KV; k^R] of every token, layer by layer.

    data: (layers, batch, max_seq_len, d_c + d_h^R). Every row has its own length; positions
    beyond it hold leftovers that no query looks at. The latent is stored after its norm, the key
    after its rotation. ids: (batch, max_seq_len), the token that each position was computed for,
    -1 where that is not known; so a text can be told from one that only begins like it.

    What is kept is numbers and no history: a gradient reaches the tokens of the pass that it comes
    from, none of an earlier one.
    """

    def __init__(
        self,
        config: ModelConfig,
        layers: int,
        batch_size: int,
        max_seq_len: int,
        dtype: torch.dtype,
        device: torch.device | str,
    ):
        for name, size in (("batch_size", batch_size), ("max_seq_len", max_seq_len)):
            if isinstance(size, bool) or not isinstance(size, Integral) or size < 0:
                raise DSV3Error(
                    "not a usable value",
                    where=name,
                    found=repr(size),
                    expected="an integer of at least 0",
                )
        with torch.inference_mode(False):  # wherever it is made, it can be written anywhere
            self.data = torch.zeros(
                layers, batch_size, max_seq_len, config.latent_dim, dtype=dtype, device=device
            )
            self.ids = torch.full((batch_size, max_seq_len), -1, device=device)
        self.lengths = [0] * batch_size

    @property
    def max_seq_len(self) -> int:
        """Tokens a row can hold."""
        return self.data.shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes of all latents."""
        return self.data.nbytes

    def append(
        self, layer: int, new: Float[Tensor, "b s latent"], step: Step
    ) -> Float[Tensor, "b t latent"]:
        """Write what is new after each row's tokens; return that of all keys."""
        store = self.data[layer]
        step.write(store, new.detach())
        seen = store[:, : step.total]
        if torch.is_grad_enabled() and new.requires_grad:
            seen = seen.clone()  # later passes write into the store, which would spoil the graph
            step.write(seen, new)
        return seen

    def remember(self, tokens: Int[Tensor, "b s"], step: Step) -> None:
        """Note which tokens a pass was about."""
        step.write(self.ids, tokens)

    def tokens(self, row: int) -> list[int]:
        """The ids of the tokens that a row holds."""
        return self.ids[row, : self.lengths[row]].tolist()

    def copies(self, n: int, max_seq_len: int) -> LatentCache:
        """Another cache in which each row stands ``n`` times in a row, with room for more."""
        other = copy.copy(self)
        longest = max(self.lengths)
        with torch.inference_mode(False):
            layers, batch, _, width = self.data.shape
            other.data = self.data.new_zeros(layers, n * batch, max_seq_len, width)
            other.ids = self.ids.new_full((n * batch, max_seq_len), -1)
        other.data[:, :, :longest] = self.data[:, :, :longest].repeat_interleave(n, dim=1)
        other.ids[:, :longest] = self.ids[:, :longest].repeat_interleave(n, dim=0)
        other.lengths = [length for length in self.lengths for _ in range(n)]
        return other

    def advance(self, counts: list[int]) -> None:
        """Count the tokens of a finished forward pass."""
        self.lengths = [length + count for length, count in zip(self.lengths, counts)]

    def truncate(self, lengths: list[int]) -> None:
        """Forget each row's tokens from ``lengths`` on (rejected drafts, an edited prompt)."""
        if not isinstance(lengths, Sequence) or len(lengths) != len(self.lengths):
            raise DSV3Error(
                "wrong row lengths",
                where="truncate",
                found=lengths,
                expected=f"a list of {len(self.lengths)}, one a row",
            )
        for row, (new, old) in enumerate(zip(lengths, self.lengths)):
            if not 0 <= new <= old:
                raise DSV3Error(
                    "cannot grow a cache by truncating",
                    where=f"row {row}",
                    found=new,
                    expected=f"0 to {old}",
                )
        self.lengths = list(lengths)

    def check_fit(self, layers: int, width: int, dtype: torch.dtype, device: torch.device) -> None:
        """Raise DSV3Error unless this is a cache of such a model."""
        found = (self.data.shape[0], self.data.shape[3], self.data.dtype, self.data.device)
        if found != (layers, width, dtype, device):
            raise DSV3Error(
                "the cache is another model's",
                where="cache",
                found=_words(*found),
                expected=_words(layers, width, dtype, device),
                fix="Make it with new_cache, or new_draft_cache for an MTP module, "
                "where the model is now",
            )

    def check_room(self, counts: list[int]) -> None:
        """Raise DSV3Error when a row's new tokens do not fit."""
        for row, (length, count) in enumerate(zip(self.lengths, counts)):
            if length + count > self.max_seq_len:
                raise DSV3Error(
                    "the cache is full",
                    where=f"row {row}",
                    found=f"{length} + {count} tokens",
                    expected=f"at most {self.max_seq_len}",
                    fix="Make the cache longer (max_seq_len)",
                )


def dot_keys(
    q: Float[Tensor, "b queries d"], keys: Float[Tensor, "b t d"]
) -> Float[Tensor, "b queries t"]:
    """q . k for all keys, in q's dtype; a cache keeps them in a narrower one."""
    runs = keys.split(_WIDEN_KEYS, dim=1)
    return torch.cat([q @ run.to(q.dtype).transpose(1, 2) for run in runs], -1)


def mix_values(
    weights: Float[Tensor, "b queries t"], values: Float[Tensor, "b t d"]
) -> Float[Tensor, "b queries d"]:
    """Values summed by weight, in the weights' dtype."""
    runs = zip(weights.split(_WIDEN_KEYS, dim=-1), values.split(_WIDEN_KEYS, dim=1), strict=True)
    # pyrefly: ignore[bad-return] - there is a run at least
    return sum(weight @ run.to(weight.dtype) for weight, run in runs)


def check_is_cache(cache: object, name: str = "cache") -> None:
    """Raise DSV3Error for what is no cache at all."""
    if not all(hasattr(cache, part) for part in ("lengths", "tokens", "truncate")):
        raise DSV3Error(
            "not a cache",
            where=name,
            found=type(cache).__name__,
            expected="LatentCache",
            fix="Make it with new_cache, or new_draft_cache for an MTP module",
        )


def _words(layers: int, width: int, dtype: torch.dtype, device: torch.device) -> str:
    return f"{layers} layers of {width} values, {dtype}, on {device}"
