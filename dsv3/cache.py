"""What decoding remembers of a text, and where the tokens of one pass stand in it.

MLA keeps the latent and the rotated key of each token (eq. 1, 3), d_c + d_h^R values a layer, and
nothing else. Rows of a batch have lengths of their own; ``Step`` says for one forward pass which
positions are new, and which of them may see which.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from numbers import Integral

import torch
from jaxtyping import Bool, Complex64, Float, Float32, Int, Shaped
from torch import Tensor

from dsv3.backward import without_backward
from dsv3.config import ModelConfig
from dsv3.errors import DSV3Error
from dsv3.fp8.latent import LatentFormat, PackedLatents
from dsv3.rope import inverse_frequencies, rotation_scale, rotations

# Keys that are widened at a time: few enough for their copy to stay in a core's cache.
_WIDEN_KEYS = 512
# What a gradient through packed latents is told.
_NO_GRADIENT = dict(
    what="no gradient goes back through a cache in FP8",
    fix="Leave the cache out, or make it in the model's own dtype",
)


@dataclass(frozen=True)
class Step:
    """Where the new tokens of one forward pass stand; made once, read by every layer.

    total: keys that can be seen, t. rotation: of each pair of values, by position. mask: True
    where a query may look, or None when the causal rule says it all. row, place: where what
    belongs to a new token is kept, its row and its position there, or -1 for padding.

    All that differs from row to row and from pass to pass is a tensor. No layer asks one for a
    number: on a GPU, the answer would have to be waited for.
    """

    total: int
    rotation: Complex64[Tensor, "b s pairs"] | Float32[Tensor, "b s pairs 2"]
    mask: Bool[Tensor, "b 1 s t"] | None
    row: Int[Tensor, "b 1"]
    place: Int[Tensor, "b s"]

    @classmethod
    def make(
        cls,
        config: ModelConfig,
        starts: list[int],
        counts: list[int],
        width: int,
        device: torch.device,
        turns: Complex64[Tensor, "room pairs"] | None = None,
        total: int | None = None,
    ) -> Step:
        """starts: tokens already seen per row; counts: true new tokens per row; width: s. turns:
        the rotation at each position, where somebody keeps a table of them. total: keys to be
        seen, at least as many as there are; those that are more are masked."""
        longest = max(start + count for start, count in zip(starts, counts))
        padded, total = total is not None, total or longest
        first = numbers(starts, device)
        columns = torch.arange(width, device=device)
        positions = first[:, None] + columns  # (b, s)
        even = len(set(starts)) == 1 and all(count == width for count in counts)
        place = positions
        if any(count < width for count in counts):
            place = positions.where(columns < numbers(counts, device)[:, None], -1)
        if turns is None:
            rotation = rotations(
                positions, inverse_frequencies(config).to(device), rotation_scale(config)
            )
        else:
            rotation = turns[place]
        mask = None
        if padded or not even or (starts[0] > 0 and width > 1):
            keys = torch.arange(total, device=device)
            mask = (keys <= positions[..., None])[:, None]  # (b, 1, s, t)
        row = torch.arange(len(starts), device=device)[:, None]
        return cls(total, rotation, mask, row, place)

    @property
    def reach(self) -> Int[Tensor, "b s"]:
        """How many keys each new token sees, itself the last; for padding none."""
        return self.place + 1

    def write(
        self, store: Shaped[Tensor, "b room *rest"], new: Shaped[Tensor, "b s *rest"]
    ) -> None:
        """Put what belongs to the new tokens into a store of all positions, at their places. A
        store has one place more than positions, its last, where padding goes."""
        store[self.row, self.place] = new


@dataclass(frozen=True)
class OneLayer:
    """A cache's part for one layer, which is all that the layer gets to see. (With the whole cache
    and a number, each layer would be a program of its own to a compiler.)"""

    store: Shaped[Tensor, "b room width"]
    format: LatentFormat | None = None

    def append(
        self, new: Float[Tensor, "b s latent"], step: Step
    ) -> Float[Tensor, "b t latent"] | PackedLatents:
        """Write what is new after each row's tokens; return that of all keys."""
        store = self.store
        if self.format is not None:
            step.write(store, self.format.pack(new.detach()))
            seen = PackedLatents(store[:, : step.total], self.format)
            if torch.is_grad_enabled() and new.requires_grad:
                return without_backward(lambda new: seen.to(new.dtype), new, **_NO_GRADIENT)
            return seen
        step.write(store, new.detach())
        if torch.is_grad_enabled() and new.requires_grad:
            store = store.clone()  # later passes write into the store, which would spoil the graph
            step.write(store, new)
        return store[:, : step.total]


class LatentCache:
    """What decoding remembers: [c^KV; k^R] of every token, layer by layer.

    data: (layers, batch, max_seq_len, d_c + d_h^R) in the model's dtype; ``packed``, the last axis
    is the bytes of a token (``dsv3.fp8.latent``). Every row has its own length; positions
    beyond it hold leftovers that no query looks at. The latent is stored after its norm, the key
    after its rotation. ids: (batch, max_seq_len), the token that each position was computed for,
    -1 where that is not known; so a text can be told from one that only begins like it. turns: the
    rotation at each position, which the config alone decides.

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
        packed: bool = False,
    ):
        for name, size in (("batch_size", batch_size), ("max_seq_len", max_seq_len)):
            if isinstance(size, bool) or not isinstance(size, Integral) or size < 0:
                raise DSV3Error(
                    "not a usable value",
                    where=name,
                    found=repr(size),
                    expected="an integer of at least 0",
                )
        self.config, self.dtype, self.lengths = config, dtype, [0] * batch_size
        self.format = LatentFormat(config.kv_lora_rank, config.qk_rope_head_dim) if packed else None
        width, stored = (
            (self.format.bytes, torch.uint8) if self.format else (config.latent_dim, dtype)
        )
        with torch.inference_mode(False):  # wherever it is made, it can be written anywhere
            # One place more than positions, where a pass puts what belongs to padding.
            self._latents = torch.zeros(
                layers, batch_size, max_seq_len + 1, width, dtype=stored, device=device
            )
            self._ids = torch.full((batch_size, max_seq_len + 1), -1, device=device)
            self.turns = _turns(config, max_seq_len + 1, self._ids.device)

    @property
    def data(self) -> Shaped[Tensor, "layers b max_seq_len width"]:
        """The latents of all positions."""
        return self._latents[:, :, :-1]

    @property
    def ids(self) -> Int[Tensor, "b max_seq_len"]:
        """The tokens of all positions."""
        return self._ids[:, :-1]

    @property
    def max_seq_len(self) -> int:
        """Tokens a row can hold."""
        return self._latents.shape[2] - 1

    @property
    def nbytes(self) -> int:
        """Bytes in memory: of the latents (``data.nbytes``, nearly all), of the ids, of the turns,
        and of the place for padding."""
        return self._latents.nbytes + self._ids.nbytes + self.turns.nbytes

    def one(self, layer: int) -> OneLayer:
        """A layer's part."""
        return OneLayer(self._latents[layer], self.format)

    def remember(self, tokens: Int[Tensor, "b s"], step: Step) -> None:
        """Note which tokens a pass was about."""
        step.write(self._ids, tokens)

    def tokens(self, row: int) -> list[int]:
        """The ids of the tokens that a row holds."""
        return self.ids[row, : self.lengths[row]].tolist()

    def copies(self, n: int, max_seq_len: int) -> LatentCache:
        """Another cache in which each row stands ``n`` times in a row, with room for more."""
        layers, batch, _, _ = self.data.shape
        other = LatentCache(
            self.config,
            layers,
            n * batch,
            max_seq_len,
            self.dtype,
            self.data.device,
            self.format is not None,
        )
        longest = max(self.lengths)
        other.data[:, :, :longest] = self.data[:, :, :longest].repeat_interleave(n, dim=1)
        other.ids[:, :longest] = self.ids[:, :longest].repeat_interleave(n, dim=0)
        other.lengths = [length for length in self.lengths for _ in range(n)]
        return other

    def keep(self, rows: list[int]) -> None:
        """Forget all rows but these, which from now on stand in this order. Only rows that change
        their place are copied (``rows_without`` gives an order in which few do), layer by layer:
        the cache stays where it is."""
        moves = [(old, new) for new, old in enumerate(rows) if old != new]
        if moves:
            old, new = (list(places) for places in zip(*moves))
            longest = max(self.lengths[row] for row in old)
            for store in (*self._latents, self._ids):
                store[new, :longest] = store[old, :longest]
        self._latents, self._ids = self._latents[:, : len(rows)], self._ids[: len(rows)]
        self.lengths = [self.lengths[row] for row in rows]

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
        found = (self.data.shape[0], self.config.latent_dim, self.dtype, self.data.device)
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


def rows_without(leaving: Collection[int], count: int) -> list[int]:
    """Of ``count`` rows those that stay, the last of them in the places of those that leave: so
    every row that leaves moves one other row at most."""
    places = range(count - len(leaving))
    last = [row for row in range(len(places), count) if row not in leaving]
    return [last.pop() if place in leaving else place for place in places]


def numbers(values: list[int], device: torch.device) -> Int[Tensor, " n"]:
    """A list as a tensor there; nobody waits until it has arrived."""
    return torch.tensor(values, device="cpu").to(device, non_blocking=True)


def _turns(
    config: ModelConfig, count: int, device: torch.device
) -> Complex64[Tensor, "{count} pairs"]:
    """The rotation at each of the first ``count`` positions."""
    positions = torch.arange(count, device=device)
    return rotations(positions, inverse_frequencies(config).to(device), rotation_scale(config))


def _words(layers: int, width: int, dtype: torch.dtype, device: torch.device) -> str:
    return f"{layers} layers of {width} values, {dtype}, on {device}"
