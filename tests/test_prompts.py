"""Files of prompts, and the three standard streams, as people's machines have them."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dsv3.errors import DSV3Error
from dsv3.generation.prompts import read_prompts

ROOT = Path(__file__).parents[1]
# Ten characters at which Python's splitlines cuts, less the line feed itself.
ODD = "a\x0bb\x0cc\x1cd\x1de\x1ef\x85g\u2028h\u2029i\rj\x00k"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_byte_order_marks(tmp_path, encoding):
    file = tmp_path / "prompts"
    file.write_bytes("To be é😀\r\nSecond".encode(encoding))
    assert read_prompts(str(file)) == ["To be é😀", "Second"]


@pytest.mark.parametrize(
    "data, prompts",
    [
        (f"{ODD}\nlast".encode(), [ODD, "last"]),
        (b"a\r\n\r\n \t\nb", ["a", "b"]),
        (b"a\r\rb\r", ["a", "b"]),
        (b"a", ["a"]),
        (b"\xef\xbb\xbf\xef\xbb\xbfa", ["\ufeffa"]),  # one mark is the file's, another the text's
    ],
)
def test_what_ends_a_line(tmp_path, data, prompts):
    (tmp_path / "prompts").write_bytes(data)
    assert read_prompts(str(tmp_path / "prompts")) == prompts


@pytest.mark.parametrize(
    "data, message",
    [
        (b"", "no prompts in the file .found 0 bytes"),
        (b"\n \n", "found 2 empty lines"),
        (b"\xef\xbb\xbf", "no prompts"),
        ("é".encode("latin-1"), "not a UTF-8 text file .found byte 0"),
        ("no mark".encode("utf-16-le"), "7 zero bytes of 14.*save it as UTF-8"),
        (b"\xff\xfea", "not a UTF-16-LE text file"),
    ],
)
def test_files_that_hold_no_prompts(tmp_path, data, message):
    (tmp_path / "prompts").write_bytes(data)
    with pytest.raises(DSV3Error, match=message):
        read_prompts(str(tmp_path / "prompts"))


def test_names_that_cannot_be_read(tmp_path):
    for name in (str(tmp_path), str(tmp_path / "absent"), "x" * 5000, "a\0b"):
        with pytest.raises(DSV3Error, match="cannot read the prompts"):
            read_prompts(name)


def test_a_pipe_whose_writer_comes_late(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Timer(0.3, lambda: pipe.write_bytes(b"one\ntwo\n"))
    writer.start()
    assert read_prompts(str(pipe)) == ["one", "two"]
    writer.join()


def shell(command: str, **environment) -> tuple[int, bytes, bytes]:
    """Run a shell line in which $DSV3 is the command."""
    done = subprocess.run(
        ["bash", "-c", command],
        capture_output=True,
        timeout=60,
        env={
            **os.environ,
            "DSV3": f"{sys.executable} -P -m dsv3",
            "PYTHONPATH": str(ROOT),
            **environment,
        },
    )
    return done.returncode, done.stdout, done.stderr


def test_closed_streams():
    """Input that is closed has ended, output that is closed is told, stderr is not missed."""
    code, output, errors = shell("$DSV3 --help <&-")
    assert (code, errors) == (0, b"") and output.startswith(b"usage: dsv3")
    code, _, errors = shell("$DSV3 --help >&-")
    assert code == 1 and errors.startswith(b"dsv3: error: standard output: cannot write (Bad file")
    assert shell("$DSV3 swim 2>&-")[0] == 2
    assert shell("$DSV3 swim <&- >&- 2>&-")[0] == 2


SAY = (
    f'{sys.executable} -c "from dsv3.commands import streams; import sys; streams.prepare(); '
    "print('caf\u00e9 \\x1b[2J\\ttab\\r'); print('bar\\r\\x9b2J', file=sys.stderr)\""
)


def test_text_reaches_an_output_of_any_encoding():
    """What an encoding lacks shows as a mark; what goes into a pipe stays as it is."""
    code, output, _ = shell(SAY, PYTHONIOENCODING="ascii")
    assert (code, output) == (0, b"caf? \x1b[2J\ttab\r\n")
    code, output, _errors = shell(SAY, PYTHONIOENCODING="latin-1")
    assert (code, output) == (0, b"caf\xe9 \x1b[2J\ttab\r\n")


def test_a_terminal_is_shown_text_only():
    """Tabs, ends of lines and the return of progress bars pass; other controls show as marks."""
    outside, inside = pty.openpty()
    subprocess.run(
        ["bash", "-c", SAY],
        stdout=inside,
        stderr=inside,
        timeout=60,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"},
    )
    os.close(inside)
    seen = os.read(outside, 4096).decode()
    os.close(outside)
    assert seen == "café \ufffd[2J\ttab\ufffd\r\nbar\r\ufffd2J\r\n"


def test_a_name_with_escapes_reaches_no_terminal():
    code, _, errors = shell("$DSV3 inspect $'no\\x1b[2J\\xff'")
    assert code == 2 and b"\x1b" not in errors and errors.count(b"\n") == 1
