"""``python -m bench.gliner_picture``: the README's picture of highlighted entities.

docs/plots/gliner.png is what Chromium, headless, shows of bench/results/accuracy/gliner.html, the
page that ``to_html`` wrote of a trained model's entities: ``python -m bench.accuracy_gliner``.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path

import typer

from bench import accuracy
from bench.report import DOCS

PAGE, PICTURE = accuracy.RESULTS / "gliner.html", DOCS / "plots" / "gliner.png"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


def command(browser: str, page: Path, picture: Path, profile: str, size: str) -> list[str]:
    """What draws ``page`` without a network, a GPU or a profile that was there before."""
    return [
        browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--hide-scrollbars", f"--user-data-dir={profile}", f"--window-size={size}",
        f"--screenshot={picture}", page.resolve().as_uri(),
    ]  # fmt: skip


def main(page: Path = PAGE, picture: Path = PICTURE, size: str = "900,400") -> None:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        raise SystemExit(f"no browser: expected one of {', '.join(BROWSERS)}")
    with tempfile.TemporaryDirectory() as profile:
        drawn = Path(profile) / "page.png"
        done = subprocess.run(
            command(browser, page, drawn, profile, size), capture_output=True, text=True
        )
        if not drawn.is_file():
            raise SystemExit(f"{browser} drew nothing: {done.stderr[-500:]}")
        shutil.copyfile(drawn, picture)
    print(picture)


if __name__ == "__main__":
    typer.run(main)
