"""What a terminal and a log show of long work."""

import importlib.util
import io
import sys
import time

import pytest
import rich.console
from rich.console import Console

from s2ap_deploy import progress
from s2ap_deploy.recorder import Recorder, Silent
from s2ap_deploy.stages import open_run

EPOCH = {
    "epoch": 3,
    "epochs": 40,
    "loss": 1.23456,
    "clean_accuracy": 0.954,
    "robust_accuracy": 0.831,
    "replaced": 0.0146,
    "flip_rate": 0.0094,
    "seconds": 0.91,
}
UNIT = {"attack": "apgd-ce", "block": 1, "images": 19, "broken": 2, "unbroken": 17, "seconds": 0.2}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def log() -> tuple[progress.Lines, io.StringIO]:
    stream = io.StringIO()
    return progress.Lines(Console(file=stream, width=80, soft_wrap=True, highlight=False)), stream


def terminal() -> tuple[progress.Live, io.StringIO]:
    stream = io.StringIO()
    return progress.Live(Console(file=stream, width=80, force_terminal=True, color_system=None)), stream


def test_a_row_tells_everything_in_words() -> None:
    assert progress.line_of(EPOCH) == (
        "epoch 3/40, loss 1.235, clean 95.4%, robust 83.1%, mask moved 1.46%, flips 0.94%, 0.9 s"
    )
    assert progress.line_of(UNIT) == "apgd-ce broke 2 of 19 images of block 1 in 0.2 s; 17 unbroken"
    assert progress.line_of({**UNIT, "images": 1}).startswith("apgd-ce broke 2 of 1 image of block 1")


def test_a_row_beside_a_bar_fits_eighty_columns() -> None:
    longest = {**EPOCH, "epoch": 100, "epochs": 100, "robust_accuracy": 1.0}
    assert progress.bar_text(longest) == "epoch 100/100  loss 1.235  robust 100.0%"
    assert len(progress.bar_text(longest)) <= 80 - len("x pretrain ━━━━━━━━ 100% 00:00 1234/s ")
    assert progress.bar_text(UNIT) == "apgd-ce  17 unbroken"


def test_a_log_has_one_line_per_row_and_tells_the_time_left(monkeypatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    lines, stream = log()
    lines.begin("search", 40, "step")
    for _ in range(10):
        clock[0] += 1
        lines.advance()
    lines.log("search", EPOCH)
    lines.warn("look at [this] and at a very long path " + "x" * 100)
    lines.end()
    first, row, warning, last = stream.getvalue().splitlines()
    assert first == "search: 40 steps"
    assert row == f"search: {progress.line_of(EPOCH)}, 1.0/s, about 30 s left"
    assert warning.startswith("warning: look at [this]")
    assert last == "search: done in 10.0 s"


def test_a_log_gives_a_sign_of_life_and_does_not_count_what_was_done_before(monkeypatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    lines, stream = log()
    lines.begin("finetune", 100, "step")
    lines.advance(50)  # resumed
    for _ in range(25):
        clock[0] += 1
        lines.advance()
    assert "finetune: 70 of 100 steps, 1.0/s, about 30 s left" in stream.getvalue()


def test_a_log_guesses_no_time_from_the_first_steps_alone(monkeypatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    lines, stream = log()
    lines.begin("certify", 100_000, "pass")
    now = 3.0
    lines.advance(30)
    lines.log("certify", {"epoch": 1, "epochs": 2})
    assert "left" not in stream.getvalue(), "a small block came first: 3 s for 30 of 100,000"
    now = 10.0
    lines.advance(1_970)
    lines.log("certify", {"epoch": 1, "epochs": 2})
    assert "200/s, about 490 s left" in stream.getvalue()
    lines.begin("search", 100_000, "step")
    now = 35.0
    lines.advance(5)
    assert "search: 5 of 100,000 steps, 12.0/min, about 499975 s left" in stream.getvalue()


def test_a_terminal_shows_stage_epoch_loss_robust_accuracy_and_time_left() -> None:
    live, stream = terminal()
    live.begin("pretrain", 100, "step")
    live.advance(40)
    live.log("pretrain", EPOCH)
    assert live.progress is not None
    live.progress.refresh()
    shown = stream.getvalue()
    for words in ("pretrain", "40%", "epoch 3/40", "loss 1.235", "robust 83.1%", ":"):
        assert words in shown
    live.end()
    last = stream.getvalue().splitlines()[-1].rpartition("\x1b[2K")[2]
    assert last.startswith("✓ pretrain")
    assert last.endswith("loss 1.235  clean 95.4%  robust 83.1%  flips 0.94%")
    assert len(last) <= 80


@pytest.mark.parametrize("stage", ["end", "error"])
def test_the_cursor_comes_back(stage, monkeypatch) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")

    def work() -> None:
        with progress.recorder() as shown:
            shown.begin("certify", 3, "forward pass")
            if stage == "error":
                raise KeyboardInterrupt
            shown.end()

    if stage == "error":
        with pytest.raises(KeyboardInterrupt):
            work()
    else:
        work()
    text = stream.getvalue()
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h") >= 1


def chosen() -> Recorder:
    with progress.recorder() as shown:
        return shown


def test_the_display_fits_where_stderr_goes(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(chosen(), progress.Lines)
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.delenv("CI", raising=False)
    assert isinstance(chosen(), progress.Live)
    monkeypatch.setenv("CI", "1")
    assert isinstance(chosen(), progress.Lines)
    monkeypatch.setattr(sys, "stderr", None)
    assert isinstance(chosen(), progress.Lines)


def test_python_shows_progress_where_somebody_watches(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert isinstance(progress.interactive(), Silent)
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    bar = progress.interactive()
    assert isinstance(bar, progress.Live)
    bar.begin("search", 3, "step")
    progress.stop(bar)
    assert bar.progress is None
    assert isinstance(open_run.recorder({"quiet": True}), Silent)
    assert isinstance(open_run.recorder({}), progress.Live)
    assert open_run.recorder({"recorder": bar}) is bar
    monkeypatch.setenv("CI", "1")
    assert isinstance(progress.interactive(), Silent)


@pytest.mark.parametrize("widgets", [True, False])
def test_a_notebook_shows_a_bar_or_lines(widgets, monkeypatch) -> None:
    monkeypatch.setattr(rich.console, "_is_jupyter", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if widgets else None)
    shown = progress.interactive()
    assert isinstance(shown, progress.Live if widgets else progress.Lines)
