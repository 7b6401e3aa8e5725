"""Pages in a browser without a window: what a page says of itself once it is drawn, and its pixels."""

import os
import re
import shutil
import subprocess
import zlib
from pathlib import Path

import numpy as np
import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def installed_browser() -> str:
    """The browser of this machine; a test is skipped without one, except in CI."""
    actual = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if actual is None and os.environ.get("CI"):
        pytest.fail(f"none of {', '.join(BROWSERS)} is installed, and CI has to look at the pages")
    if actual is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed: how pages look is not tested here")
    return actual


# A page in a frame, as Chromium's windows are at least 500 pixels wide. What is found there stands in
# attributes of the outer page.
FRAME = """<!doctype html>
<style>
body {{ margin: 0 }}
iframe {{ border: 0; display: block; width: {width}px; height: {height}px }}
</style>
<iframe src="{page}#theme={theme}"></iframe>
<script>
const frame = document.querySelector("iframe");
const timer = setInterval(() => {{
  const root = frame.contentDocument?.documentElement;
  if (root?.dataset.overflow === undefined) return;  // not there yet, or not drawn
  clearInterval(timer);
  const places = Array.from(root.querySelectorAll(".canvas"), one => one.getBoundingClientRect());
  Object.assign(document.documentElement.dataset, root.dataset, {{
    width: frame.contentWindow.innerWidth,
    svgs: root.querySelectorAll(".canvas svg").length,
    canvases: JSON.stringify(places.map(one => [one.left, one.top, one.right, one.bottom].map(Math.round))),
    narrowest: Math.min(...Array.from(root.querySelectorAll("td > div"), cell => cell.clientWidth)),
    cut: Array.from(root.querySelectorAll(".legend")).filter(box => box.scrollWidth > box.clientWidth).length,
  }});
}}, 20);
</script>
"""


def look(browser: str, page: Path, *options: str) -> str:
    """The document as it is once it is drawn. What the page complains of, its policy's refusals too, fails
    the test.
    """
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        "--virtual-time-budget=10000",
        "--enable-logging=stderr",
        "--dump-dom",
        *options,
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not complaints and done.returncode == 0, complaints or done.stderr
    return done.stdout


def look_in_frame(
    browser: str, page: Path, directory: Path, *, theme: str, width: int, height: int
) -> tuple[dict[str, str], np.ndarray]:
    """The frame's own report, and its pixels [H W 3]."""
    frame = directory / "frame.html"
    image = directory / "page.png"
    frame.write_text(FRAME.format(page=page.as_uri(), theme=theme, width=width, height=height))
    size = f"--window-size={max(width, 500)},{height}"
    # the frame is another file
    dom = look(browser, frame, size, "--allow-file-access-from-files", f"--screenshot={image}")
    root = re.search(r"<html[^>]*>", dom)
    assert root is not None, dom
    return dict(re.findall(r'data-(\w+)="([^"]*)"', root[0])), pixels(image)[:, :width]


def holds(chart: np.ndarray, colour: str) -> bool:
    """Whether some pixels [H W 3] have this colour, but for rounding."""
    return np.sum(np.abs(chart - np.array(list(bytes.fromhex(colour[1:])))).max(axis=-1) <= 3) >= 10


def pixels(image: Path) -> np.ndarray:
    """[H W 3] of a PNG as Chromium writes it: eight bits each of red, green and blue, not interlaced."""
    content = image.read_bytes()
    place = 8
    packed = b""
    while place < len(content):
        length = int.from_bytes(content[place : place + 4], "big")
        kind = content[place + 4 : place + 8]
        packed += content[place + 8 : place + 8 + length] if kind == b"IDAT" else b""
        place += 12 + length
    width = int.from_bytes(content[16:20], "big")
    height = int.from_bytes(content[20:24], "big")
    assert content[24:29] == bytes([8, 2, 0, 0, 0])
    rows = np.frombuffer(zlib.decompress(packed), np.uint8).reshape(height, 1 + 3 * width)
    actual = np.zeros((height + 1, 3 * width), np.uint8)  # the row above the first is black
    for index, row in enumerate(rows):
        actual[index + 1] = unfiltered(row[0], row[1:], actual[index])
    return actual[1:].reshape(height, width, 3)


def unfiltered(kind: int, row: np.ndarray, above: np.ndarray) -> np.ndarray:
    """A row of a PNG, of which the differences to a guess are stored: nothing, the left pixel, that above,
    their mean, or Paeth's guess.
    """
    if kind == 0:
        return row
    if kind == 1:
        return np.cumsum(row.reshape(-1, 3), axis=0, dtype=np.uint8).reshape(-1)
    if kind == 2:
        return row + above
    values = bytearray(3) + row.tobytes()
    above_values = bytes(3) + above.tobytes()
    for i in range(3, len(values)):
        left = values[i - 3]
        up = above_values[i]
        corner = above_values[i - 3]
        if kind == 3:
            guess = (left + up) // 2
        else:
            from_left = abs(up - corner)
            from_up = abs(left - corner)
            from_corner = abs(left + up - 2 * corner)
            guess = (
                left
                if from_left <= from_up and from_left <= from_corner
                else up
                if from_up <= from_corner
                else corner
            )
        values[i] = (values[i] + guess) & 255
    return np.frombuffer(values, np.uint8)[3:]
