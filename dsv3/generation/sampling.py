"""From logits to a token: what is asked for, the distribution, the draw, one choice for all ranks.

Choosing a token from logits z at temperature T:

    p_i = exp(z_i / T) / sum_j exp(z_j / T)

T = 0 is the limit, the largest logit (greedy). Top-k keeps the k most probable tokens. Top-p keeps
the most probable of what is left until their sum reaches p, and drops the tail. All are computed in
float64. The draw inverts the cumulative sum with a single uniform number, from a generator that
belongs to the row: what a row says depends on the seed and on its number, never on its neighbours
in the batch.

Some ids are no token: an embedding has more rows than its tokenizer has words, and a tokenizer may
have holes. Their logits are whatever training left there. They are banned before anything else is
looked at, for the model and for its drafts alike, so speculative decoding stays exact.

With several ranks, all hold the same logits up to rounding. Were each to choose for itself, one
near-tie would send them apart for good: they would go on with different texts, until one meets its
end and leaves the loop while the others wait for it in the next collective, for ever. So rank 0
chooses and tells the others. With each choice it tells its best token too, and a rank for which
another one is better by far (another checkpoint, a step missed) says so at that token.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from dsv3.errors import DSV3Error
from dsv3.parallel.tensor import TensorGroup

# Rounding moves a logit by far less than this; so much more is another model, or another text.
_FAR = 1.0


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """What is asked of a generation; every option of ``generate`` is a field here.

    max_new_tokens: of each row. temperature: 0 for greedy. top_k: draw from the k most probable
    tokens, 0 for all. top_p: in (0, 1], see above. seed: fixes the draw. n: samples of each
    prompt, over one prefill. eos_ids: tokens that end a row; None for the model's own, () for
    none. stop: texts that end a row, wherever they lie in its tokens. banned_ids: ids that are
    never chosen. logprobs: whether each chosen token's log-probability is wanted. speculative:
    draft with the MTP module and verify; the same tokens when greedy. num_draft_tokens: drafts of
    each pass, where there are any. prefill_chunk: prompt tokens per row in one pass, None for all
    at once.

    Raises DSV3Error, naming the field, for a value that makes no sense.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    n: int = 1
    eos_ids: Iterable[int] | Tensor | None = None  # kept as tuples, as the next two
    stop: Iterable[str] = ()
    banned_ids: Iterable[int] | Tensor = ()
    logprobs: bool = False
    speculative: bool = False
    num_draft_tokens: int = 1
    prefill_chunk: int | None = None

    def __post_init__(self):
        for name, least in (
            ("max_new_tokens", 0),
            ("top_k", 0),
            ("seed", None),
            ("n", 1),
            ("num_draft_tokens", 1),
        ):
            self._check_whole(name, least)
        if self.prefill_chunk is not None:
            self._check_whole("prefill_chunk", 1)
        for name, fits, expected in (
            ("temperature", lambda t: 0 <= t < math.inf, "0 or more, and finite"),
            ("top_p", lambda p: 0 < p <= 1, "more than 0, at most 1"),
        ):
            number = _as_float(getattr(self, name))
            if not fits(number):
                raise _unusable(name, getattr(self, name), expected)
            object.__setattr__(self, name, number)
        for name in ("logprobs", "speculative"):
            if not isinstance(getattr(self, name), bool):
                raise _unusable(name, getattr(self, name), "True or False")
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        for name, kind, expected in (
            ("eos_ids", Integral, "token ids"),
            ("banned_ids", Integral, "token ids"),
            ("stop", str, "texts of at least one letter"),
        ):
            self._check_list(name, kind, expected)

    def _check_whole(self, name: str, least: int | None) -> None:
        value = getattr(self, name)
        if (
            isinstance(value, bool)
            or not isinstance(value, Integral)
            or (least is not None and value < least)
        ):
            raise _unusable(
                name, value, "an integer" if least is None else f"an integer of at least {least}"
            )
        object.__setattr__(self, name, int(value))

    def _check_list(self, name: str, kind: type, expected: str) -> None:
        """A list becomes a tuple; its members must be of a kind, and none empty or negative."""
        value = getattr(self, name)
        if value is None and name == "eos_ids":
            return
        if hasattr(value, "tolist"):  # a tensor or an array
            value = value.tolist()
        if isinstance(value, str) or not isinstance(value, Iterable):
            raise _unusable(name, value, f"a list of {expected}")
        value = tuple(value)
        for item in value:
            if (
                isinstance(item, bool)
                or not isinstance(item, kind)
                or (not _is_text(item) if kind is str else item < 0)
            ):
                raise _unusable(name, item, expected)
        object.__setattr__(self, name, value if kind is str else tuple(map(int, value)))

    def but(self, **changes) -> Sampling:
        """A copy with some fields changed, checked again. Raises DSV3Error for an unknown one."""
        known = [field.name for field in fields(self)]
        for name in changes:
            if name not in known:
                raise DSV3Error("no such option", where=name, expected=", ".join(known))
        return replace(self, **changes)


def _as_float(value: object) -> float:
    """A number, of Python or of numpy; NaN for anything else, infinite for too large an integer."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _is_text(value: str) -> bool:
    """Whether a string has letters, and UTF-8 can write them all (no half of a surrogate pair)."""
    return bool(value) and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _unusable(name: str, value, expected: str) -> DSV3Error:
    return DSV3Error("not a usable value", where=name, found=repr(value), expected=expected)


class Choice(NamedTuple):
    """A chosen token, and the log of the model's own probability of it, where that was wanted.

    The model's own: a softmax of its logits over the whole vocabulary in float64, before
    temperature, top-k, top-p and banned ids.
    """

    id: int
    logprob: float | None = None


def probabilities(
    logits: Float[Tensor, "*lead v"], temperature: float, top_p: float = 1.0, top_k: int = 0
) -> Float64[Tensor, "*lead v"]:
    """The distribution a token is drawn from, over v tokens: float64, sums to 1.

    Temperature 0 puts all of it on the largest logit. Top-k keeps the k most probable tokens (of
    equal ones those with the smaller ids), 0 all. Top-p keeps the smallest set of most probable
    tokens whose sum, among those that top-k left, reaches top_p.
    """
    best = logits.max(dim=-1, keepdim=True)
    _check_finite(bool(torch.isfinite(best.values).all()))
    if temperature == 0:
        greedy = torch.zeros_like(logits, dtype=torch.float64)
        return greedy.scatter_(-1, best.indices, 1.0)
    # The largest exponent is 0, so neither a large logit nor a tiny temperature overflows.
    p = ((logits.double() - best.values.double()) / temperature).softmax(dim=-1)
    if top_p == 1 and not 0 < top_k < p.shape[-1]:
        return p
    ordered, order = p.sort(dim=-1, descending=True, stable=True)
    if top_k:
        ordered[..., top_k:] = 0.0
        ordered = ordered / ordered.sum(dim=-1, keepdim=True)
    if top_p < 1:
        before = ordered.cumsum(dim=-1) - ordered  # mass ahead of each token
        ordered = ordered.masked_fill(before >= top_p, 0.0)
        ordered = ordered / ordered.sum(dim=-1, keepdim=True)
    return torch.zeros_like(p).scatter_(-1, order, ordered)


def _check_finite(are: bool) -> None:
    if not are:
        raise DSV3Error(
            "the logits are not finite numbers",
            where="sampling",
            fix="The weights are damaged or overflow in this precision",
        )


def draw(p: Float[Tensor, " v"], generator: torch.Generator) -> int:
    """One index from weights p >= 0 (any sum), by inverting their cumulative sum."""
    return draw_each(p[None], [generator])[0]


def draw_each(p: Float[Tensor, "b v"], generators: Sequence[torch.Generator]) -> list[int]:
    """One index for each row of weights, with the row's own generator; all are waited for once."""
    cumulative = p.double().cumsum(dim=-1)
    u = [torch.rand((), dtype=torch.float64, device="cpu", generator=own) for own in generators]
    marks = torch.stack(u).to(p.device)[:, None] * cumulative[:, -1:]
    # The first index whose cumulative sum exceeds the mark: an index of weight 0 never is.
    index = torch.searchsorted(cumulative, marks, right=True)
    last = (p > 0).long().cumsum(dim=-1).argmax(dim=-1, keepdim=True)  # the last that is not 0
    return index.minimum(last)[:, 0].tolist()


def sample(
    logits: Float[Tensor, "b v"],
    temperature: float,
    top_p: float,
    generators: Sequence[torch.Generator],
    top_k: int = 0,
) -> list[int]:
    """A token for each row of logits, each drawn with its row's own generator."""
    if temperature == 0:
        best = logits.max(dim=-1)
        values, ids = torch.stack([best.values.double(), best.indices.double()]).tolist()
        _check_finite(all(map(math.isfinite, values)))
        return [int(id) for id in ids]
    return draw_each(probabilities(logits, temperature, top_p, top_k), generators)


def row_generators(seed: int, rows: int) -> list[torch.Generator]:
    """One random generator a row. They live on the CPU, so a seed means the same everywhere."""
    return [
        torch.Generator("cpu").manual_seed((seed * 1_000_003 + row) % 2**63) for row in range(rows)
    ]


class Chooser:
    """Picks tokens on rank 0 and tells every rank.

    interrupted: whether ``should_stop``, asked on rank 0 at every choice, has said yes.
    """

    def __init__(
        self,
        group: TensorGroup,
        rows: int,
        sampling: Sampling,
        vocab_size: int,
        should_stop: Callable[[], bool] | None = None,
    ):
        self.group, self.sampling, self.should_stop = group, sampling, should_stop
        self.generators = row_generators(sampling.seed, rows)
        banned = sorted({id for id in sampling.banned_ids if id < vocab_size})
        if len(banned) == vocab_size:
            raise DSV3Error(
                "no token is left to choose",
                where="banned_ids",
                found="all ids",
                expected=f"fewer than the model's vocab_size, {vocab_size}",
            )
        self.banned = torch.tensor(banned, dtype=torch.int64, device="cpu")
        self.interrupted = False
        self._choices = 0  # made so far

    def __call__(
        self, logits: Float[Tensor, "b v"], rows: Sequence[int] | None = None
    ) -> list[list[Choice]]:
        """A token for each row of logits, in a list of its own. rows: which texts these are; None:
        all of them."""
        s, ids = self.sampling, None
        if self.decides:
            generators = self.generators if rows is None else self.of(rows)
            ids = sample(self.allowed(logits), s.temperature, s.top_p, generators, s.top_k)
        return [[choice] for choice in self.agree(logits, ids, rows)]

    def of(self, rows: Sequence[int]) -> list[torch.Generator]:
        """The generators of these texts."""
        return [self.generators[row] for row in rows]

    @property
    def decides(self) -> bool:
        """Whether this is the rank that chooses, rank 0."""
        return self.group.rank == 0

    def allowed(self, logits: Float[Tensor, "*lead v"]) -> Float[Tensor, "*lead v"]:
        """The logits, those of banned ids at -inf."""
        if not len(self.banned):
            return logits
        return logits.index_fill(-1, self.banned.to(logits.device), -math.inf)

    def distribution(self, logits: Float[Tensor, "*lead v"]) -> Float64[Tensor, "*lead v"]:
        """What a token is drawn from: the probabilities of all tokens, 0 where banned."""
        s = self.sampling
        return probabilities(self.allowed(logits), s.temperature, s.top_p, s.top_k)

    def agree(
        self,
        logits: Float[Tensor, "*lead v"],
        ids: list[int] | None,
        texts: Sequence[int] | None = None,
    ) -> list[Choice]:
        """Rank 0's ids on every rank, one for each row of logits, in order; None where it is
        another rank that decides.

        An id of -1 stands for none and has no log-probability. texts: which the rows belong to, as
        many rows to each; None: all.
        """
        rows = logits.flatten(0, -2)
        count = len(rows)
        numbers = [0.0] * (count * (2 + self.sampling.logprobs) + 1)
        if ids is not None:
            stop = self.interrupted or bool(self.should_stop and self.should_stop())
            best = rows.argmax(-1).tolist() if self.group.size > 1 else [0] * count
            numbers = [stop, *best, *ids, *self.logprobs(logits, ids)]
        if self.group.size > 1:  # ids are exact in float64
            told = self.group.broadcast(
                torch.tensor(numbers, dtype=torch.float64, device=self.group.device)
            )
            self._compare(rows, told[1 : 1 + count].long(), texts)
            numbers = told.tolist()
        self.interrupted = bool(numbers[0])
        self._choices += 1
        chosen, logprobs = numbers[1 + count : 1 + 2 * count], numbers[1 + 2 * count :]
        return [Choice(int(id), value) for id, value in zip(chosen, logprobs or [None] * count)]

    def _compare(
        self, rows: Float[Tensor, "n v"], best: Int[Tensor, " n"], texts: Sequence[int] | None
    ) -> None:
        """Raise DSV3Error where rank 0's best token of a row is not nearly the best one here."""
        mine = rows.max(-1)
        short = mine.values - rows.gather(-1, best[:, None])[:, 0]
        every = len(self.generators)
        texts = range(every) if texts is None else texts
        for row in (short > _FAR).nonzero()[:1].flatten().tolist():
            text = texts[row * len(texts) // len(rows)]
            raise DSV3Error(
                "the ranks do not agree",
                where=f"choice {self._choices + 1}, row {text + 1} of {every}",
                found=f"best token {int(best[row])} on rank 0, {int(mine.indices[row])} on rank "
                f"{self.group.rank}, where its logit is {float(short[row]):.1f} higher",
                fix="Give all machines the same files and the same version of dsv3",
            )

    def logprobs(self, logits: Float[Tensor, "*lead v"], ids: list[int]) -> list[float]:
        """The log of the model's own probability of each id; nothing where it is not wanted."""
        if not self.sampling.logprobs:
            return []
        rows = logits.flatten(0, -2)
        chosen = torch.tensor(ids, device=rows.device).clamp(min=0)[:, None]
        return rows.double().log_softmax(-1).gather(-1, chosen)[:, 0].tolist()
