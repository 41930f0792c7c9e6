"""A JupyterLab of our own and a browser in front of it, for tests of what a reader sees.

``JupyterLab(folder)`` serves a folder on a free port with a token, its settings and run-time
files in a temporary place; ``open_browser`` starts Chromium, ``Notebook`` opens a notebook in it.
All of it ends with the ``with`` block: the server's whole process group is killed.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Locator, sync_playwright

from dsv3.commands import doctor
from dsv3.viz.scene import Scene, Text

# No update checks, no first-run pages: nothing is asked of the network.
FLAGS = [
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
]

# JupyterLab, ended when its standard input is: also when the test is killed and cleans up nothing.
SERVER = """
import os, signal, sys, threading
def end():
    sys.stdin.read()
    os.kill(os.getpid(), signal.SIGTERM)
threading.Thread(target=end, daemon=True).start()
from jupyterlab.labapp import main
main()
"""

# What ``make lab`` has JupyterLab read.
SETTINGS = Path(__file__).parents[1] / "dsv3" / "book" / "jupyter_server_config.py"

AS_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


class JupyterLab:
    """A running server on ``folder``."""

    def __init__(self, folder: Path):
        self.folder, self.token = Path(folder), secrets.token_hex(16)

    def __enter__(self) -> JupyterLab:
        self._home = tempfile.TemporaryDirectory(prefix="lab")
        home = Path(self._home.name)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        self.use_theme("JupyterLab Light")
        self._set("notification", fetchNews="false", checkForUpdates=False)
        (home / "config").mkdir()
        shutil.copy(SETTINGS, home / "config")
        self._log = open(home / "log", "w+")
        command = [
            sys.executable,
            "-c",
            SERVER,
            "--no-browser",
            "--ServerApp.ip=127.0.0.1",
            f"--ServerApp.port={self.url.rpartition(':')[2]}",
            "--ServerApp.port_retries=0",
            f"--IdentityProvider.token={self.token}",
            f"--ServerApp.root_dir={self.folder}",
            "--LabApp.news_url=",
            "--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate",
            *(["--allow-root"] if AS_ROOT else []),
        ]
        self._server = subprocess.Popen(
            command,
            cwd=self.folder,
            start_new_session=True,
            env=self._environment(home),
            stdout=self._log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.PIPE,
        )
        try:
            self._wait(60)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_) -> None:
        for kind in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._server.pid, kind)
                self._server.wait(10)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass
        self._server.stdin.close()
        self._log.close()
        self._home.cleanup()

    def address(self, notebook: str) -> str:
        """Of a notebook of the folder, in a workspace of its own."""
        return f"{self.url}/doc/tree/{notebook}?token={self.token}&reset"

    def _environment(self, home: Path) -> dict[str, str]:
        return {
            **os.environ,
            "JUPYTER_CONFIG_DIR": str(home / "config"),
            "JUPYTER_DATA_DIR": str(home / "data"),
            "JUPYTER_RUNTIME_DIR": str(home / "run"),
            "JUPYTERLAB_SETTINGS_DIR": str(home / "settings"),
            "JUPYTERLAB_WORKSPACES_DIR": str(home / "workspaces"),
            "IPYTHONDIR": str(home / "ipython"),
            "OMP_NUM_THREADS": "1",
        }

    def use_theme(self, name: str) -> None:
        """The theme of pages that are opened from now on: "JupyterLab Light" or "... Dark"."""
        self._set("themes", theme=name)

    def _set(self, plugin: str, **values) -> None:
        folder = Path(self._home.name) / "settings" / "@jupyterlab" / "apputils-extension"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{plugin}.jupyterlab-settings").write_text(json.dumps(values))

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        request = f"{self.url}/api/status?token={self.token}"
        while time.monotonic() < end and self._server.poll() is None:
            try:
                with urllib.request.urlopen(request, timeout=5):
                    return
            except OSError:
                time.sleep(0.2)
        self._log.seek(0)
        raise RuntimeError(f"JupyterLab did not start:\n{self._log.read()[-3000:]}")


@contextmanager
def open_browser() -> Iterator[Browser]:
    """Chromium without a window."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=doctor.browser(),
            args=FLAGS,
            chromium_sandbox=not AS_ROOT,
            timeout=60_000,
        )
        try:
            yield browser
        finally:
            browser.close()


class Notebook:
    """A notebook in the browser, run from top to bottom."""

    def __init__(self, browser: Browser, lab: JupyterLab, name: str, height: int = 1000):
        self.page = browser.new_page(viewport={"width": 1280, "height": height})
        self.page.set_default_timeout(30_000)
        self.complaints: list[str] = []
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._hear)
        self.page.goto(lab.address(name))
        self.page.locator(".jp-Notebook .jp-Cell").first.wait_for()

    def _hear(self, message) -> None:
        if message.type == "error":
            self.complaints.append(f"{message.text} ({message.location.get('url', '')})")

    def run_all(self) -> None:
        """Run > Run All Cells."""
        self.page.get_by_text("| Idle").wait_for()
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.get_by_text("Run All Cells", exact=True).click()

    def save(self) -> None:
        """File > Save Notebook, and wait until the tab says that nothing is unsaved."""
        self.page.get_by_role("menuitem", name="File", exact=True).click()
        self.page.get_by_text("Save Notebook", exact=True).click()
        self.page.locator(".lm-TabBar-tab.lm-mod-current.jp-mod-dirty").wait_for(state="detached")

    def select(self, number: int) -> None:
        """Select a code cell, counted from 0, with the kernel at rest."""
        self.page.get_by_text("| Idle").wait_for()
        self.page.locator(".jp-CodeCell .jp-InputPrompt").nth(number).click()

    def go_to(self, number: int) -> None:
        """Choose a cell, counted from 0: from the one before the first, so many down."""
        self.page.locator(
            ".jp-Notebook .jp-InputPrompt, .jp-Notebook .jp-MarkdownCell"
        ).first.click()
        self.page.keyboard.press("Escape")
        self.page.keyboard.press("Control+Home")
        for _ in range(number):
            self.page.keyboard.press("ArrowDown")

    def panel(self, title: str) -> Locator:
        """The widget whose drawing has this title, scrolled into view."""
        panel = self.page.locator(
            ".widget-vbox", has=self.page.locator(f".dsv3-drawing svg[aria-label^='{title}']")
        ).last
        panel.scroll_into_view_if_needed()
        return panel

    def scroll_to(self, title: str, seconds: float = 200) -> None:
        """Down the notebook until a widget appears: cells far from the window are not drawn, and
        the kernel may not have come to it yet."""
        end, window = time.monotonic() + seconds, self.page.locator(".jp-WindowedPanel-outer")
        drawing = self.page.locator(f".dsv3-drawing svg[aria-label^='{title}']")
        while not drawing.count():
            assert time.monotonic() < end, f"no {title} in the notebook"
            window.evaluate("""node => node.scrollTo(0,
                node.scrollTop + node.clientHeight + 2 > node.scrollHeight ? 0
                : node.scrollTop + node.clientHeight / 2)""")
            self.page.wait_for_timeout(200)
        self.rest(seconds)

    def rest(self, seconds: float) -> None:
        """Until the kernel has been idle for a second: between two cells it is so for a moment."""
        end, quiet = time.monotonic() + seconds, 0
        while quiet < 10:
            assert time.monotonic() < end, "the kernel is still at work"
            quiet = quiet + 1 if self.page.get_by_text("| Idle").count() else 0
            self.page.wait_for_timeout(100)

    def words(self, title: str) -> list[str]:
        """All texts of a drawing."""
        return self.panel(title).locator(".dsv3-drawing svg text").all_text_contents()

    def wait_for_words(self, title: str, expected: list[str], seconds: float = 20) -> None:
        """Until the drawing shows these texts."""
        end = time.monotonic() + seconds
        while (shown := self.words(title)) != expected:
            assert time.monotonic() < end, f"{shown} is shown instead of {expected}"
            self.page.wait_for_timeout(50)

    def slider(self, title: str, description: str) -> Locator:
        """One slider of a widget, by the words before it."""
        label = self.page.locator(
            ".widget-label", has_text=re.compile(f"^{re.escape(description)}$")
        )
        return self.panel(title).locator(".widget-slider, .widget-hslider", has=label).first

    def press_slider(self, title: str, description: str, key: str, times: int) -> None:
        """Move a slider by the keyboard."""
        handle = self.slider(title, description).locator("[role='slider']")
        handle.focus()
        for _ in range(times):
            handle.press(key)

    def focused(self) -> dict:
        """Key of the mark that has the focus, and whether it is the chosen one."""
        return self.page.evaluate("""() => ({
            key: document.activeElement.dataset.key ?? null,
            pressed: document.activeElement.getAttribute("aria-pressed")})""")


def words(scene: Scene) -> list[str]:
    return [mark.text for mark in scene.marks if isinstance(mark, Text)]


def check_shown(page: Notebook, title: str, scene: Scene) -> None:
    """The drawing shows this scene, word by word and mark by mark (waits for it)."""
    page.wait_for_words(title, words(scene))
    drawing = page.panel(title).locator(".dsv3-drawing svg")
    kinds = drawing.evaluate("svg => [...svg.children].slice(1).map(node => node.tagName)")
    assert kinds == [
        {"Line": "polyline"}.get(type(mark).__name__, type(mark).__name__.lower())
        for mark in scene.marks
    ]
    assert scene.alt in drawing.get_attribute("aria-label")
