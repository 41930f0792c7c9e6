"""The model cut by depth into the stages of a pipeline, and a training step through them.

Stage 0 begins with the embedding, the last one ends with norm, head and MTP modules, and the
layers lie between, a stretch each (``layers_of``). What goes from stage to stage is the stream of a
micro-batch, and with it the sum of the sequence losses of the routers passed so far: the last
stage adds it to the objective, and its gradient goes the same way back. A stage names its weights
as the whole model does.

MTP reads the model's own embedding and head. The head is on its stage; the embedding may not be.

* Folded in a V (DualPipeV), first and last stage are on one rank and share it, weight and
  gradient. That is why the report puts "the shallowest layers (including the embedding layer) and
  deepest layers (including the output head)" on the same rank (TR 3.2.3).
* In 1F1B they are not. Each end has a copy, and gets a part of the gradient. After each batch the
  parts are exchanged and added up: both copies make the same step, and stay the same.
"""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from dsv3.cache import Step
from dsv3.config import ModelConfig
from dsv3.errors import DSV3Error
from dsv3.model import Transformer
from dsv3.parallel.collectives import Mail
from dsv3.parallel.pipeline import Passed, Piece, pass_through, rank_of, stages_in_all, stages_of
from dsv3.parallel.tensor import TensorGroup
from dsv3.precision import Precision
from dsv3.training.balance import RouterWatch
from dsv3.training.objective import losses_of, objective, tokens_of
from dsv3.training.optimizer import AdamW
from dsv3.training.step import StepValues, take_step


class Stage(nn.Module):
    """Some layers of a model, with what stands at its ends if they reach so far.

    It takes the model's own modules: nothing is copied. layers: their numbers. watch: of the
    routers of this stage. twice: whether the last stage uses the embedding too, for MTP or because
    it is the head.
    """

    def __init__(self, model: Transformer, layers: range):
        super().__init__()
        self.config = model.config
        self.first, self.last = layers.start == 0, layers.stop == len(model.layers)
        self.twice = model.config.tie_word_embeddings or len(model.mtp) > 0
        if self.first or (self.last and self.twice):
            self.embed = model.embed
        self.layers = nn.ModuleDict({str(layer): model.layers[layer] for layer in layers})
        if self.last:
            self.norm, self.head, self.mtp = model.norm, model.head, model.mtp
        self.watch = RouterWatch(self)

    @property
    def shared(self) -> nn.Parameter | None:
        """The embedding, if this is the first or the last stage and both use it."""
        return self.embed.weight if self.twice and (self.first or self.last) else None

    @property
    def splits(self) -> bool:
        """Whether the gradients of its weights can wait (``dsv3.parallel.pipeline``): not where
        one matrix is read on both sides of an MTP module's weights."""
        depths, tied = self.config.num_nextn_predict_layers, self.config.tie_word_embeddings
        return not (self.last and depths > (0 if tied else 1))

    def forward(self, *carried: Tensor, batch: Int[Tensor, "b w"]) -> tuple[Tensor, ...] | Tensor:
        """carried: the stream (b, s, d) and the sequence losses so far, (); the first stage has
        none. batch: windows. Returns the two for the next stage, or (1, 3): the losses of the
        next token, of MTP (the mean over depths), and of the sequences."""
        if self.first:
            x = self.embed(tokens_of(self.config, batch))
            balance = torch.zeros((), device=x.device)
        else:
            x, balance = carried
        step = self._step(x)
        for layer in self.layers.values():
            x = layer(x, step)
        if not self.last:
            return x, balance + self.watch.sequence_loss()
        hidden = self.norm(x)
        main, extra = losses_of(self, self.head(hidden), hidden, batch)
        ahead = sum(extra, main.new_zeros(())) / max(len(extra), 1)
        balance = balance + self.watch.sequence_loss()
        return torch.cat([value.view(1, 1) for value in (main, ahead, balance)], dim=1)

    def mtp_logits(
        self, hidden: Float[Tensor, "b s d"], tokens: Int[Tensor, "b s"], *, depth: int
    ) -> tuple[Float[Tensor, "b s vocab"], Float[Tensor, "b s d"]]:
        """What MTP module ``depth`` predicts, as ``Transformer.mtp_logits``."""
        hidden = self.mtp[depth](hidden, self.embed(tokens), self._step(hidden))
        return self.head(hidden), hidden

    def _step(self, x: Float[Tensor, "b s d"]) -> Step:
        rows, length, _ = x.shape
        return Step.make(self.config, [0] * rows, [length] * rows, length, x.device)


def layers_of(layers: int, stages: int) -> list[range]:
    """Which layers each stage has: as evenly as they divide, the earlier stages one more, because
    the last has the head and MTP besides. Raises DSV3Error when a stage would have none."""
    if not 1 <= stages <= layers:
        raise DSV3Error(
            "cannot be cut into so many stages",
            where="num_hidden_layers",
            found=layers,
            expected=f"{stages} or more, a layer for each stage",
        )
    each, more = divmod(layers, stages)
    ends = accumulate([each + (stage < more) for stage in range(stages)], initial=0)
    return [range(first, end) for first, end in pairwise(ends)]


class StagedModel(nn.Module):
    """One rank's stages of a model that trains in a pipeline.

    model: the whole, with the same weights on every rank: each must be able to hold it for a
    moment. What is not of this rank's stages goes when the caller lets go of it. schedule: one of
    ``dsv3.parallel.pipeline``. group: the ranks of the pipeline, in its order. stages: mine, by
    number. Raises DSV3Error when the layers are too few.
    """

    def __init__(self, model: Transformer, schedule: str, group: TensorGroup):
        super().__init__()
        self.schedule, self.group, self.dtype = schedule, group, model.precision.dtype
        self.config = model.config
        stretches = layers_of(len(model.layers), stages_in_all(schedule, group.size))
        self.stages = {
            number: Stage(model, stretches[number])
            for number in stages_of(schedule, group.rank, group.size)
        }
        self.kept = nn.ModuleList(self.stages.values())

    def weights(self) -> dict[str, nn.Parameter]:
        """My weights, by their names in the whole model."""
        return {n: w for stage in self.stages.values() for n, w in stage.named_parameters()}

    @property
    def load(self) -> dict[str, Tensor]:
        """Tokens of each expert in the last batch, by router: all tokens pass every stage."""
        return {name: x for stage in self.stages.values() for name, x in stage.watch.load.items()}

    def backward(self, batch: Int[Tensor, "n w"], values: StepValues) -> Passed:
        """Make ``.grad`` the gradient of a batch's objective, of my weights.

        batch: n windows, the same on all ranks. values.micro_batch: tokens that a micro-batch has
        at most; the n windows must divide. Returns what each rank has noted, and on the last
        stage's the losses of each micro-batch, (micro-batches, 3).
        """
        self.zero_grad()
        for stage in self.stages.values():
            stage.watch.reset()
        length = tokens_of(self.config, batch).shape[1]
        rows = min(max(values.micro_batch // length, 1), len(batch))
        passed = pass_through(
            self.schedule,
            self.stages,
            batch.to(self.group.device),
            carried=self._carried(rows, length),
            loss=lambda found: _objective(found, values),
            micro_batches=-(-len(batch) // rows),
            group=self.group,
            unsplit=[number for number, stage in self.stages.items() if not stage.splits],
        )
        self._add_shared()
        return passed

    def square(self) -> Tensor:
        """The square of the norm of my gradients; a weight that two ranks share counts once."""
        twice = self._copy()
        found = [w.grad for w in self.parameters() if w.grad is not None and w is not twice]
        return nn.utils.get_total_norm(found) ** 2

    def _carried(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """What goes from stage to stage: its shapes, without numbers."""
        options = dict(device="meta", requires_grad=True)
        stream = torch.empty(rows, length, self.config.hidden_size, dtype=self.dtype, **options)
        return stream, torch.empty((), **options)

    def _ends(self) -> tuple[int, int]:
        """The ranks of the first stage and of the last."""
        size = self.group.size
        last = stages_in_all(self.schedule, size) - 1
        return rank_of(self.schedule, 0, size), rank_of(self.schedule, last, size)

    def _copy(self) -> nn.Parameter | None:
        """The shared weight where this rank has it for the last stage, and not for the first."""
        first, last = self._ends()
        if first == last or self.group.rank != last:
            return None
        return next(stage.shared for stage in self.stages.values() if stage.last)

    def _add_shared(self) -> None:
        """Add up the two parts of the shared weight's gradient, where they are on two ranks."""
        first, last = self._ends()
        if first == last:
            return
        for stage in self.stages.values():
            if (weight := stage.shared) is not None:
                other = last if stage.first else first
                assert weight.grad is not None  # every token reaches both ends
                weight.grad += Mail(self.group).swap(weight.grad, other, weight.grad, other)


def _objective(found: Float[Tensor, "1 3"], values: StepValues) -> Float[Tensor, ""]:
    """What is minimised, from the last stage's losses."""
    main, ahead, balance = found[0]
    return objective(main, [ahead], values.mtp_weight) + values.sequence_weight * balance


def pipeline_step(
    model: StagedModel, optimizer: AdamW, batch: Int[Tensor, "n w"], values: StepValues
) -> dict[str, float]:
    """One update, as ``train_step`` makes it, of a model that lies on several ranks by depth.

    optimizer: of this rank's weights. batch: the same on all ranks. The gradient is clipped by the
    norm over all stages. Returns the same on all ranks.
    """
    found = model.backward(batch, values)
    sums = torch.zeros(4, device=model.group.device)
    if found.outputs is not None:
        sums[:3] = found.outputs.mean(0)
    sums[3] = model.square()
    model.group.all_reduce(sums)
    sums[3] = sums[3].sqrt()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    nn.utils.clip_grads_with_norm_(trained, values.clip, sums[3])
    result = dict(zip(("loss", "mtp_loss", "sequence_loss", "grad_norm"), sums.tolist()))
    take_step(optimizer, result, values, [stage.watch for stage in model.stages.values()])
    return result


def clocked(
    group: TensorGroup,
    schedule: str,
    config: ModelConfig,
    micro_batches: int,
    *,
    rows: int = 1,
    length: int = 64,
    precision: str = "fp32",
) -> tuple[Piece, ...]:
    """What this rank did when, in a batch of random tokens through a random model.

    rows, length: of a micro-batch. A first batch goes before it, in which memory is found and
    ranks connect. For ``dsv3.parallel.pipeline.measured``, which takes this of all ranks.
    """
    whole = Transformer(config, Precision.training(precision), device=group.device)
    model = StagedModel(whole.init_weights(0), schedule, group)
    width = length + 1 + config.num_nextn_predict_layers
    random = torch.Generator().manual_seed(0)
    batch = torch.randint(config.vocab_size, (micro_batches * rows, width), generator=random)
    values = StepValues(learning_rate=0.0, micro_batch=rows * length)
    model.backward(batch, values)
    return model.backward(batch, values).pieces
