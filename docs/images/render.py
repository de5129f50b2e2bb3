"""Render the pictures of the pages from real runs: ``python docs/images/render.py --work FOLDER``.

Runs the demo, a security curve and a small sweep in FOLDER (finished parts are skipped), and photographs
terminal and report with a headless Chromium (``--browser``, Debian's ``chromium`` by default).
"""

from __future__ import annotations

import argparse
import os
import pty
import subprocess
import sys
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

HERE = Path(__file__).parent
COLUMNS = 100
TOOL = [sys.executable, "-m", "s2ap_deploy"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--browser", default="chromium")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    run = args.work / "demo"

    # Real runs: the demo with its security curve, and a sweep over sparsity and S2AP.
    if not (run / "certify" / "pruned-curve.json").exists():
        subprocess.run([*TOOL, "run", args.recipe, "--run", run, "--set", "certify.curve=true"], check=True)
    if not (args.work / "sweep" / "pareto.svg").exists():
        sweep = ["sweep", "demo-quick", "--sparsity", "0.9,0.95,0.99", "--s2ap", "both", "--seeds", "1"]
        sweep += ["--set", "certify.version=quick", "--set", "certify.n=40"]
        subprocess.run([*TOOL, *sweep, "--run", args.work / "sweep", "--resume"], check=True)

    # The terminal: a finished demo only prints its table and verdict.
    terminal(args.browser, args.work, "demo", [*TOOL, "demo", "--run", str(run)])

    # The report in both color schemes.
    subprocess.run([*TOOL, "report", run], check=True)
    page = (run / "report" / "report.html").resolve().as_uri()
    photograph(args.browser, page, HERE / "report.png", width=1280, height=1000)
    photograph(args.browser, page, HERE / "report-dark.png", width=1280, height=1000, dark=True)

    # Plots that the commands left.
    for plot in (run / "certify" / "curve.svg", args.work / "sweep" / "pareto.svg"):
        photograph(args.browser, plot.resolve().as_uri(), HERE / f"{plot.stem}.png", width=400, height=296)


def terminal(browser: str, work: Path, name: str, command: list[str]) -> None:
    """Photograph what ``command`` prints on a terminal of 100 columns."""
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(Text("$ s2ap-deploy " + name, style="bold"))
    output = typed(command)
    console.print(Text.from_ansi(output))
    page = work / f"{name}.html"
    style = "body{margin:0;background:#0c0c0c;padding:14px}pre{font-size:14px;line-height:1.25;margin:0}"
    html = console.export_html(inline_styles=True, theme=MONOKAI)
    page.write_text(html.replace("</style>", style + "</style>"), encoding="utf-8")
    height = 46 + round(17.5 * output.count("\n"))
    photograph(browser, page.resolve().as_uri(), HERE / f"{name}.png", width=880, height=height)


def typed(command: list[str]) -> str:
    """Output of ``command`` on a pseudo-terminal."""
    leader, follower = pty.openpty()
    environment = {**os.environ, "COLUMNS": str(COLUMNS), "LINES": "60", "TERM": "xterm-256color"}
    process = subprocess.Popen(command, stdout=follower, stderr=subprocess.DEVNULL, env=environment)
    os.close(follower)
    output = b""
    while True:
        try:
            piece = os.read(leader, 65536)
        except OSError:  # Linux reports the end of a pseudo-terminal as an error
            break
        if not piece:
            break
        output += piece
    process.wait()
    return output.decode("utf-8").replace("\r\n", "\n")


def photograph(
    browser: str, address: str, picture: Path, *, width: int, height: int, dark: bool = False
) -> None:
    """Photograph the top of a page."""
    scheme = ["--blink-settings=preferredColorScheme=0"] if dark else []
    options = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--window-size={width},{height}",
        *scheme,
    ]
    subprocess.run([browser, *options, f"--screenshot={picture}", address], check=True, capture_output=True)
    # A palette makes the file a third of its size.
    Image.open(picture).convert("RGB").quantize(128).save(picture, optimize=True)


if __name__ == "__main__":
    main()
