"""Draws the results in a folder as PNG files beside them: ``python -m bench.plots [FOLDER]``. Needs matplotlib."""

import argparse
import json
from pathlib import Path

from . import timing

# By the beginning of a variant's name: a variant looks the same in every chart.
STYLES = {
    "triton": ("tab:blue", "-"),
    "cuda": ("tab:green", "-"),
    "eager": ("tab:cyan", "-"),
    "plain": ("black", "--"),
    "hf-eager": ("tab:red", ":"),
    "flex": ("tab:orange", "-."),
    "disentangled-flash": ("tab:purple", "-."),
    "flashdeberta": ("tab:brown", "-."),
}
MARKERS = {"-mask": "x", "-packed": "s"}  # of a backend's several lines, by the end of the name
CHARTS = {"attention": ("TFLOP/s", "TFLOP/s of plain attention's products"), "layer": ("ms", "milliseconds")}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.plots", description=__doc__.split(":")[0])
    parser.add_argument("folder", type=Path, nargs="?", help="of the results; this machine's GPU's by default")
    folder = parser.parse_args(arguments).folder or timing.results_folder()
    try:
        import matplotlib
    except ImportError:
        print("no charts: matplotlib is not installed")
        return
    matplotlib.use("agg")
    for path in sorted(folder.glob("*.json")):
        # attention-dropout, attention-padding and other dtypes are drawn like attention
        found = [chart for name, chart in CHARTS.items() if path.stem.startswith(name)]
        record = json.loads(path.read_text())
        if found and all(key in record for key in ("rows", "provenance")):
            draw(record, *found[0], path.with_suffix(".png"))
            print(f"wrote {path.with_suffix('.png')}")


def draw(record: dict, value: str, label: str, path: Path) -> None:
    """Draws a panel for each pass over the length, with only the best of the plain variants at each length."""
    from matplotlib import pyplot

    rows = [row for row in record["rows"] if value in row]
    passes = list(dict.fromkeys(row["pass"] for row in rows))
    if not passes:
        return
    figure, panels = pyplot.subplots(1, len(passes), figsize=(5 * len(passes), 4), squeeze=False)
    for panel, one in zip(panels[0], passes):
        for name, points in _lines([row for row in rows if row["pass"] == one], value).items():
            colour, dashes = _style(name)
            marker = next((mark for end, mark in MARKERS.items() if name.endswith(end)), "o")
            panel.plot(*zip(*sorted(points.items())), dashes, color=colour, marker=marker, markersize=4, label=name)
        panel.set(title=one, xlabel="length", ylabel=label, xscale="log", yscale="log" if value == "ms" else "linear")
        lengths = sorted({row["length"] for row in rows})
        panel.set_xticks(lengths, [str(n) for n in lengths], rotation=45)
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0][0].legend(fontsize=7)
    origin = record["provenance"]
    parts = (origin.get("gpu") or origin.get("cpu"), origin.get("commit"), origin.get("date"))
    figure.suptitle(", ".join(str(part)[:60] for part in parts if part), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _lines(rows: list[dict], value: str) -> dict[str, dict[int, float]]:
    better = min if value == "ms" else max
    lines: dict[str, dict[int, float]] = {}
    for row in rows:
        name = "plain, the best" if row["variant"].startswith("plain") else row["variant"]
        points = lines.setdefault(name, {})
        points[row["length"]] = better(points.get(row["length"], row[value]), row[value])
    return lines


def _style(name: str) -> tuple[str, str]:
    own = name.removeprefix("patched-")
    return next((style for start, style in STYLES.items() if own.startswith(start)), ("tab:gray", "-"))


if __name__ == "__main__":
    main()
