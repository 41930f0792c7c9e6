"""What ``dsv3 generate`` says: answers as text or JSON, and on stderr what they cost.

Every rank of a group goes through all of it in step, and rank 0 alone is heard (``Terminal``).
"""

from __future__ import annotations

import json
import resource
import sys
from argparse import Namespace
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dsv3 import __version__, bfloat16, machine
from dsv3.checkpoint.generation_config import FILE, GenerationConfig
from dsv3.checkpoint.loading import load_model
from dsv3.commands.chat import Talk
from dsv3.commands.request import Request
from dsv3.commands.terminal import Terminal
from dsv3.generation.loop import Generation, stream
from dsv3.generation.sampling import Sampling
from dsv3.generation.session import Session
from dsv3.generation.tokenizer import Tokenizer
from dsv3.model import Transformer
from dsv3.parallel.agreement import agree_on
from dsv3.parallel.experts import experts_of, join_experts
from dsv3.parallel.tensor import TensorGroup


def answer(request: Request) -> None:
    """Load the model as the rank that this process is, and answer."""
    args = request.args
    group = (
        join_experts(args.device, tensor=args.tp or 1)
        if args.ep
        else TensorGroup.from_environment(args.device)
    )
    with group.everyone as everyone:
        torch.set_num_threads(machine.threads())
        model = load_model(args.model, args.precision, group=group, cache=args.cache)
        if args.compile:
            model.compile()
        sampling = request.sampling_for(model)
        job = Job(args, model, request.tokenizer, Terminal(everyone), sampling, request.own)
        job.check_agreement()
        job.warn()
        job.get_ready()
        if args.interactive:
            Talk(job).run()
        else:
            job.answer(*everyone.broadcast_object([request.texts, request.prompts]))


@dataclass
class Job:
    """A loaded model and what was asked of it; every rank holds one and they act in step.

    own: what the checkpoint's generation_config.json says.
    """

    args: Namespace
    model: Transformer
    tokenizer: Tokenizer
    terminal: Terminal
    sampling: Sampling
    own: GenerationConfig

    @torch.inference_mode()
    def get_ready(self) -> None:
        """Write a token on a CPU: what is compiled by the first pass of a process, or loaded, is
        there then before anybody waits for text (``dsv3.kernels.cpu``)."""
        if self.model.device.type == "cpu":
            cache = self.model.new_cache(1, 3)
            self.model(torch.zeros(1, 2, dtype=torch.int64), cache)
            self.model(torch.zeros(1, 1, dtype=torch.int64), cache)

    def check_agreement(self) -> None:
        """Raise DSV3Error where another rank has other options or other files; of the weights,
        those are compared of which every rank has a copy and which are small."""
        model, group = self.model, self.model.group.everyone
        if group.size == 1:
            return
        copies = {
            name: tensor
            for name, tensor in (*model.named_parameters(), *model.named_buffers())
            if name.endswith(("norm.weight", "gate.bias"))
        }
        facts = {"version of dsv3": __version__, "config.json": model.config.to_dict()}
        facts |= asdict(self.sampling)
        facts |= {"precision": self.args.precision, "cache": self.args.cache}
        agree_on(group, facts | {"tokenizer": self.tokenizer.digest} | copies)

    def warn(self) -> None:
        """Say so where the chosen precision is a slow one here."""
        if (
            self.args.precision == "bf16"
            and self.model.device.type == "cpu"
            and (slower := bfloat16.slowdown()) >= bfloat16.SLOW
        ):
            self.terminal.note(
                "dsv3: on this CPU a product in bfloat16 takes "
                f"{slower:.0f} times as long as in float32; --precision fp32 is "
                "faster"
            )

    def answer(self, texts: list[str], prompts: list[list[int]]) -> None:
        """Complete all prompts together. One alone is streamed, several are printed in order."""
        single = len(prompts) * self.sampling.n == 1
        streams = single and not self.args.no_stream and not self.args.json
        echo = "" if self.args.chat else texts[0]
        run = stream(self.model, prompts, sampling=self.sampling, tokenizer=self.tokenizer)
        if streams:  # now that all is checked
            self.terminal.write(echo)
        for token in run:
            if streams:
                self.terminal.write(token.text)
        result = run.result
        # One entry a row: each prompt stands there once for each of its samples.
        texts = [text for text in texts for _ in range(self.sampling.n)]
        prompts = [prompt for prompt in prompts for _ in range(self.sampling.n)]
        if self.args.json:
            self.print_json(texts, prompts, result)
            return
        if streams:
            self.terminal.write("\n")
        elif single:
            self.terminal.write(f"{echo}{result.texts[0]}\n")
        else:
            for row, (text, answer) in enumerate(zip(texts, result.texts)):
                self.terminal.write(f"[{row + 1}/{len(texts)}] {text}\n{answer}\n\n")
        self.summarize(result)

    def reply(self, session: Session, ids: list[int], turn: int) -> tuple[str, str]:
        """Stream one answer; Ctrl-C ends it early. Returns its text and why it ended."""
        terminal = self.terminal
        terminal.stopped = False
        # Each turn draws from a seed of its own.
        run = session.stream(
            ids,
            sampling=self.sampling.but(seed=self.sampling.seed + turn),
            tokenizer=self.tokenizer,
            should_stop=lambda: terminal.stopped,
        )
        for token in run:
            if not self.args.no_stream:
                terminal.write(token.text)
        text = run.result.texts[0]
        terminal.write((text if self.args.no_stream else "") + "\n")
        return text, run.result.stopped_by[0]

    def print_json(self, texts: list[str], prompts: list[list[int]], result: Generation) -> None:
        """All rows in one object; texts, prompts: what each row continues."""
        results: list[dict[str, Any]] = [
            {"prompt": text, "prompt_ids": prompt, "ids": ids, "text": answer, "stopped_by": reason}
            for text, prompt, ids, answer, reason in zip(
                texts, prompts, result.ids, result.texts, result.stopped_by, strict=True
            )
        ]
        for row, entry in enumerate(results):
            if self.sampling.n > 1:
                entry["sample"] = row % self.sampling.n
            if result.logprobs is not None:
                entry["logprobs"] = result.logprobs[row]
        self.terminal.write(
            json.dumps(
                {
                    "model": str(self.args.model),
                    "precision": self.args.precision,
                    "tp": self.model.group.size,
                    **({"ep": self.args.ep} if self.args.ep else {}),
                    **({"cache": self.args.cache} if self.args.cache != "plain" else {}),
                    "results": results,
                    "tokens_per_second": round(result.tokens_per_second, 2),
                    "acceptance": result.acceptance,
                    "accepted_by_depth": result.accepted_by_depth
                    and [depth._asdict() for depth in result.accepted_by_depth],
                }
            )
            + "\n"
        )

    def summarize(self, result: Generation) -> None:
        """What was run and what it cost, on stderr. Every rank reports its own share."""
        group, count = self.model.group.everyone, sum(map(len, result.ids))
        tensors = [*self.model.parameters(), *self.model.buffers()]
        mine = dict(
            sent=_sent(self.model.group),
            weights=sum(tensor.nbytes for tensor in tensors),
            cache=result.cache_bytes,
            peak=_peak_memory(self.model.device),
        )
        ranks = [group.broadcast_object(mine, src=rank) for rank in range(group.size)]
        note = self.terminal.note
        plural = "rank" if group.size == 1 else "ranks"
        experts, held = experts_of(self.model.group), ""
        if experts is not None:
            each = self.model.config.n_routed_experts // experts.size
            held = f" with {each} routed experts each"
        where = self.model.device.type
        if where == "cpu":
            where += f" with {machine.threads_in_words(torch.get_num_threads())}"
        note(
            f"model       {self.args.model}, {self.args.precision}, {group.size} {plural}{held} on "
            f"{where}"
        )
        note(
            f"speed       {count} new tokens in {result.seconds:.2f} s, prefill included: "
            f"{result.tokens_per_second:.1f} tokens/s"
        )
        for line in self.taken():
            note(line)
        if result.acceptance is not None:
            note(
                f"acceptance  {result.acceptance:.0%} of the drafted tokens, "
                f"{result.tokens_per_pass:.2f} tokens a pass and row"
            )
        if self.sampling.num_draft_tokens > 1 and result.accepted_by_depth:
            shares = [
                f"{depth.accepted / depth.verified:.0%}"
                for depth in result.accepted_by_depth
                if depth.verified
            ]
            note(f"by depth    {', '.join(shares)}, each of those whose forerunners were accepted")
        for rank, seen in enumerate(ranks):
            size = {name: _size(count) for name, count in seen.items()}
            kind = " in FP8" if self.args.cache == "fp8" else ""
            note(
                f"rank {rank}      weights {size['weights']}, cache {size['cache']}{kind}, "
                f"peak of the process {size['peak']}; sent {size['sent']}"
            )

    def taken(self) -> list[str]:
        """What was taken from generation_config.json, and what it asks for in vain."""
        said = [
            f"{name.replace('_', '-')} {value:g}"
            for name, value in self.own.defaults.items()
            if getattr(self.args, name) is None
        ]
        if self.own.eos_ids is not None:
            said.append("end tokens " + (", ".join(map(str, self.own.eos_ids)) or "none"))
        lines = [f"sampling    {', '.join(said)}: from {FILE}"] if said else []
        if self.own.ignored:
            lines.append(
                f"sampling    not supported and left out: {', '.join(self.own.ignored)} of {FILE}"
            )
        return lines


def _sent(group: TensorGroup) -> int:
    """Bytes that this rank has sent to others, for whatever purpose."""
    experts = experts_of(group)
    if experts is None:
        return group.bytes_sent
    return group.bytes_sent + experts.ranks.bytes_sent + experts.bytes_sent


def _peak_memory(device: torch.device) -> int:
    """Bytes: of the GPU where there is one, else the largest resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, Linux kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _size(count: float) -> str:
    """Bytes in words: 1 kB is 1000 bytes."""
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"
