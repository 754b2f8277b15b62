"""Tables and a plot of the cells that speed.py measured."""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

NAMES = {
    "crossencoder": "CrossEncoder, torch",
    "crossencoder-onnx": "CrossEncoder, ONNX backend",
    "padded-onnx": "padded ONNX, sorted by length",
    "ours-fp32": "ours, fp32",
    "ours-int8": "ours, 8-bit",
    "ours-int4": "ours, 4-bit",
    "spark-udf": "predict_batch_udf, padded ONNX",
    "spark-ours": "ours in Spark, fp32",
}
Cell = dict[str, Any]


class Target(NamedTuple):
    """A ratio of two contenders in the workloads whose names begin so."""

    fast: str
    slow: str
    workloads: str
    least: float


TARGETS = (
    Target("ours-fp32", "crossencoder", "12-", 5.0),
    Target("ours-int8", "crossencoder", "12-", 8.0),
    Target("ours-int4", "crossencoder", "12-", 8.0),
    Target("spark-ours", "spark-udf", "spark", 3.0),
    Target("ours-fp32", "padded-onnx", "1", 1.0),
    Target("spark-ours", "ours-fp32", "spark", 0.95),
)
LEAST_SHARE = 0.6
"""Of the fp32 matmul rate, for ours in fp32."""


class Spread(NamedTuple):
    """Median over the turns, the smallest and the largest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        return cls(statistics.median(values), min(values), max(values))

    def text(self, digits: int) -> str:
        return f"**{self.median:,.{digits}f}** ({self.low:,.{digits}f} to {self.high:,.{digits}f})"


def ratio(cell: Cell, fast: str, slow: str) -> Spread | None:
    """How many times as many pairs a second: of the two runs of each turn. None where one is not in the cell."""
    if not {fast, slow} <= cell["contenders"].keys():
        return None
    pairs = zip(cell["contenders"][slow]["seconds"], cell["contenders"][fast]["seconds"], strict=True)
    return Spread.of([seconds_slow / seconds_fast for seconds_slow, seconds_fast in pairs])


def pairs_per_s(cell: Cell, name: str) -> Spread:
    return Spread.of([cell["num_pairs"] / seconds for seconds in cell["contenders"][name]["seconds"]])


def matmul_share(cell: Cell, name: str, precision: str) -> Spread:
    """Share of the machine's matmul rate that the contender's tokens needed, in each turn's own rate."""
    contender = cell["contenders"][name]
    operations = 2.0 * cell["about"]["layer_weights"] * contender["num_tokens"]
    turns = zip(contender["seconds"], cell["matmul"][precision], strict=True)
    return Spread.of([operations / seconds / rate for seconds, rate in turns])


def write_report(cells: Sequence[Cell], output: Path) -> None:
    """Write speed.json, speed.md and speed.png into a folder."""
    output.mkdir(parents=True, exist_ok=True)
    (output / "speed.json").write_text(json.dumps(cells, indent=1) + "\n", encoding="utf-8")
    valid = [cell for cell in cells if not cell["void"]]
    lines = ["# Speed", "", *_header(cells), "", *_void_lines(cells)]
    if valid:
        lines += ["## Ratios", "", *_target_lines(valid), ""]
        for cell in valid:
            lines += [*_cell_lines(cell), ""]
        plot_cells(valid, output / "speed.png")
    (output / "speed.md").write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


def _header(cells: Sequence[Cell]) -> Iterator[str]:
    machine, settings = cells[-1]["machine"], cells[-1]["settings"]
    versions = ", ".join(f"{package} {number}" for package, number in machine["versions"].items())
    yield (
        f"`tests/benchmarks/speed.py`, {machine['date']}, commit {machine['commit']}: {settings['repeats']} turns; "
        "medians, with the smallest and the largest; ratios are of the runs of one turn."
    )
    yield ""
    yield (
        f"{machine['processor']} ({', '.join(machine['instructions'])}), {machine['threads']} threads on as many of "
        f"{machine['cores']} cores, {machine['memory_gib']} GiB; Python {machine['python']}, {versions}."
    )
    yield ""
    loads = ", ".join(f"{cell['machine']['load_average']:.1f}" for cell in cells)
    yield f"Text: {settings['text']}. Load average of the machine before each cell: {loads}."
    if len({cell["settings"]["code"] for cell in cells}) > 1:
        yield ""
        yield "**The cells were measured with different versions of the code.**"


def _void_lines(cells: Sequence[Cell]) -> Iterator[str]:
    for cell in cells:
        if cell["void"]:
            yield f"**Void: {cell['model']}/{cell['workload']}: {cell['void']}**"
            yield ""


def _target_lines(cells: Sequence[Cell]) -> Iterator[str]:
    yield "| what | model | workload | ratio | target |"
    yield "| --- | --- | --- | --- | --- |"
    for target in TARGETS:
        for cell in cells:
            workload = cell["workload"]
            matches = workload.startswith(target.workloads) if target.workloads != "1" else workload == "1"
            found = ratio(cell, target.fast, target.slow) if matches else None
            if found is not None:
                what = f"{NAMES[target.fast]} : {NAMES[target.slow]}"
                yield _target_row(what, cell, found, target.least)
    for cell in cells:
        if "ours-fp32" in cell["contenders"]:
            share = matmul_share(cell, "ours-fp32", "fp32")
            yield _target_row("ours, fp32: share of the fp32 matmul rate", cell, share, LEAST_SHARE)


def _target_row(what: str, cell: Cell, found: Spread, least: float) -> str:
    verdict = "" if found.median >= least else ", missed"
    return f"| {what} | {cell['model']} | {cell['workload']} | {found.text(2)} | {least:g}{verdict} |"


def _cell_lines(cell: Cell) -> Iterator[str]:
    about = cell["about"]
    rates = "; ".join(f"{name} {Spread.of(values).median / 1e9:,.0f}" for name, values in cell["matmul"].items())
    first = next(iter(cell["contenders"]))
    yield f"## {cell['model']}/{cell['workload']}"
    yield ""
    weights = f"{about['layer_weights'] / 1e6:,.1f} M of them in the layers' matrices"
    parameters = f"{about['num_parameters'] / 1e6:,.0f} M parameters"
    yield f"{cell['num_pairs']} pairs; {parameters}, {weights}. Matmul, 10^9 operations a second: {rates}."
    yield ""
    yield (
        f"| contender | : {NAMES[first]} | pairs/s | tokens a pair | share of the fp32 matmul rate | of int8 | "
        "largest score difference | mean | correlation |"
    )
    yield "| --- |" + " --- |" * 8
    for name, contender in cell["contenders"].items():
        against = ratio(cell, name, first)
        assert against is not None
        columns = (
            NAMES[name],
            against.text(2),
            pairs_per_s(cell, name).text(1),
            f"{contender['num_tokens'] / cell['num_pairs']:.1f}",
            f"{matmul_share(cell, name, 'fp32').median:.2f}",
            f"{matmul_share(cell, name, 'int8').median:.2f}" if name.endswith(("-int8", "-int4")) else "",
            f"{contender['largest_difference']:.1e}",
            f"{contender['mean_difference']:.1e}",
            f"{contender['correlation']:.4f}",
        )
        yield f"| {' | '.join(columns)} |"


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """A table of rows with the same columns."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(map(str, row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot_cells(cells: Sequence[Cell], path: Path) -> None:
    """Pairs a second of each contender, one panel a cell; bars end at the median, lines span all turns."""
    from matplotlib.figure import Figure

    heights = [3 + len(cell["contenders"]) for cell in cells]
    figure = Figure(figsize=(7, 0.5 + 0.28 * sum(heights)), layout="constrained")
    panels = figure.subplots(len(cells), 1, squeeze=False, height_ratios=heights)[:, 0]
    for panel, cell in zip(panels, cells, strict=True):
        names = list(cell["contenders"])
        spreads = [pairs_per_s(cell, name) for name in names]
        errors = [
            [spread.median - spread.low for spread in spreads],
            [spread.high - spread.median for spread in spreads],
        ]
        colours = ["tab:blue" if name.startswith(("ours", "spark-ours")) else "tab:gray" for name in names]
        bars = panel.barh(
            [NAMES[name] for name in names], [spread.median for spread in spreads], xerr=errors, color=colours
        )
        panel.bar_label(bars, [_times(ratio(cell, name, names[0])) for name in names], padding=4, fontsize=8)
        panel.margins(x=0.12)
        panel.invert_yaxis()
        panel.set_title(f"{cell['model']}/{cell['workload']}", fontsize=9)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("pairs a second", fontsize=8)
    figure.savefig(path, dpi=120)


def _times(found: Spread | None) -> str:
    return "" if found is None else f"{found.median:.2f}x"
