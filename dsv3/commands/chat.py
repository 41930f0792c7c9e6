"""``dsv3 generate --interactive``: a talk with a model, turn by turn.

Rank 0 reads a line, turns it into ids and tells them to the others: a template may ask for the
time, and two ranks that render at midnight would go apart. Everything after that happens on all
ranks in step.
"""

from __future__ import annotations

import re
from pathlib import Path

from dsv3.checkpoint.layout import layout
from dsv3.errors import DSV3Error
from dsv3.generation.rows import check_prompts
from dsv3.generation.session import Session

_HELP = """\
/clear  forget the conversation
/help   this list
/exit   leave; so does Ctrl-D
Ctrl-C  stops an answer, or drops the line being typed
Arrow keys bring earlier lines back. A text of several lines can be pasted whole."""
_COMMAND = re.compile(r"/[a-z]*$")
# Below this many parameters a model writes sentences in the manner of its texts, and knows nothing.
_SMALL = 1e9


class Talk:
    """One conversation: its messages, and the cache in which the model holds it."""

    def __init__(self, job):
        """job: the ``answers.Job`` whose model talks."""
        self.job, self.terminal = job, job.terminal
        self.chats = job.tokenizer.chat_template is not None
        self.session = Session(job.model)
        self.messages: list[dict] = []
        self.turn = 0

    def run(self) -> None:
        """Greet, then answer line after line until the end."""
        self.greet()
        self.terminal.listen()
        while (line := self.terminal.ask()) is not None:
            command = line.strip()
            if command in ("/exit", "/quit"):
                return
            if _COMMAND.match(command):
                self.obey(command)
            elif command:
                self.answer(line)

    def greet(self) -> None:
        """What this is, and what may be expected of it."""
        config, note = self.job.model.config, self.terminal.note
        count = sum(spec.numel for spec in layout(config, scales=False, mtp=False))
        note(
            f"{Path(self.job.args.model).name}: {_in_words(count)} parameters, a context of "
            f"{config.max_position_embeddings:,} tokens."
        )
        if not self.chats:
            note("It has no chat template: each line is a text that it continues, on its own.")
        elif count < _SMALL:
            note(
                "It is a small model: it answers in the form of a conversation, and in the manner "
                "of the texts it was trained on; it knows nothing."
            )
        note("/help lists the commands, /exit leaves, Ctrl-C stops an answer.")

    def obey(self, command: str) -> None:
        """A line of one word that begins with a slash."""
        if command == "/help":
            self.terminal.note(_HELP)
        elif command == "/clear":
            count = len(self.messages) // 2
            self.messages.clear()
            self.session.clear()
            self.terminal.note(
                "Forgotten: "
                + (f"{count} turn{'s' * (count != 1)}." if count else "there was nothing yet.")
            )
        else:
            self.terminal.note(f"No such command: {command}. /help lists them.")

    def answer(self, line: str) -> None:
        """One turn: the line as a question, or as a text to continue."""
        question = [*self.messages, {"role": "user", "content": line}]
        kind, value = self.job.model.group.everyone.broadcast_object(
            self.ids(question, line) if self.terminal.speaks else None
        )
        if kind == "error":
            self.terminal.note(f"dsv3: {value}" + (". /clear starts anew" if self.messages else ""))
            return
        text, reason = self.job.reply(self.session, value, self.turn)
        if self.chats:
            self.messages = [*question, {"role": "assistant", "content": text}]
        self.turn += 1
        if reason == "length":
            self.terminal.note(
                f"(cut after {self.job.args.max_new_tokens} tokens, --max-new-tokens)"
            )
        elif reason == "context":
            context = self.job.model.config.max_position_embeddings
            self.terminal.note(
                f"(cut: the context of {context:,} tokens is full; /clear starts anew)"
            )
        elif reason == "interrupt":
            self.terminal.note("(stopped)")

    def ids(self, question: list[dict], line: str) -> list:
        """["ids", ...] or ["error", its line]."""
        tokenizer, config = self.job.tokenizer, self.job.model.config
        try:
            ids = tokenizer.chat_ids(question) if self.chats else tokenizer.encode(line)
            check_prompts([ids], config.vocab_size, config.max_position_embeddings)
        except DSV3Error as error:
            return ["error", str(error)]
        return ["ids", ids]


def _in_words(count: int) -> str:
    """21_000_000 as "21 million"."""
    for unit, size in (("billion", 1e9), ("million", 1e6), ("thousand", 1e3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
