"""One HTML page that holds everything, pictures too, so that it can be mailed or put anywhere."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from pathlib import Path

from .draw import X, Y, draw, draw_bits, draw_shares
from .runs import KINDS, Run, Summary, bits, duration

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Runs with compressed communication</title>
<style>
  body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 88rem; padding: 0 1rem; color: #222; }
  h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
  .table { overflow-x: auto; }
  table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
  th, td { padding: .3rem .5rem; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
  th { font-weight: 600; white-space: normal; vertical-align: bottom; }
  th:first-child, td:first-child { text-align: left; }
  tr.baseline td { background: #f4f6f9; }
  .pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(22rem, 1fr)); gap: 1rem; }
  figure { margin: 0; } img { width: 100%; height: auto; }
  pre { background: #f6f6f6; padding: .7rem; overflow-x: auto; } small { color: #666; }
</style>
</head>
<body>
<h1>Runs with compressed communication</h1>
<p>{{ verdict }}</p>
<div class="table"><table>
<thead><tr>{% for heading in headings %}<th>{{ heading }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in rows %}<tr{% if row.is_baseline %} class="baseline"{% endif %}>
{% for cell in row.cells %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</tbody></table></div>
<p><small>Bytes are those that one rank handed to MPI and Horovod. A target is reached at the end of the first epoch
that is as accurate. “Less than fp32” compares with what plain Horovod would have sent for the same steps.</small></p>
<h2>Accuracy and loss</h2>
<div class="pictures">
{% for picture in curves %}<figure><img src="{{ picture.data }}" alt="{{ picture.text }}"></figure>
{% endfor %}</div>
<h2>Bits and time</h2>
<div class="pictures">
{% for picture in bars %}<figure><img src="{{ picture.data }}" alt="{{ picture.text }}"></figure>
{% endfor %}</div>
<h2>Settings</h2>
{% for name, run in runs.items() %}<details><summary>{{ name }} <small>{{ run.directory }}</small></summary>
<pre>{{ run.settings or "not known: there is no config.yaml" }}</pre></details>
{% endfor %}
</body>
</html>
"""


def headings(target: float, baseline: str | None) -> list[str]:
    """Of the table; the baseline's savings only where there is one."""
    against = [] if baseline is None else ["fewer bits than baseline", "times as fast"]
    return [
        *("run", "ranks", "epochs", "best accuracy", "last accuracy", "MB sent per rank", "less than fp32"),
        *(f"epochs to {target:.1%}", f"bits to {target:.1%}", f"time to {target:.1%}", *against),
        *("images/s", " / ".join(KINDS)),
    ]


def cells(summary: Summary, has_baseline: bool) -> list[str]:
    """A row of the table."""
    times = [_times(summary.saving), _times(summary.faster)] if has_baseline else []
    return [
        summary.label,
        "–" if summary.ranks is None else str(summary.ranks),
        str(summary.epochs),
        f"{summary.best:.2%}",
        f"{summary.last:.2%}",
        f"{summary.megabytes:,.1f}",
        _times(summary.ratio_to_fp32),
        "not reached" if summary.target_epoch is None else str(summary.target_epoch),
        bits(summary.target_bits),
        duration(summary.target_seconds),
        *times,
        "–" if summary.images_per_second is None else f"{summary.images_per_second:,.0f}",
        " / ".join(f"{summary.shares[kind]:.0%}" for kind in KINDS) if summary.shares else "–",
    ]


def verdict(summaries: Sequence[Summary], target: float, baseline: str | None) -> str:
    """The main thing in a sentence or two."""
    there = [s for s in summaries if s.target_bits is not None]
    if not there:
        return f"No run reached an accuracy of {target:.1%}."
    least = min(there, key=lambda s: s.target_bits or 0.0)
    text = f"The fewest bits to {target:.1%} accuracy: {least.label}, with {bits(least.target_bits)} per rank"
    if baseline is None or least.label == baseline:
        return f"{text}."
    if least.saving is None:
        return f"{text}; the baseline, {baseline}, did not reach it, or sent nothing."
    return f"{text}, {least.saving:,.1f} times fewer than {baseline}."


def write_page(
    runs: Mapping[str, Run], summaries: Sequence[Summary], target: float, baseline: str | None, directory: Path
) -> Path:
    """Draw all pictures and write them, and ``report.html``, into a directory; the page's path.

    Raises:
        OSError: it cannot be written.
    """
    import jinja2  # comes with torch

    directory.mkdir(parents=True, exist_ok=True)
    curves = []
    for y in Y:
        for x in X:
            path = directory / f"{y}-vs-{x}.png"
            draw(runs, x, y, path)
            curves.append(_embedded(path, f"{Y[y]} against {X[x].lower()}"))
    draw_bits(summaries, target, directory / "bits-to-target.png")
    draw_shares(summaries, directory / "time.png")
    bars = [
        _embedded(directory / "bits-to-target.png", "Megabytes sent until the target accuracy"),
        _embedded(directory / "time.png", "Parts of the training time"),
    ]
    rows = [{"cells": cells(s, baseline is not None), "is_baseline": s.label == baseline} for s in summaries]
    template = jinja2.Environment(autoescape=True, trim_blocks=True).from_string(TEMPLATE)
    text = template.render(
        verdict=verdict(summaries, target, baseline),
        headings=headings(target, baseline),
        rows=rows,
        curves=curves,
        bars=bars,
        runs=runs,
    )
    page = directory / "report.html"
    page.write_text(text, encoding="utf-8")
    return page


def _embedded(path: Path, text: str) -> dict[str, str]:
    data = base64.b64encode(path.read_bytes()).decode()
    return {"data": f"data:image/png;base64,{data}", "text": text}


def _times(number: float | None) -> str:
    return "–" if number is None else f"{number:,.1f}×"
