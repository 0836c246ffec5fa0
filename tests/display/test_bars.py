"""Bars and lines: the place decides which of them is shown."""

from __future__ import annotations

import builtins
import io
import sys
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import hessfunc as hf
from hessfunc.display.bars import Lines, NotebookBar, Silent, TerminalBar, bar_for


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_without_a_terminal_a_line_is_written_every_thirty_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    bar = bar_for("task", 10)
    assert isinstance(bar, Lines)
    for now in (1.0, 29.0, 31.0, 45.0, 61.5, 70.0):
        bar.show(int(now), "", f"at {now}")
    bar.close()
    assert capsys.readouterr().err.splitlines() == ["at 31.0", "at 61.5", "at 70.0"]


def test_a_short_run_writes_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    hf.hutchinson(hf.dense(torch.eye(3)), torch.zeros(3), seed=0, progress=True)
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rich", reason="rich is not installed")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    bar = bar_for("task", 10)
    assert isinstance(bar, TerminalBar)
    bar.show(4, "36 ± 2", "line")
    bar.close()
    assert "4/10" in terminal.getvalue()
    assert "36 ± 2" in terminal.getvalue()


def test_without_rich_a_terminal_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] in ("rich", "tqdm", "ipywidgets"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert isinstance(bar_for("task", 10), Lines)


class ZMQInteractiveShell:
    pass


def test_a_notebook_gets_its_own_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []

    class Tqdm:
        n = 0

        def __init__(self, *, total: int, desc: str) -> None:
            shown.append((desc, total))

        def set_postfix_str(self, text: str, refresh: bool) -> None:
            shown.append(text)

        def update(self, count: int) -> None:
            self.n += count
            shown.append(self.n)

        def close(self) -> None:
            shown.append("closed")

    shell = SimpleNamespace(get_ipython=ZMQInteractiveShell)
    monkeypatch.setitem(sys.modules, "IPython", shell)
    monkeypatch.setitem(sys.modules, "ipywidgets", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "tqdm", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "tqdm.notebook", SimpleNamespace(tqdm=Tqdm))
    bar = bar_for("task", 9)
    assert isinstance(bar, NotebookBar)
    bar.show(3, "a", "line")
    bar.show(7, "b", "line")
    bar.close()
    assert shown == [("task", 9), "a", 3, "b", 7, "closed"]


def test_other_ranks_are_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert isinstance(bar_for("task", 9), Silent)
