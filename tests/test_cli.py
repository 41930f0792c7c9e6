"""The command line, as its users meet it: output, errors and exit codes.

Starting Python and torch costs seconds, so what needs no process of its own is run in this one.
"""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import termios
import time
import tomllib
from pathlib import Path

import pytest

from dsv3 import cli
from dsv3.checkpoint.loading import load_model
from dsv3.commands import doctor
from dsv3.errors import DSV3Error
from dsv3.generation.loop import generate
from dsv3.generation.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 120  # seconds; reached only when something hangs
PROMPT = "In byte-level text"


def environment(**changes) -> dict[str, str]:
    """What a user's process sees: no settings of a test run, one thread, this package."""
    ours = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PYTHONUNBUFFERED")
    clean = {name: value for name, value in os.environ.items() if name not in ours}
    return clean | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONUTF8": "1"} | changes


def dsv3(*words, code: int = 0, **options) -> subprocess.CompletedProcess:
    """Run a command to its end and check its exit code."""
    done = subprocess.run(
        [sys.executable, "-m", "dsv3", *map(str, words)],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env=options.pop("env", environment()),
        **options,
    )
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture
def here(capsys):
    """Run a command in this process; gives (stdout, stderr)."""

    def run(*words, code: int = 0) -> tuple[str, str]:
        assert cli.main([str(word) for word in words]) == code
        return capsys.readouterr()

    return run


def one_line(text: str) -> str:
    """The single error line of a failed command."""
    lines = text.splitlines()
    assert len(lines) == 1 and lines[0].startswith("dsv3: error: "), text
    return lines[0]


def wait_until(condition, seconds: float = LIMIT):
    """Poll until ``condition`` gives something true, and return that."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := condition():
            return result
        time.sleep(0.05)
    raise AssertionError("waited in vain")


def members(session_of: int) -> list[int]:
    """Processes below a process, by its id (Linux)."""
    found, queue = [], [session_of]
    while queue:
        parent = queue.pop()
        for task in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                children = [int(word) for word in task.read_text().split()]
            except OSError:
                continue
            found += children
            queue += children
    return found


def alive(pid: int) -> bool:
    """Whether a process still runs; one that waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")


# dsv3 generate ----------------------------------------------------------------------------------


def test_json_on_one_rank_and_two(tiny_checkpoint, here):
    """Exactly the documented object and nothing else on stdout; ids are those of the library."""
    model, tokenizer = load_model(tiny_checkpoint, "fp32"), load_tokenizer(tiny_checkpoint)
    prompt = "In $$ ${rank} é😀"  # dollars must reach the ranks as they are
    ids = tokenizer.encode(prompt)
    expected = generate(model, [ids], max_new_tokens=12, tokenizer=tokenizer)[0]
    words = [
        "generate",
        tiny_checkpoint,
        "--prompt",
        prompt,
        "--json",
        "--precision",
        "fp32",
        "--max-new-tokens",
        12,
    ]
    done = dsv3(*words, "--tp", 2)
    for ranks, (output, errors) in {1: here(*words), 2: (done.stdout, done.stderr)}.items():
        answer = json.loads(output)
        assert answer.pop("tokens_per_second") > 0
        assert answer == {
            "model": str(tiny_checkpoint),
            "precision": "fp32",
            "tp": ranks,
            "acceptance": None,
            "accepted_by_depth": None,
            "results": [
                {
                    "prompt": prompt,
                    "prompt_ids": ids,
                    "ids": expected,
                    "text": tokenizer.decode(expected),
                    "stopped_by": "length",
                }
            ],
        }
        assert errors == ""


def test_streamed_text_and_summary_on_two_ranks(tiny_checkpoint, here):
    """Only rank 0 prints; each rank's bytes are told."""
    words = [
        "generate",
        tiny_checkpoint,
        "--prompt",
        PROMPT,
        "--max-new-tokens",
        8,
        "--precision",
        "fp32",
        "--speculative",
    ]
    done = dsv3(*words, "--tp", 2)
    assert done.stdout == here(*words, "--no-stream")[0] == here(*words)[0]
    assert done.stdout.startswith(PROMPT) and done.stdout.count(PROMPT) == 1
    summary = done.stderr.splitlines()
    assert [line.split()[0] for line in summary] == ["model", "speed", "acceptance", "rank", "rank"]
    assert "fp32, 2 ranks on cpu" in summary[0] and "8 new tokens" in summary[1]
    for line in summary[3:]:
        assert re.search(
            r"weights [\d.]+ MB, cache [\d.]+ kB, peak of the process [\d.]+ MB; "
            r"sent [\d.]+ kB$",
            line,
        )


def test_input_file_of_ragged_lines(tiny_checkpoint, tmp_path, here):
    """One prompt a line, empty lines skipped, Windows line ends taken off; sampled by row."""
    file = tmp_path / "prompts.txt"
    file.write_bytes("In byte\r\n\n   \nevery word, çédille and emoji 😀\nx".encode())
    words = [
        "generate",
        tiny_checkpoint,
        "--input-file",
        file,
        "--max-new-tokens",
        6,
        "--precision",
        "fp32",
        "--temperature",
        1,
        "--top-p",
        0.9,
        "--seed",
        5,
    ]
    results = json.loads(here(*words, "--json")[0])["results"]
    prompts = ["In byte", "every word, çédille and emoji 😀", "x"]
    assert [result["prompt"] for result in results] == prompts
    assert json.loads(here(*words, "--json")[0])["results"] == results
    other = json.loads(here(*words[:-1], 6, "--json")[0])["results"]
    assert other != results
    printed = here(*words)[0]
    for number, result in enumerate(results, 1):
        assert f"[{number}/3] {result['prompt']}\n{result['text']}\n" in printed


def test_chat_and_speculative(tiny_checkpoint, here):
    words = [
        "generate",
        tiny_checkpoint,
        "--prompt",
        "Hi",
        "--chat",
        "--json",
        "--max-new-tokens",
        6,
        "--precision",
        "fp32",
    ]
    plain = json.loads(here(*words)[0])
    drafted = json.loads(here(*words, "--speculative")[0])
    tokenizer = load_tokenizer(tiny_checkpoint)
    assert tokenizer.decode(plain["results"][0]["prompt_ids"], skip_special=False) == (
        "<｜begin▁of▁sentence｜><｜User｜>Hi<｜Assistant｜>"
    )
    assert drafted["results"] == plain["results"]
    assert plain["acceptance"] is None and 0 <= drafted["acceptance"] <= 1
    implied = json.loads(here(*words, "--num-draft-tokens", 3)[0])
    assert implied["results"] == plain["results"]
    counts = [(depth["verified"], depth["accepted"]) for depth in implied["accepted_by_depth"]]
    assert len(counts) == 3 and counts[0][0] > 0
    assert all(counts[j + 1][0] <= counts[j][1] <= counts[j][0] for j in range(2))
    assert here(*words[:-2], "--num-draft-tokens", 3, "--max-new-tokens", 4)  # rows with less room


@pytest.mark.parametrize(
    "count, message",
    [
        (0, "num_draft_tokens: not a usable value (found 0, expected an integer of at least 1)"),
        (10**6, "num_draft_tokens: more drafts than a text has room for (found 1000000, expected"),
    ],
)
def test_numbers_of_drafts_that_make_no_sense(tiny_checkpoint, here, count, message):
    _, errors = here(
        "generate", tiny_checkpoint, "--prompt", "x", "--num-draft-tokens", count, code=2
    )
    assert message in one_line(errors)


def test_samples_stop_strings_and_logprobs(tiny_checkpoint, here):
    words = [
        "generate",
        tiny_checkpoint,
        "--prompt",
        "Hi",
        "--json",
        "--max-new-tokens",
        30,
        "--precision",
        "fp32",
        "--temperature",
        1.5,
        "--top-k",
        300,
    ]
    results = json.loads(here(*words, "--n", 2, "--logprobs")[0])["results"]
    assert [result["sample"] for result in results] == [0, 1]
    assert results[0]["ids"] != results[1]["ids"]
    for result in results:
        assert len(result["logprobs"]) == len(result["ids"]) and max(result["logprobs"]) < 0
    assert json.loads(here(*words)[0])["results"][0]["ids"] == results[0]["ids"]
    text = results[0]["text"]
    stop = next(letter for letter in text[4:] if letter.isascii() and letter not in text[:4])
    cut = json.loads(here(*words, "--stop", stop, "--stop", "never said")[0])["results"][0]
    assert cut["text"] == text[: text.index(stop)] and cut["stopped_by"] == "stop"
    # What is streamed is the same, without a piece of the stop string.
    words.remove("--json")
    shown = here(*words, "--stop", stop)[0]
    assert shown == f"Hi{cut['text']}\n" == here(*words, "--stop", stop, "--no-stream")[0]
    assert here(*words, "--n", 2)[0].count("Hi\n") == 2


@pytest.fixture
def generation_config(tiny_checkpoint, tmp_path):
    """A copy of the checkpoint with what a test writes into its generation_config.json."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)

    def write(content) -> Path:
        (folder / "generation_config.json").write_text(json.dumps(content))
        return folder

    return write


def test_generation_config_gives_defaults_and_flags_win(generation_config, tiny_checkpoint, here):
    """Its end tokens count from Python, too."""
    options = ["--prompt", "Hi", "--max-new-tokens", 12, "--precision", "fp32"]

    def ids(folder, *words):
        result = json.loads(here("generate", folder, *options, *words, "--json")[0])["results"][0]
        return result["ids"]

    greedy = ids(tiny_checkpoint)
    drawn = ids(tiny_checkpoint, "--temperature", 2.0, "--top-k", 5, "--top-p", 0.9)
    folder = generation_config(
        {"do_sample": True, "temperature": 2.0, "top_k": 5, "top_p": 0.9, "min_p": 0.1}
    )
    assert ids(folder) == drawn != greedy == ids(folder, "--temperature", 0)
    assert ids(folder, "--top-k", 1) == greedy
    summary = here("generate", folder, *options)[1].splitlines()
    assert summary[2] == (
        "sampling    temperature 2, top-p 0.9, top-k 5: from generation_config.json"
    )
    assert summary[3].endswith("not supported and left out: min_p of generation_config.json")
    summary = here("generate", folder, *options, "--temperature", 0)[1].splitlines()
    assert "temperature" not in summary[2]
    folder = generation_config(
        {"eos_token_id": [1, greedy[3]], "do_sample": False, "temperature": 0.6}
    )
    assert ids(folder) == greedy[: greedy.index(greedy[3])]
    model = load_model(folder, "fp32")
    assert model.eos_ids == (1, greedy[3])
    tokenizer = load_tokenizer(folder)
    said = generate(model, [tokenizer.encode("Hi")], 12, tokenizer=tokenizer)
    assert said == [greedy[: greedy.index(greedy[3])]]


def test_a_damaged_generation_config_is_one_line(generation_config, here):
    folder = generation_config({"temperature": "hot"})
    line = one_line(here("generate", folder, "--prompt", "x", code=2)[1])
    assert "generation_config.json: temperature: bad value (found 'hot'" in line
    with pytest.raises(DSV3Error, match="generation_config.json: temperature"):
        load_model(folder)


def test_under_torchrun_the_ranks_that_are_there_are_used(tiny_checkpoint):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "dsv3",
        "generate",
        str(tiny_checkpoint),
        "--prompt",
        PROMPT,
        "--json",
        "--max-new-tokens",
        "3",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=environment())
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tp"] == 2


def test_tp_that_disagrees_with_torchrun(tiny_checkpoint, here, monkeypatch):
    """Refused before anything is read or joined."""
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "1",
        "TORCHELASTIC_RUN_ID": "none",
    }.items():
        monkeypatch.setenv(name, value)
    _, errors = here("generate", tiny_checkpoint, "--prompt", "x", "--tp", 4, code=2)
    assert "--tp: disagrees" in one_line(errors) and "found 4, expected 2" in errors


# Bad input --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words, message",
    [
        (["--prompt", ""], "--prompt: empty prompt"),
        (["--prompt", "many words " * 200], "prompt longer than the context.*at most 255"),
        (["--prompt", "x", "--temperature", "-1"], "temperature: not a usable value"),
        (["--prompt", "x", "--temperature", "nan"], "temperature: not a usable value"),
        (["--prompt", "x", "--top-p", "0"], "top_p: not a usable value"),
        (["--prompt", "x", "--max-new-tokens", "-3"], "max_new_tokens: not a usable value"),
        (["--prompt", "x", "--tp", "0"], "--tp: '0' is not a whole number of at least 1"),
        (["--prompt", "x", "--tp", "3"], "cannot be split over 3 ranks"),
        (["--prompt", "x", "--tp", "8"], r"Choose one of \[1, 2\] ranks"),
        (["--prompt", "x", "--precision", "int4"], "argument --precision: invalid choice"),
        (["--prompt", "x", "--input-file", "y"], "not allowed with argument --prompt"),
        (["--input-file", "no-such-file"], "no-such-file: cannot read the prompts"),
        (["--input-file", "/dev/null"], "no prompts in the file"),
        (["--prompt", "x", "--top-k", "-1"], "top_k: not a usable value"),
        (["--prompt", "x", "--stop", ""], "stop: not a usable value"),
        (
            ["--prompt", "x", "--logprobs"],
            "--logprobs: log-probabilities are a part of the JSON.*--json",
        ),
        (["--interactive", "--n", "2"], "--n: a conversation goes on from one answer"),
        (["--interactive", "--json"], "--json: a conversation is no JSON"),
        ([], "one of the arguments --prompt --input-file --interactive is required"),
    ],
)
def test_bad_options_and_prompts(tiny_checkpoint, here, words, message):
    output, errors = here("generate", tiny_checkpoint, *words, code=2)
    assert re.search(message, one_line(errors)) and output == ""


def test_bad_prompt_bytes(tiny_checkpoint, tmp_path, here):
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    _, errors = here("generate", tiny_checkpoint, "--input-file", tmp_path / "latin", code=2)
    assert "latin: not a UTF-8 text file (found byte 0)" in one_line(errors)
    prompt = b"ab\xff".decode(errors="surrogateescape")  # as Python reads such an argument
    _, errors = here("generate", tiny_checkpoint, "--prompt", prompt, code=2)
    assert "character 2: text is not valid Unicode" in one_line(errors)


def damaged(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy whose weights end in the middle: config and tokenizer are read first and are fine."""
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_checkpoint, folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])
    return folder


def test_bad_checkpoint_gives_the_same_line_on_one_rank_and_two(tiny_checkpoint, tmp_path, here):
    folder = damaged(tiny_checkpoint, tmp_path)
    output, errors = here("generate", folder, "--prompt", "x", code=2)
    assert "model.safetensors" in one_line(errors) and output == ""
    done = dsv3("generate", folder, "--prompt", "x", "--tp", 2, code=2)
    assert (done.stdout, done.stderr) == ("", errors)


@pytest.mark.parametrize("missing", ["config.json", "tokenizer.json", "model.safetensors"])
def test_missing_file(tiny_checkpoint, tmp_path, here, missing):
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    (folder / missing).unlink()
    assert missing in one_line(here("generate", folder, "--prompt", "x", code=2)[1])


@pytest.mark.parametrize("name", ["x" * 5000, "/" + "x/" * 2500])
def test_a_name_that_no_file_can_have_is_one_short_line(here, name):
    for words in (
        ["inspect", name],
        ["generate", name, "--prompt", "x"],
        ["cast", name, "out", "--to", "bf16"],
    ):
        line = one_line(here(*words, code=2)[1])
        assert "File name too long" in line and len(line) < 600


def test_a_file_in_the_place_of_the_folder(tiny_checkpoint, here):
    _, errors = here("generate", tiny_checkpoint / "config.json", "--prompt", "x", code=2)
    assert "config.json: not a folder" in one_line(errors)


def test_nothing_is_printed_before_all_is_checked(tiny_checkpoint, tmp_path, here):
    folder = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_nextn_predict_layers": 0}))
    output, errors = here("generate", folder, "--prompt", "x", "--speculative", code=2)
    assert output == "" and "cannot draft" in errors and "1 would draft with it" in errors


def test_words_in_utf8_where_the_locale_knows_ascii_only(tiny_checkpoint):
    ascii_only = environment(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "dsv3",
            "generate",
            tiny_checkpoint,
            "--prompt",
            "café",
            "--json",
            "--max-new-tokens",
            "1",
            "--precision",
            "fp32",
        ],
        env=ascii_only,
        capture_output=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["results"][0]["prompt"] == "café"


def test_full_output_on_two_ranks(tiny_checkpoint):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "dsv3",
                "generate",
                str(tiny_checkpoint),
                "--prompt",
                "x",
                "--tp",
                "2",
            ],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=LIMIT,
            env=environment(),
        )
    assert done.returncode == 1
    assert "standard output: cannot write (No space left" in one_line(done.stderr)


def test_closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "dsv3", "--help"],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=LIMIT,
        env=environment(),
    )
    os.close(writer)
    assert done.returncode == 1
    assert "standard output: cannot write (Broken pipe" in one_line(done.stderr)


# Ranks that die ---------------------------------------------------------------------------------


def start_endless(tiny_checkpoint, tmp_path, *words) -> subprocess.Popen:
    """Two ranks that generate for minutes; returns when text has begun to appear."""
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    folder, output = tmp_path / "endless", tmp_path / "output"
    shutil.copytree(tiny_checkpoint, folder)
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100_000}))
    with open(output, "w") as file:
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "dsv3",
                "generate",
                str(folder),
                "--prompt",
                PROMPT,
                "--tp",
                "2",
                "--max-new-tokens",
                "90000",
                *words,
            ],
            stdout=file,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
    wait_until(lambda: process.poll() is not None or output.stat().st_size > len(PROMPT))
    return process


def pid_of_rank(process: subprocess.Popen, rank: int) -> int:
    for pid in members(process.pid):
        if f"\0RANK={rank}\0".encode() in b"\0" + Path(f"/proc/{pid}/environ").read_bytes():
            return pid
    raise AssertionError(f"no rank {rank}")


@linux
def test_killed_rank_is_named_and_the_others_end(tiny_checkpoint, tmp_path):
    rank = 1
    process = start_endless(tiny_checkpoint, tmp_path)
    below = members(process.pid)
    os.kill(pid_of_rank(process, rank), signal.SIGKILL)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 1
    line = one_line(errors)
    assert f"rank {rank} of 2 was killed by SIGKILL; the other ranks were stopped" in line
    assert not any(map(alive, below))


@linux
def test_ctrl_c_ends_launcher_and_ranks(tiny_checkpoint, tmp_path):
    process = start_endless(tiny_checkpoint, tmp_path)
    below = members(process.pid)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (130, "")
    assert len(below) >= 2 and not any(map(alive, below))


@linux
def test_a_killed_launcher_takes_its_ranks_along(tiny_checkpoint, tmp_path):
    """SIGKILL leaves the launcher no time for anything: the ranks notice by themselves."""
    process = start_endless(tiny_checkpoint, tmp_path)
    below = members(process.pid)
    process.kill()
    process.communicate(timeout=30)
    wait_until(lambda: not any(map(alive, below)), 30)


# dsv3 generate --interactive --------------------------------------------------------------------


class Talk:
    """A command on a terminal of its own, driven like a person would."""

    def __init__(self, *words, kind: str = "dumb"):
        self.terminal, inside = pty.openpty()

        def own_terminal():
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            [sys.executable, "-m", "dsv3", *map(str, words)],
            stdin=inside,
            stdout=inside,
            stderr=inside,
            env=environment(TERM=kind),
            preexec_fn=own_terminal,
        )
        os.close(inside)
        self.seen = ""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        below = members(self.process.pid)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        os.close(self.terminal)
        wait_until(lambda: not any(map(alive, below)), 30)

    def rest(self) -> str:
        """What has appeared since, of a command that has ended."""
        while select.select([self.terminal], [], [], 0.2)[0]:
            try:
                self.seen += os.read(self.terminal, 65536).decode(errors="replace")
            except OSError:  # the other side has closed
                break
        return self.seen

    def type(self, text: str) -> None:
        os.write(self.terminal, text.encode())

    def until(self, pattern: str) -> str:
        """What appears up to and with ``pattern``."""
        end = time.monotonic() + LIMIT
        while not (match := re.search(pattern, self.seen)):
            assert time.monotonic() < end, f"waited for {pattern!r}, saw {self.seen!r}"
            if select.select([self.terminal], [], [], 0.2)[0]:
                try:
                    self.seen += os.read(self.terminal, 65536).decode(errors="replace")
                except OSError:  # the other side has closed
                    assert re.search(pattern, self.seen), self.seen
        text, self.seen = self.seen[: match.end()], self.seen[match.end() :]
        return text


@linux
@pytest.mark.parametrize("ranks", [1, 2])
def test_interactive_talk(tiny_checkpoint, tmp_path, ranks):
    """Question, Ctrl-C in the middle of an answer, Ctrl-C at the prompt, /clear, /exit."""
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    folder = tmp_path / "endless"
    shutil.copytree(tiny_checkpoint, folder)
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 100_000}))
    with Talk(
        "generate",
        folder,
        "--interactive",
        "--tp",
        ranks,
        "--temperature",
        1,
        "--max-new-tokens",
        50_000,
    ) as talk:
        talk.until("Ctrl-C stops an answer")
        talk.until("> ")
        talk.type("Who are you?\n")
        talk.until(r"Who are you\?\r\n.{20}(?s:.)*")
        talk.type("\x03")
        talk.until("\n> ")
        talk.type("half a line")
        talk.until("half a line")
        time.sleep(0.5)  # Python's line editor misses a signal that comes while it reads letters
        talk.type("\x03")
        talk.until("/exit or Ctrl-D leaves")
        talk.until("> ")
        talk.type("/clear\n")
        talk.until("\n> ")
        talk.type("/exit\n")
        assert talk.process.wait(30) == 0, talk.rest()


@linux
def test_interactive_input_that_does_not_fit_is_told_and_the_talk_goes_on(tiny_checkpoint):
    """From a pipe too; the end of the input ends the talk."""
    lines = "Hi\n" + "many words " * 200 + "\nHi\n"
    done = dsv3("generate", tiny_checkpoint, "--interactive", "--max-new-tokens", 3, input=lines)
    assert "prompt longer than the context" in done.stderr and "/clear starts anew" in done.stderr
    assert done.stdout.count("> ") >= 3 and len(done.stdout) > len("> > > ")


@linux
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_talk_is_edited_explained_and_confirmed(tiny_checkpoint, ranks):
    """Earlier lines by arrow keys, a paste of two lines as one message, commands, a cut, Ctrl-D."""
    with Talk(
        "generate",
        tiny_checkpoint,
        "--interactive",
        "--tp",
        ranks,
        "--precision",
        "fp32",
        "--max-new-tokens",
        4,
        kind="xterm",
    ) as talk:
        greeting = talk.until("> ")
        assert re.search(r"checkpoint: [\d.]+ \w+ parameters, a context of 256 tokens", greeting)
        assert "small model" in greeting
        talk.type("/help\n")
        assert "/clear  forget" in talk.until("paste[^>]*> ")
        talk.type("/hlep\n")
        talk.until("No such command: /hlep")
        talk.until("> ")
        talk.type("first\n")
        talk.until("cut after 4 tokens")
        talk.until("> ")
        talk.type("\x1b[A \x1b[D\x1b[DX\n")  # the line before, a space behind it, X before its t
        talk.until("cut after 4 tokens")
        talk.until("> ")
        talk.type("\x1b[200~one\ntwo\x1b[201~")
        talk.until("two")
        talk.type("\n")
        assert talk.until("cut after 4 tokens").count("cut") == 1
        talk.until("> ")
        talk.type("/clear\n")
        talk.until("Forgotten: 3 turns")
        talk.until("> ")
        talk.type("x" * 300 + "\n")
        talk.until("prompt longer than the context")
        talk.until("> ")
        talk.type("\x04")
        assert talk.process.wait(30) == 0
        assert talk.rest().endswith("\n")


@pytest.mark.parametrize(
    "ranks, words",
    [
        (1, r"- < <(printf '\xef\xbb\xbfone\ntwo\u2028more\r\n')"),
        (2, r"<(printf '\xef\xbb\xbfone\ntwo\u2028more\r\n')"),
    ],
)
def test_prompts_from_pipes(tiny_checkpoint, ranks, words):
    """A pipe can be read once, and every rank answers what was in it."""
    command = (
        f"{sys.executable} -P -m dsv3 generate {tiny_checkpoint} --tp {ranks} --json "
        f"--precision fp32 --max-new-tokens 2 --input-file {words}"
    )
    done = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        text=True,
        timeout=LIMIT,
        env=environment(LC_ALL="C.UTF-8"),
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    found = [row["prompt"] for row in json.loads(done.stdout)["results"]]
    assert found == ["one", "two\u2028more"]


# Other commands ---------------------------------------------------------------------------------


def test_help_needs_no_torch(tmp_path):
    """--help and --version work where torch is missing, and doctor says that it is."""
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    env = environment(PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert dsv3("--version", env=env).stdout.startswith("dsv3 0.")
    assert "usage: dsv3 generate" in dsv3("generate", "--help", env=env).stdout
    report = dsv3("doctor", env=env, code=1).stdout
    assert "[missing] a torch that imports" in report and "no torch here" in report


def test_every_command_is_listed_and_explains_itself(here):
    commands = here("--help")[0]
    for command in "generate convert cast inspect diff train bench doctor".split():
        assert command in commands
        assert "usage: dsv3 " + command in here(command, "--help")[0]


def test_the_parser_loads_nothing_heavy():
    """--help is instant, and doctor runs where torch is missing or broken."""
    code = "import sys; from dsv3.cli import build_parser; build_parser(); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    heavy = {"torch", "numpy", "transformers", "safetensors", "tokenizers", "jinja2", "tqdm"}
    assert heavy.isdisjoint(done.stdout.split())


def test_unknown_command(here):
    assert "invalid choice: 'swim'" in one_line(here("swim", code=2)[1])


def test_doctor_here(here):
    report = here("doctor")[0].splitlines()
    assert report[-1] == "ready"
    assert all(re.match(r"\[(ok|--)\] ", line) for line in report[:-1])


def test_doctor_knows_the_packages_of_pyproject():
    """One truth for names and least versions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    written = {"": project["dependencies"], **project["optional-dependencies"]}
    for name, least, extra, _ in doctor.PACKAGES:
        assert f"{name}>={least}" in written[extra]
    assert {name for name, _, extra, _ in doctor.PACKAGES if not extra} == {
        entry.partition(">=")[0] for entry in written[""]
    }


def test_doctor_names_what_is_missing_and_old(monkeypatch):
    versions = {"torch": "2.9.1+cpu", "jupyterlab": "3.0"}

    def version(name):
        if name == "numpy":
            raise doctor.importlib.metadata.PackageNotFoundError(name)
        return versions.get(name, "99.0")

    monkeypatch.setattr(doctor.importlib.metadata, "version", version)
    lines = {thing: (state, remark) for state, thing, remark in doctor.check()}
    assert lines["torch 2.9.1+cpu"] == ("old", '2.11 or later: pip install "torch>=2.11"')
    assert lines["numpy"] == ("missing", 'for training data: pip install "numpy>=2.0"')
    assert lines["jupyterlab 3.0"] == (
        "--",
        '4.2 or later: in the checkout: pip install -c constraints.txt -e ".[book]"',
    )


def test_a_working_folder_that_is_gone(here, tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    for words in (["generate", "dsv3-mini", "--prompt", "O"], ["doctor"]):
        assert here(*words, code=2) == (
            "",
            "dsv3: error: the working folder no longer exists. cd to one that does\n",
        )


@pytest.mark.parametrize(
    "words, line",
    [
        (["train", "--preset", "mini", "--out", ""], "argument --out: an empty name"),
        (["cast", "dsv3-mini", "", "--to", "bf16"], "argument OUT_DIR: an empty name"),
        (["inspect", ""], "argument MODEL_DIR: an empty name"),
        (
            ["train", "--preset", "mini", "--out", "run", "--ranks", "99"],
            "batch_first: fewer windows in a step than ranks (found 32, expected 99 or more). "
            "Start fewer",
        ),
    ],
)
def test_refused_before_anything_is_made_or_started(here, tmp_path, monkeypatch, words, line):
    monkeypatch.chdir(tmp_path)
    out, err = here(*words, code=2)
    assert not out and line in err and err.count("\n") == 1 and not list(tmp_path.iterdir())
