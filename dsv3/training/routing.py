"""Do experts specialise? Who is chosen for which text, against what chance alone would show.

Count how often each expert of a layer is chosen in each window of text. When a window's domain
says something about its experts, the two have mutual information:

    I(D; E) = sum_{d,e} p(d, e) log2( p(d, e) / (p(d) p(e)) )

in bits a choice: 0 when all domains use the experts alike, at most the entropy of the domains
(log2 3 = 1.58 for three of equal size) when each has experts of its own.

A finite sample never gives 0. Windows differ among themselves, so any grouping of them shows
some information. The measure of that is a shuffle: give the same windows each other's labels, many
times, and see what comes out. Windows are shuffled, not tokens. The tokens of one window are about
the same thing and use the same experts; shuffled one by one they would act as thousands of
independent witnesses, and chance would look far smaller than it is.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float64, Int, Int64
from torch import Tensor

from dsv3.errors import DSV3Error
from dsv3.model import Transformer
from dsv3.moe import Router
from dsv3.training.objective import mtp_logits


@torch.inference_mode()
def expert_counts(
    model: Transformer, windows: Int[Tensor, "n w"], batch_size: int = 8
) -> dict[str, Int64[Tensor, "n experts"]]:
    """How often each expert is chosen in each window: router name -> (n, N_r), on the CPU.

    windows: (n, s + 1 + D) tokens, of which the model reads s; the MTP modules' routers are
    counted too. Each row sums to s K_r. Names are those of the modules, "layers.3.ffn.gate".
    """
    routers = {name: module for name, module in model.named_modules() if isinstance(module, Router)}
    counts: dict[str, list[Tensor]] = {name: [] for name in routers}
    length = windows.shape[1] - 1 - model.config.num_nextn_predict_layers

    def watch(name: str):
        def hook(router, inputs, outputs):
            chosen = outputs[1].flatten(1)  # (b, s K_r)
            zero = chosen.new_zeros(len(chosen), router.config.n_routed_experts)
            counts[name].append(zero.scatter_add(1, chosen, torch.ones_like(chosen)).cpu())

        return hook

    hooks = [router.register_forward_hook(watch(name)) for name, router in routers.items()]
    try:
        for window in windows.split(batch_size):
            _, hidden = model(window[:, :length], return_hidden=True)
            mtp_logits(model, hidden, window)
    finally:
        for hook in hooks:
            hook.remove()
    return {name: torch.cat(parts) for name, parts in counts.items()}


@dataclass(frozen=True)
class Specialisation:
    """Mutual information of label and expert in one layer, in bits a choice.

    bits: as counted; shuffled_mean, shuffled_99: mean and 99th percentile under shuffled labels;
    p_value: (1 + shuffles that reach ``bits``) / (1 + shuffles), so never below what the number
    of shuffles can show; most: the entropy of the labels, which bits cannot exceed.
    """

    bits: float
    shuffled_mean: float
    shuffled_99: float
    p_value: float
    most: float

    @property
    def beyond_chance(self) -> float:
        """Bits above the shuffled mean: the figure with its small-sample bias taken off."""
        return self.bits - self.shuffled_mean


def specialisation(
    counts: Int[Tensor, "n experts"],
    labels: Int[Tensor, " n"],
    permutations: int = 200,
    seed: int = 0,
) -> Specialisation:
    """What the labels of n windows say about the experts chosen in them, against shuffled labels.

    counts: of one router, from ``expert_counts``; labels: 0, 1, ... for each window's domain.
    Give windows that lie apart, as many of each domain: neighbours in one document are alike
    whatever their domain. Raises DSV3Error for fewer than two labels or two windows of one.
    """
    sizes = labels.bincount()
    if len(sizes) < 2 or sizes.min() < 2:
        raise DSV3Error(
            "too few windows",
            where="specialisation",
            found=sizes.tolist(),
            expected="at least 2 windows of each of at least 2 labels",
        )
    if permutations < 1:
        raise DSV3Error("bad value", where="permutations", found=permutations, expected="1 or more")
    generator = torch.Generator().manual_seed(seed)
    bits = mutual_information(by_label(counts, labels))
    shuffled = torch.tensor(
        [
            mutual_information(
                by_label(counts, labels[torch.randperm(len(labels), generator=generator)])
            )
            for _ in range(permutations)
        ],
        dtype=torch.float64,
    )
    share = by_label(counts, labels).sum(1)
    share = share / share.sum()
    # Equal partitions differ in the last bits of a float64 sum; those count as reached.
    reached = int((shuffled >= bits - 1e-12).sum())
    return Specialisation(
        bits=bits,
        shuffled_mean=float(shuffled.mean()),
        shuffled_99=float(shuffled.quantile(0.99)),
        p_value=(1 + reached) / (1 + permutations),
        most=-float((share * share.log2()).sum()),
    )


def by_label(
    counts: Int[Tensor, "n experts"], labels: Int[Tensor, " n"]
) -> Float64[Tensor, "labels experts"]:
    """Counts summed over the windows of each label."""
    sums = torch.zeros(int(labels.max()) + 1, counts.shape[1], dtype=torch.float64)
    return sums.index_add(0, labels, counts.double())


def mutual_information(joint: Float64[Tensor, "labels experts"]) -> float:
    """I of a table of counts, in bits."""
    p = joint / joint.sum()
    independent = p.sum(1, keepdim=True) * p.sum(0, keepdim=True)
    return float(torch.where(p > 0, p * (p / independent).log2(), 0.0).sum())
