"""Pictures of the tables under benchmarks/results, beside them.

    python benchmarks/plots.py [benchmarks/results/paper_h200.csv ...]

Each table is drawn by what its name begins with, paper, kernels, model or analysis_time; the tables of the layers on
one device share a picture. Needs the extra ``bench``.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import matplotlib
from harness import RESULTS, read_csv

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

Table = list[dict[str, str]]
COLOURS = {
    "lacompile": "#0b6e4f", "fla chunk": "#d9822b", "fla fused_chunk": "#efb366", "official": "#8f6bb3",
    "softmax (SDPA)": "#7a8594", "softmax": "#7a8594", "MiniMax": "#0b6e4f", "TransNormer": "#2b7bba",
    "lightning": "#0b6e4f", "inductor": "#d9822b", "eager": "#7a8594",
}  # fmt: skip
STYLE = {
    "font.size": 10, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#e6e8eb",
    "axes.edgecolor": "#9aa3ad", "xtick.color": "#4a525a", "ytick.color": "#4a525a", "axes.titleweight": "bold",
    "axes.titlelocation": "left", "axes.axisbelow": True, "figure.dpi": 150, "savefig.bbox": "tight",
}  # fmt: skip


def tokens(n: float, _: int | None = None) -> str:
    """1024 as 1K, 2^20 as 1M."""
    return f"{n / 2**20:g}M" if n >= 2**20 else f"{n / 2**10:g}K"


def plain(x: float, _: int | None = None) -> str:
    return f"{x:,.0f}" if x >= 10 else f"{x:g}"


def logarithmic(ax: Axes) -> None:
    """The y axis, with 2 and 5 named between the powers of ten."""
    ax.set_yscale("log")
    ax.yaxis.set_major_formatter(FuncFormatter(plain))
    ax.yaxis.set_minor_formatter(FuncFormatter(lambda v, _: plain(v) if f"{v:e}"[0] in "25" else ""))


def lengths_axis(ax: Axes, lengths: Sequence[int]) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks(lengths, [tokens(n) for n in lengths])
    ax.xaxis.minorticks_off()
    ax.set_xlabel("tokens in the sequence")
    ax.grid(axis="x", visible=False)


def name_ends(ax: Axes, ends: list[tuple[float, float, str, str]]) -> None:
    """Names lines at their right ends, (x, y, name, colour), pushed apart where they would touch (y is logarithmic)."""
    lowest = 0.0
    for x, y, name, colour in sorted(ends, key=lambda e: e[1]):
        at = max(y, lowest)
        ax.annotate(
            name,
            (x, at),
            xytext=(7, 0),
            textcoords="offset points",
            color=colour,
            va="center",
            fontsize=9,
            bbox={"fc": "white", "ec": "none", "pad": 0.5, "alpha": 0.85},
        )
        bottom, top = ax.get_ylim()
        lowest = at * (top / bottom) ** 0.055


def footer(figure: Figure, about: dict[str, str], what: str) -> None:
    versions = ", ".join(f"{k} {about[k]}" for k in ("torch", "triton", "fla-core") if k in about)
    figure.text(
        0.01, -0.02, f"{what}\n{about.get('gpu', about.get('device'))}, {versions}, {about['date']}",
        fontsize=7.5, color="#6b747d", va="top",
    )  # fmt: skip


def paper(about: dict[str, str], table: Table) -> Figure:
    """Time and memory for a token against length: flat for a linear attention, a slope for softmax."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.3), gridspec_kw={"wspace": 0.42})
    panels = [("ns_per_token", "Time for a token (ns)", "forward + backward"),
              ("bytes_per_token", "Memory for a token beyond the inputs (KB)", "forward + backward")]  # fmt: skip
    names = list(dict.fromkeys(r["implementation"] for r in table))
    lengths = sorted({int(r["N"]) for r in table})
    for ax, (column, title, full) in zip(axes, panels, strict=True):
        ends = []
        unit = 1024 if column.startswith("bytes") else 1
        for name in names:
            for which in (full, "forward"):
                rows = [r for r in table if r["implementation"] == name and r["pass"] == which and r.get("p50_ms")]
                if not rows:
                    continue
                x, y = [int(r["N"]) for r in rows], [float(r[column]) / unit for r in rows]
                line = {"color": COLOURS[name], "lw": 2.4 if name == "lacompile" else 1.6}
                light = {"ls": (0, (2, 2)), "alpha": 0.75} if which == "forward" else {"marker": "o", "ms": 3.5}
                ax.plot(x, y, **line, **light)
                if which == full:
                    ends.append((x[-1], y[-1], name, COLOURS[name]))
        logarithmic(ax)
        ax.set_title(title)
        lengths_axis(ax, lengths[::2] if len(lengths) > 6 else lengths)
        name_ends(ax, ends)
    footer(
        figure, about,
        f"Solid: forward and backward; dashed: forward. {about['heads']} heads of {about['head_dim']}, bf16.",
    )  # fmt: skip
    return figure


def kernels(about: dict[str, str], table: Table) -> Figure:
    """The share of the memory floor that each implementation reaches, problem by problem."""
    rows = [r for r in table if r["pass"] != "decode" and not r["implementation"].startswith("softmax")]
    cases = list(dict.fromkeys((r["B"], r["H"], r["N"], r["D"], r["decay"]) for r in rows))
    names = list(dict.fromkeys(r["implementation"] for r in rows))
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.75 * len(cases) + 1.2), sharey=True, gridspec_kw={"wspace": 0.06})
    height = 0.82 / len(names)
    for ax, which in zip(axes, ("forward", "forward + backward"), strict=True):
        for n, name in enumerate(names):
            for at, case in enumerate(cases):
                found = [
                    r for r in rows if r["implementation"] == name and r["pass"] == which
                    and (r["B"], r["H"], r["N"], r["D"], r["decay"]) == case
                ]  # fmt: skip
                y = at + (n - (len(names) - 1) / 2) * height
                if not found or not found[0].get("share"):
                    why = "not supported" if found else "not measured"
                    ax.text(0.6, y, why, fontsize=6, color="#9aa3ad", va="center")
                    continue
                share = 100 * float(found[0]["share"])
                label = name if at == 0 else None
                ax.barh(y, share, height * 0.9, color=COLOURS[name], label=label)
                ax.text(share + 0.8, y, f"{share:.0f} %", fontsize=6.5, va="center", color="#4a525a")
        ax.set_title(which)
        ax.set_xlim(0, 105)
        ax.set_xlabel("share of the memory floor (%)")
        ax.grid(axis="y", visible=False)
        ax.tick_params(axis="y", length=0)
    labels = [f"{b} x {h} x {tokens(int(n))} x {d}" + ("\ndecay per token" if g == "token" else "")
              for b, h, n, d, g in cases]  # fmt: skip
    axes[0].set_yticks(range(len(cases)), labels)
    axes[0].set_ylabel("batch x heads x tokens x head size")
    axes[0].invert_yaxis()
    axes[1].legend(loc="lower right", frameon=False, fontsize=8.5)
    footer(
        figure, about,
        "The floor: each tensor read or written once at the speed of a large copy in the same run, "
        f"here {about['copy_bandwidth']}. bf16.",
    )  # fmt: skip
    return figure


def model(about: dict[str, str], table: Table) -> Figure:
    """Tokens per second of a training step against length, at constant tokens per step."""
    figure, ax = plt.subplots(figsize=(8.5, 4.6))
    ends = []
    for style, backend in dict.fromkeys((r["style"], r["backend"]) for r in table):
        rows = sorted((r for r in table if (r["style"], r["backend"]) == (style, backend)), key=lambda r: int(r["N"]))
        timed = [r for r in rows if r.get("tokens_per_s")]
        if not timed:
            continue
        x, y = [int(r["N"]) for r in timed], [float(r["tokens_per_s"]) / 1e6 for r in timed]
        ours = backend == "lightning"
        ax.plot(
            x, y, color=COLOURS[style], lw=2.4 if ours else 1.5, marker="o", ms=4, ls="-" if ours else (0, (4, 2))
        )  # fmt: skip
        name = f"{style}, {'lightning' if ours else 'Inductor'}"
        lost = [r for r in rows if r.get("failed") == "out of memory" and int(r["N"]) > x[-1]]
        ends.append((x[-1], y[-1], name + (f" (out of memory at {tokens(int(lost[0]['N']))})" if lost else ""),
                     COLOURS[style]))  # fmt: skip
    logarithmic(ax)
    ax.set_title("Training: million tokens per second")
    lengths_axis(ax, sorted({int(r["N"]) for r in table}))
    name_ends(ax, ends)
    footer(
        figure, about,
        f"{about['layers']} layers of {about['width']} features, {about['heads']} heads, "
        f"{tokens(int(about['tokens']))} tokens a step at every length, bf16; forward, backward and AdamW.",
    )  # fmt: skip
    return figure


LAYERS = {"minimax": "MiniMax", "mamba2": "Mamba-2, plain path", "retention": "Retention, a masked square"}
LAYER = "_layer_"


def layers(tables: dict[str, tuple[dict[str, str], Table]]) -> Figure:
    """Milliseconds of three public layers against length: eager, Inductor alone, lightning."""
    figure, axes = plt.subplots(1, len(tables), figsize=(12.5, 4.2), sharey=True, gridspec_kw={"wspace": 0.3})
    for ax, (name, (_, table)) in zip(axes, tables.items(), strict=True):
        logarithmic(ax)
        ends = []
        for backend in ("eager", "inductor", "lightning"):
            for column in ("train_ms", "forward_ms"):
                rows = sorted((int(r["N"]), float(r[column])) for r in table if r["backend"] == backend and r[column])
                if not rows:
                    continue
                x, y = zip(*rows, strict=True)
                step = column == "train_ms"
                line = {"marker": "o", "ms": 4} if step else {"ls": (0, (2, 2)), "alpha": 0.75, "marker": "o", "ms": 2}
                ax.plot(x, y, color=COLOURS[backend], lw=2.4 if backend == "lightning" else 1.6, **line)
                if step:
                    ends.append((x[-1], y[-1], backend, COLOURS[backend]))
        ax.set_title(LAYERS[name])
        lengths_axis(ax, sorted({int(r["N"]) for r in table}))
        ax.set_ylim(0.3, 300)
        name_ends(ax, ends)
    axes[0].set_ylabel("milliseconds")
    abouts = [about for about, _ in tables.values()]
    dates = sorted({about["date"] for about in abouts})
    footer(
        figure, {**abouts[0], "date": " to ".join(dict.fromkeys((dates[0], dates[-1])))},
        "Solid: a training step; dashed: forward. One sequence, bf16. A line ends where the layer does not fit into "
        "the GPU, or where Inductor did not compile it in time;\non the Mamba-2 mixer Inductor alone fails.",
    )  # fmt: skip
    return figure


STAGES = {
    "capture": "#7a8594", "lift": "#0b6e4f", "match": "#2b7bba", "validate": "#8f6bb3", "rewrite": "#d9822b",
    "rest": "#c4cad0",
}  # fmt: skip


def analysis_time(about: dict[str, str], table: Table) -> Figure:
    """Milliseconds of the analysis for a node of the graph, against its nodes: stages piled up, the target a line."""
    families = list(dict.fromkeys(r["family"] for r in table))
    columns = 3
    rows = -(-len(families) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(11, 2.9 * rows), sharex=True, sharey=True, squeeze=False,
        gridspec_kw={"wspace": 0.08, "hspace": 0.32},
    )  # fmt: skip
    target = float(about["target_ms"])
    for ax, family in zip(axes.flat, families, strict=False):
        timed = sorted((r for r in table if r["family"] == family and r.get("nodes")), key=lambda r: int(r["nodes"]))
        nodes = [int(r["nodes"]) for r in timed]
        piles = [[1e3 * max(0.0, float(r[f"{s}_s"])) / int(r["nodes"]) for r in timed] for s in STAGES]
        ax.stackplot(nodes, *piles, colors=list(STAGES.values()), labels=list(STAGES), lw=0)
        ax.plot(nodes, [float(r["ms_per_node"]) for r in timed], color="#1f2933", lw=1.2, marker="o", ms=3)
        ax.axhline(target, color="#b3261e", lw=1, ls=(0, (4, 2)))
        ax.set_title(family)
        ax.set_xscale("log")
        ax.set_ylim(0, 1.25 * max(target, *(float(r["ms_per_node"]) for r in table if r.get("ms_per_node"))))
    ticks = [500, 2000, 8000, 40000]
    for ax in axes[-1]:
        ax.set_xticks(ticks, [plain(n) for n in ticks])
        ax.xaxis.minorticks_off()
        ax.set_xlabel("nodes of the graph")
    for row in axes:
        row[0].set_ylabel("milliseconds for a node")
    for ax in axes.flat[len(families) :]:
        ax.set_visible(False)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="center left", bbox_to_anchor=(0.91, 0.5), frameon=False)
    footer(
        figure, about,
        f"Seconds {about['seconds']}, Dynamo's own not counted; dashed: the target of {target:g} ms, capture included.",
    )  # fmt: skip
    return figure


DRAWN: dict[str, Callable[[dict[str, str], Table], Figure]] = {
    "paper": paper, "kernels": kernels, "model": model, "analysis_time": analysis_time,
}  # fmt: skip


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", type=Path, nargs="*", help="CSV files; all that can be drawn unless given")
    args = parser.parse_args()
    found = args.tables or sorted(RESULTS.glob("*.csv"))
    with matplotlib.rc_context(STYLE):
        figures = {
            p: draw(*read_csv(p)) for p in found for kind, draw in DRAWN.items() if p.name.startswith(f"{kind}_")
        }
        for device in {p.stem.split(LAYER)[1]: p.parent for p in found if LAYER in p.stem}.items():
            at = {name: device[1] / f"{name}{LAYER}{device[0]}.csv" for name in LAYERS}
            if not all(path.exists() for path in at.values()):
                continue
            tables = {name: read_csv(path) for name, path in at.items()}
            figures[device[1] / f"layers_{device[0]}.csv"] = layers(tables)
        for path, figure in figures.items():
            figure.savefig(path.with_suffix(".png"))
            plt.close(figure)
            print(path.with_suffix(".png"))


if __name__ == "__main__":
    main()
