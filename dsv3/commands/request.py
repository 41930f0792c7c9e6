"""What ``dsv3 generate`` is asked for, checked as far as it can be before a weight is read."""

from __future__ import annotations

from argparse import Namespace
from dataclasses import dataclass

from dsv3.checkpoint.generation_config import GenerationConfig
from dsv3.checkpoint.layout import check_sharding
from dsv3.compiling import check_can_compile
from dsv3.config import ModelConfig
from dsv3.errors import DSV3Error
from dsv3.generation.prompts import read_prompts as prompts_of_file
from dsv3.generation.rows import check_prompts
from dsv3.generation.sampling import Sampling
from dsv3.generation.speculative import check_can_draft
from dsv3.generation.tokenizer import Tokenizer, load_tokenizer
from dsv3.model import Transformer
from dsv3.parallel.environment import place
from dsv3.parallel.tensor import TensorGroup

# Prompt tokens in one pass: bounds the memory of a long prompt without making small matrices.
_PREFILL_CHUNK = 2048


@dataclass(frozen=True)
class Request:
    """Options, and what they name.

    args: parsed options; sampling: what the flags ask for; own: what the checkpoint's
    generation_config.json says; texts, prompts: those to complete and their ids, on rank 0 alone.
    """

    args: Namespace
    sampling: Sampling
    own: GenerationConfig
    tokenizer: Tokenizer
    texts: list[str]
    prompts: list[list[int]]

    @classmethod
    def checked(cls, args: Namespace, ranks: int) -> Request:
        """What ``args`` ask of a model on so many ranks; DSV3Error for what cannot be."""
        if args.compile:
            check_can_compile(ranks)
        cut_over = (args.tp or 1) if args.ep else ranks
        sampling = sampling_of(args)
        config = ModelConfig.from_pretrained(args.model)
        # A config without MTP is refused once the files were looked at: they may hold the layer,
        # and then a note says which number to write.
        if sampling.speculative and config.num_nextn_predict_layers:
            check_can_draft(config, sampling.num_draft_tokens)
        own = GenerationConfig.beside(args.model, config.vocab_size)
        blocks = args.precision == "fp8" or config.quantization_config is not None
        check_sharding(config, cut_over, blocks=blocks)
        if args.ep:
            TensorGroup(size=args.ep).split(config.n_routed_experts, "n_routed_experts")
        tokenizer = load_tokenizer(args.model)
        # Rank 0's prompts are everybody's: a pipe is read once, a template may ask for the time.
        here = place()
        texts = read_prompts(args) if here is None or here.rank == 0 else []
        prompts = [prompt_ids(tokenizer, text, args.chat) for text in texts]
        check_prompts(
            prompts, min(tokenizer.vocab_size, config.vocab_size), config.max_position_embeddings
        )
        return cls(args, sampling, own, tokenizer, texts, prompts)

    def sampling_for(self, model: Transformer) -> Sampling:
        """``sampling`` with what the checkpoint's files say where no flag says otherwise.

        A text ends at the model's end tokens and at the tokenizer's.
        """
        defaults = {
            name: value
            for name, value in self.own.defaults.items()
            if getattr(self.args, name) is None
        }
        ends = {*model.eos_ids, self.tokenizer.eos_id}
        eos = sorted(id for id in ends if id is not None)
        return self.sampling.but(eos_ids=eos, **defaults)


def sampling_of(args: Namespace) -> Sampling:
    """What the flags ask for, checked; flags that were not given are at their defaults."""
    given = {
        name: value
        for name in ("temperature", "top_k", "top_p", "num_draft_tokens")
        if (value := getattr(args, name)) is not None
    }
    sampling = Sampling(
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        n=args.n,
        stop=args.stop,
        logprobs=args.logprobs,
        speculative=args.speculative or args.num_draft_tokens is not None,
        prefill_chunk=_PREFILL_CHUNK,
        **given,
    )
    if args.interactive and args.n > 1:
        raise DSV3Error(
            "a conversation goes on from one answer",
            where="--n",
            found=args.n,
            expected="1 with --interactive",
        )
    if args.interactive and args.json:
        raise DSV3Error(
            "a conversation is no JSON",
            where="--json",
            fix="Leave it out, or give --prompt or --input-file",
        )
    if args.logprobs and (args.interactive or not args.json):
        raise DSV3Error(
            "log-probabilities are a part of the JSON",
            where="--logprobs",
            fix="Give --json as well, and no --interactive",
        )
    return sampling


def read_prompts(args: Namespace) -> list[str]:
    """The prompts to complete: one, the lines of a file, or none in interactive use."""
    if args.interactive:
        return []
    if args.prompt is not None:
        if not args.prompt:
            raise DSV3Error("empty prompt", where="--prompt", fix="Write at least one letter")
        return [args.prompt]
    return prompts_of_file(args.input_file)


def prompt_ids(tokenizer: Tokenizer, text: str, chat: bool) -> list[int]:
    """Ids of a text to continue, or with ``chat`` of a question to answer."""
    return (
        tokenizer.chat_ids([{"role": "user", "content": text}]) if chat else tokenizer.encode(text)
    )
