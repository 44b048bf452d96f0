"""What the other benchmarks have measured, as one table and one picture.

    python tests/benchmarks/summary.py outputs/benchmarks/speed.jsonl

Reads the lines that --json FILE of the benchmarks has appended; writes a .md and a .png beside the
file and prints the table.
"""
import argparse
import json
from pathlib import Path

import equality
import scaling
import turns

PEERS = ("reference", "timm", "fastai", "lightning")
COLOURS = {"script": "#0072b2", "bare": "#999999", "reference": "#d55e00", "timm": "#e69f00", "fastai": "#cc79a7",
           "lightning": "#009e73", "spatial": "#56b4e9", "ram": "#0072b2", "disk": "#d55e00", "none": "#999999"}


def read(path):
    """(comparisons of loops, {part: rows} of scaling, comparisons of results) from lines of JSON, the last of each."""
    lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]

    def last(key):
        return {line[key]: line for line in lines if key in line}
    parts = {name: line["rows"] for name, line in last("part").items()}
    return list(last("title").values()), parts, list(last("task").values())


def speed_table(comparisons):
    """Markdown: one row a comparison, every ratio with its range."""
    def ratio(report, over, under):
        for each in report["ratios"]:
            if (each["over"], each["under"]) == (over, under):
                return f"{each['ratio']:.2f} ({each['low']:.2f} to {each['high']:.2f})"
        return ""
    lines = ["| training pass of | n | script | script / bare | " + " | ".join(f"{peer} / script" for peer in PEERS) +
             " | peak memory, script / bare | first step of script, reference |", "|" + "---|" * 10]
    for report in comparisons:
        loops, script = report["loops"], report["loops"]["script"]
        steps = ", ".join(f"{loops[name]['first_step']:.1f} s" for name in ("script", "reference") if name in loops)
        cells = [report["title"], len(script["seconds"]),
                 f"{script['median']:.2f} s, {report['count'] / script['median']:.1f} {report['unit']}/s",
                 ratio(report, "script", "bare"), *(ratio(report, peer, "script") for peer in PEERS),
                 f"{script['peak'] / loops['bare']['peak']:.2f}" if "bare" in loops else "", steps]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def draw(comparisons, parts, path):
    """PNG: seconds of each loop over the script's, and cost against size."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(12, 5), layout="constrained")
    bars, lines = figure.subplots(1, 2, width_ratios=(3, 2))
    labels, place = [], 0
    for report in comparisons:
        loops = [name for name in report["loops"] if name != "spatial"]
        for name in loops:
            relative = report["loops"][name]["median"] / report["loops"]["script"]["median"]
            bars.barh(place, relative, color=COLOURS[name])
            bars.text(relative, place, f" {name} {relative:.2f}", va="center", fontsize=7)
            place += 1
        labels.append((place - (len(loops) + 1) / 2, report["title"].replace(".py: ", ".py\n").split(",")[0]))
        place += 1
    bars.set_yticks([at for at, _ in labels], [text for _, text in labels], fontsize=7)
    bars.invert_yaxis()
    bars.margins(x=0.15)
    bars.set_xlabel("seconds of a training pass, script = 1")
    for part, style in (("images", "o-"), ("clips", "s--")):
        for cache in dict.fromkeys(row["cache"] for row in parts.get(part, ())):
            rows = [row for row in parts[part] if row["cache"] == cache]
            lines.loglog([row["N"] for row in rows], [row["seconds an epoch"] for row in rows], style,
                         color=COLOURS[cache], label=f"{part}, --cache {cache}")
    if lines.lines:
        lines.legend(fontsize=7)
    lines.set_xlabel("N")
    lines.set_ylabel("seconds of an epoch with its validation")
    FigureCanvasAgg(figure).print_png(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="lines of JSON that the benchmarks have appended")
    file = parser.parse_args().file
    comparisons, parts, results = read(file)
    text = ["## Speed\n", speed_table(comparisons)] if comparisons else []
    text += [turns.as_text(report) for report in comparisons]
    for part, rows in parts.items():
        text += [f"\n## Cost: {part}\n", scaling.as_text(rows)]
        text += [f"\n{scaling.straightness(rows)}"] if "N" in rows[0] else []
    text += ["\n## Results with and without the fast ways\n", equality.as_text(results)] if results else []
    file.with_suffix(".md").write_text("\n".join(text) + "\n", encoding="utf-8")
    draw(comparisons, parts, file.with_suffix(".png"))
    print("\n".join(text))
    print(f"\nwritten: {file.with_suffix('.md')}, {file.with_suffix('.png')}")


if __name__ == "__main__":
    main()
