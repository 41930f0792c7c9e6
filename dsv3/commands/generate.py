"""``dsv3 generate``: prompts in, text out, on one rank or many.

The order of work keeps mistakes cheap: options, prompts and config are checked first, in the
process that was started (``commands.request``); only then are ranks started, weights read and
prompts answered (``commands.answers``).
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence

from dsv3 import machine
from dsv3.commands import options, streams
from dsv3.parallel.environment import check_ranks
from dsv3.parallel.launch import launch

HELP = "Continue a prompt, many prompts, or chat."
EXAMPLE = 'dsv3 generate dsv3-mini --prompt "37 + 45 =" --max-new-tokens 21'


def add_options(parser: ArgumentParser) -> None:
    """MODEL_DIR, where prompts come from, how tokens are chosen, how answers are printed."""
    parser.add_argument(
        "model",
        metavar="MODEL_DIR",
        type=options.model,
        help="a checkpoint in the released "
        "layout, or a converted one; or dsv3-mini, the small model that comes along",
    )
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", type=streams.typed, help="a text to continue")
    source.add_argument(
        "--input-file",
        metavar="FILE",
        help="a text file with one prompt a line, a pipe, or - for standard input; "
        "empty lines are skipped",
    )
    source.add_argument(
        "--interactive", action="store_true", help="chat, where the checkpoint has a chat template"
    )
    parser.add_argument(
        "--chat", action="store_true", help="put each prompt into the chat template, as a question"
    )
    parser.add_argument(
        "--tp",
        type=options.count,
        metavar="N",
        help="start N tensor-parallel ranks on this machine (default: 1; under "
        "torchrun: the ranks that are there)",
    )
    parser.add_argument(
        "--ep",
        type=options.count,
        metavar="N",
        help="start N ranks that share the routed experts out; tokens travel to them. The rest of "
        "the model is whole on each, or with --tp M cut over M of them",
    )
    parser.add_argument(
        "--precision",
        choices=("fp8", "bf16", "fp32"),
        default="fp8",
        help="how weights are kept and multiplied (default: fp8)",
    )
    parser.add_argument(
        "--cache",
        choices=("plain", "fp8"),
        default="plain",
        help="how latents are kept: in the model's own dtype, or in FP8, in about half the memory "
        "or less (default: plain)",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU"
    )
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: 128")
    own = "default: what the checkpoint's generation_config.json says, else"
    parser.add_argument(
        "--temperature", type=float, metavar="T", help=f"0 takes the most probable token ({own} 0)"
    )
    parser.add_argument(
        "--top-k",
        type=int,
        metavar="K",
        help=f"draw from the K most probable tokens ({own} 0, all)",
    )
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help=f"draw from the most probable tokens that sum to P ({own} 1, all)",
    )
    parser.add_argument(
        "--stop",
        action="append",
        default=[],
        type=streams.typed,
        metavar="TEXT",
        help="end a text before TEXT; may be given several times",
    )
    parser.add_argument(
        "--n",
        type=options.count,
        default=1,
        metavar="N",
        help="samples of each prompt, over one prefill (default: 1)",
    )
    parser.add_argument(
        "--logprobs",
        action="store_true",
        help="with --json: log-probabilities of the chosen tokens, of the model's own "
        "distribution, before temperature, top-k and top-p",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="default: 0")
    parser.add_argument(
        "--speculative",
        action="store_true",
        help="draft with the MTP module and verify: the same text, often faster",
    )
    parser.add_argument(
        "--num-draft-tokens",
        type=int,
        metavar="N",
        help="draft N tokens a pass with the one module, fed with its own state; implies "
        "--speculative (default: 1)",
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="decode by compiled code, on one rank and with a C++ compiler: it takes a minute to "
        "make, and then a CPU saves 3 to 10 percent of the time, in fp8 nothing",
    )
    parser.add_argument("--no-stream", action="store_true", help="print only when all is done")
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object and nothing else"
    )


def run(args: Namespace, arguments: Sequence[str]) -> int:
    """Check what was asked for; start the ranks, or answer as the rank that this process is."""
    from dsv3.commands.answers import answer
    from dsv3.commands.request import Request
    from dsv3.commands.terminal import settings_kept
    from dsv3.generation.prompts import from_standard_input, handed_down
    from dsv3.parallel.experts import check_tensor_ranks

    if args.ep:
        check_tensor_ranks(args.ep, args.tp or 1)
        ranks, starts = check_ranks(args.ep, "--ep", args.device)
    else:
        ranks, starts = check_ranks(args.tp, "--tp", args.device)
    request = Request.checked(args, ranks)
    if not starts:
        answer(request)
        return 0
    with settings_kept(), handed_down(request.texts if args.input_file else None):
        return launch(
            ("-m", "dsv3", *from_standard_input(arguments)),
            ranks,
            threads=machine.threads(ranks),
            interactive=args.interactive,
        )
