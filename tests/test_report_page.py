"""The report's page in a real browser: nothing in the console, nothing wider than the window, sorting works."""

import html
import json
import os
import re
import shutil
import subprocess
from dataclasses import replace

import pytest

from report_sample import sample_layers, sample_report
from slimgraph.report.page import render_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

FLAGS = [
    "--headless",
    "--no-sandbox",  # the sandbox refuses to start as root, as CI often is
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
    "--enable-logging=stderr",  # where console messages go
    "--v=0",
    "--window-size=1400,900",
    "--dump-dom",
]

PROBE = """
<script>
addEventListener("load", () => {
  const rows = () => [...document.querySelectorAll(".sortable tbody tr")];
  const column = (index) => rows().map((row) => row.cells[index].textContent);
  const click = (index) => document.querySelectorAll(".sortable thead button")[index].click();
  const seen = {
    innerWidth, scrollWidth: document.documentElement.scrollWidth,
    headline: document.getElementById("headline").innerText,
    pictures: [...document.querySelectorAll("svg")].map((svg) => svg.getBoundingClientRect().width),
    dark: matchMedia("(prefers-color-scheme: dark)").matches,
    ink: getComputedStyle(document.querySelector("svg text")).fill,
    snr: column(1),
  };
  click(10); seen.smallestFirst = column(10);
  click(10); seen.largestFirst = column(10);
  click(0); seen.byName = column(0);
  click(1); click(1); seen.snrFalling = column(1);
  seen.sorted = document.querySelectorAll("[aria-sort]").length;
  const result = parent.document.createElement("pre");
  result.id = "probe";
  result.textContent = JSON.stringify(seen);
  parent.document.body.append(result);
});
</script>
"""


def browse(path, profile, *flags):
    """DOM text and console messages after the page at `path` was loaded."""
    done = subprocess.run(
        [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *flags, path.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "HOME": str(profile)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@pytest.fixture(scope="module")
def page():
    names = ["x" * 200, "<b>bold</b>", "encoder/layer_0/attention/self/query/MatMul:0"]
    long_names = tuple(replace(row, name=name) for row, name in zip(sample_layers(3), names, strict=True))
    return render_page(sample_report(title="y" * 300, layers=(*sample_layers(), *long_names)))


def look(page, tmp_path, *, width, dark, probe=PROBE):
    """What a script finds in the page when it is `width` pixels wide.

    A headless window is never narrower than 500 pixels, a frame may be. The page's policy, which would forbid the
    script, is relaxed in this copy.
    """
    relaxed, replaced = re.subn(r"script-src 'sha256-[^']*'", "script-src 'unsafe-inline'", page)
    assert replaced == 1
    content = html.escape(relaxed.replace("</body>", probe + "</body>"))
    frame = f'<iframe style="width: {width}px; height: 900px; border: 0" srcdoc="{content}"></iframe>'
    file = tmp_path / "frame.html"
    file.write_text(f'<!DOCTYPE html><meta charset="utf-8"><body>{frame}</body>', encoding="utf-8")
    dom, console = browse(file, tmp_path / "profile", f"--blink-settings=preferredColorScheme={0 if dark else 1}")
    assert console == []
    found = re.search(r'<pre id="probe">(.*?)</pre>', dom, flags=re.DOTALL)
    assert found, dom[-2000:]
    return json.loads(html.unescape(found[1]))


def test_the_page_as_written_loads_under_its_own_policy_without_a_console_message(page, tmp_path):
    file = tmp_path / "report.html"
    file.write_text(page, encoding="utf-8")
    dom, console = browse(file, tmp_path / "profile")
    assert console == []
    assert "top-1 87.4 % (−0.1 points from 87.5 %), 3.9× smaller, 1.7× faster on one thread" in dom


def test_errors_in_a_page_are_seen_by_this_way_of_looking(page, tmp_path):
    file = tmp_path / "broken.html"
    file.write_text(page.replace("</body>", '<script>thrown()</script><img src="http://localhost:9/x.png"></body>'))
    _, console = browse(file, tmp_path / "profile")
    assert len([line for line in console if "Content Security Policy" in line]) == 2


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_nothing_is_wider_than_the_window_and_columns_sort(page, tmp_path, width, dark):
    seen = look(page, tmp_path, width=width, dark=dark)
    assert seen["innerWidth"] == width
    assert seen["scrollWidth"] <= width
    assert seen["headline"].startswith("int8 model: top-1 87.4 %")
    assert len(seen["pictures"]) == 5
    assert all(200 < drawn < width for drawn in seen["pictures"])
    assert seen["dark"] is dark
    assert seen["ink"] == ("rgb(154, 163, 173)" if dark else "rgb(93, 101, 112)")  # --muted of either scheme

    numbers = [float(text) for text in seen["snr"] if text not in ("–", "equal")]
    assert numbers == sorted(numbers)
    assert seen["snr"][-4:] == ["equal", "equal", "–", "–"]
    assert seen["snrFalling"][:2] == ["equal", "equal"]
    assert seen["snrFalling"][-2:] == ["–", "–"]  # not measured is last, whatever the order
    sizes = [int(text.replace(",", "")) for text in seen["smallestFirst"]]
    assert sizes == sorted(sizes)
    assert seen["largestFirst"] == sorted(seen["largestFirst"], key=lambda text: -int(text.replace(",", "")))
    assert seen["byName"].index("features.2.depthwise") < seen["byName"].index("features.10.depthwise")
    assert seen["sorted"] == 1
