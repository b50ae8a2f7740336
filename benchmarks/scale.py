"""Compiles the sizes of configs/scale.py for 16 to 1,024 TPUs that are not there; a table, a plot.

    python benchmarks/scale.py --workdir=runs/scale [--only=8b,v6e] [--minutes=30]

Every point is `python -m tokjax.aot` in a process of its own, with its result as JSON and its
output in the workdir: finished points are kept, so the same command goes on after an interruption,
and failures are kept with their reason (`--retry` compiles them again). At the end stand `scale.md`
and `scale.png`. Needs no TPU: `pip install -e '.[tpu]'` brings the compiler. A point takes two to
five minutes of a core, whatever the model's depth.

Memory, operations and collectives are the compiler's. Seconds, MFU and cost follow from them and
the chips' data sheets: nothing was run. Of each pair the better number holds if computing, memory
and collectives overlap, the worse one if they follow each other.
"""

import argparse
import importlib.util
import json
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
CONFIG = ROOT / "configs" / "scale.py"
GIB = 2**30


@dataclass(frozen=True)
class Point:
    """A size on a topology.

    Attributes:
        size: a key of configs/scale.py.
        topology: of one slice.
        slices: how many.
        rows: on a chip; None takes the size's.
    """

    size: str
    topology: str
    slices: int = 1
    rows: int | None = None

    @property
    def chips(self) -> int:
        """How many chips there are."""
        sides = self.topology.partition(":")[2].split("x")
        product = self.slices
        for side in sides:
            product *= int(side)
        return product

    @property
    def name(self) -> str:
        """The name of its files."""
        rows = "" if self.rows is None else f"-rows{self.rows}"
        return f"{self.size}-{self.topology.replace(':', '-')}-x{self.slices}{rows}"

    @property
    def arguments(self) -> str:
        """The arguments of its configuration."""
        found = f"size={self.size},chips={self.chips},slices={self.slices}"
        return found if self.rows is None else f"{found},rows={self.rows}"

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        spec = importlib.util.spec_from_file_location("scale_config", CONFIG)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        config = module.get_config(self.size, self.chips, self.slices, rows=self.rows)
        return config.data.batch_size * config.data.seq_len


# Those that say most come first.
GRID = (
    Point("8b", "v6e:16x16"),
    Point("70b", "v6e:16x16"),
    Point("135m", "v5e:4x4"),
    Point("1b", "v5e:4x4"),
    Point("8b", "v6e:16x16", slices=4),
    Point("70b", "v5p:8x8x16"),
    Point("1b", "v5e:16x16"),
    Point("8b", "v6e:8x8"),
    Point("135m", "v5e:8x8"),
    Point("70b", "v6e:16x16", slices=4),
    Point("1b", "v5e:8x8"),
    Point("8b", "v5p:8x8x16"),
    Point("70b", "v5p:4x8x8"),
    Point("8b", "v5p:4x4x4"),
    Point("8b", "v5e:16x16"),
    Point("135m", "v5e:16x16"),
    Point("1b", "v5e:16x16", slices=4),
    Point("8b", "v6e:4x4"),
)


def compile_point(point: Point, workdir: Path) -> dict[str, Any]:
    """Returns what `tokjax.aot` found at a point, or why it found nothing, and writes it."""
    out, log = workdir / f"{point.name}.aot.json", workdir / f"{point.name}.log"
    out.unlink(missing_ok=True)
    command = [sys.executable, "-m", "tokjax.aot", f"--config={CONFIG}:{point.arguments}"]
    command += [f"--topology={point.topology}", f"--slices={point.slices}", f"--json={out}"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with log.open("w") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT).returncode
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    found: dict[str, Any] = {
        "size": point.size,
        "topology": point.topology,
        "slices": point.slices,
        "chips": point.chips,
        "tokens": point.tokens,
        "exit_code": code,
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime),
    }
    if out.exists():
        found |= json.loads(out.read_text())[0]
        out.unlink()
    else:
        found["reason"] = reason(log.read_text(), code)
    result = workdir / f"{point.name}.json"
    partial = result.with_suffix(".partial")
    partial.write_text(json.dumps(found, indent=1) + "\n")
    partial.replace(result)
    return found


def reason(log: str, code: int) -> str:
    """Returns what a process that ended without a result said last."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    said = [line for line in lines if "rror" in line or "does not fit" in line]
    last = (said or lines or ["it said nothing"])[-1]
    return f"exit code {code}: {last[:300]}"


def cost(found: dict[str, Any], seconds: float) -> float:
    """Returns the chip-hours that a billion tokens take at so many seconds a step."""
    return seconds * found["chips"] / found["tokens"] * 1e9 / 3600


def table(points: Sequence[dict[str, Any]]) -> str:
    """Returns a table in Markdown: what the compiler counted, and the roofline's figures."""
    head = (
        "| size | chips | topology | tokens a step | GiB of a chip | sent, GiB a chip and step "
        "| ms: computing, memory, collectives | MFU | chip-hours a billion tokens |"
    )
    lines = [head, "|" + " --- |" * 9]
    order = ["135m", "1b", "8b", "70b"]
    key = lambda each: (order.index(each["size"]), each["topology"][:3], each["chips"])  # noqa: E731
    for each in sorted(points, key=key):
        slices = f"{each['slices']} x " if each["slices"] > 1 else ""
        row = [each["size"], f"{each['chips']:,}", f"{slices}{each['topology']}"]
        row += [f"{each['tokens'] / 1e6:.2f}M"]
        if "reason" in each:
            row += [each["reason"].replace("|", "/"), "", "", "", ""]
        else:
            low, high = (100 * share for share in each["mfu"])
            parts = each["seconds"]
            needed = each["arguments"] + each["temporary"]
            too_much = ": does not fit" if needed > each["memory"] else ""
            costs = (cost(each, max(parts.values())), cost(each, sum(parts.values())))
            row += [
                f"{needed / GIB:.1f} of {each['memory'] / GIB:.1f}{too_much}",
                f"{sum(size for _, size in each['sent'].values()) / GIB:.2f}",
                ", ".join(f"{1000 * value:.0f}" for value in parts.values()),
                f"{low:.0f} to {high:.0f} %",
                " to ".join(f"{value:.3g}" for value in costs),
            ]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def plot(points: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws predicted cost and bytes sent against the number of chips."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib import ticker

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for each in points:
        if "reason" not in each:
            groups.setdefault((each["size"], each["topology"].split(":")[0]), []).append(each)
    marks = {"v5e": "o", "v5p": "s", "v6e": "^"}
    colours = {"135m": "C0", "1b": "C1", "8b": "C2", "70b": "C3"}
    for (size, kind), group in sorted(groups.items()):
        group = sorted(group, key=lambda each: each["chips"])
        chips = [each["chips"] for each in group]
        style: Any = {"color": colours[size], "marker": marks[kind], "label": f"{size}, {kind}"}
        least = [cost(each, max(each["seconds"].values())) for each in group]
        most = [cost(each, sum(each["seconds"].values())) for each in group]
        above = [high - low for low, high in zip(least, most, strict=True)]
        left.errorbar(chips, least, yerr=([0.0] * len(least), above), capsize=4, **style)
        sent = [sum(size for _, size in each["sent"].values()) / GIB for each in group]
        right.plot(chips, sent, **style)
    for axes, label in ((left, "chip-hours a billion tokens"), (right, "GiB sent a chip and step")):
        axes.set(xscale="log", yscale="log", xlabel="chips", ylabel=label, xlim=(12, 1400))
        axes.set_xticks([16, 64, 256, 1024], ["16", "64", "256", "1,024"])
        axes.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(ticker.StrMethodFormatter("{x:g}"))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.set_title("predicted: everything overlaps (mark) to nothing does", fontsize=10)
    right.set_title("counted in the compiled program", fontsize=10)
    right.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles what is left of the grid, then writes table and plot; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--only", default="", help="words that a point's name has all of: 8b,v6e")
    parser.add_argument("--minutes", type=float, help="start no further point after so long")
    parser.add_argument("--retry", action="store_true", help="compile failed points again")
    args = parser.parse_args(argv)
    args.workdir.mkdir(parents=True, exist_ok=True)
    words = [word for word in args.only.split(",") if word]
    wanted = [point for point in GRID if all(word in point.name for word in words)]
    began, found = monotonic(), {}
    for at, point in enumerate(wanted, 1):
        result = args.workdir / f"{point.name}.json"
        kept = json.loads(result.read_text()) if result.exists() else None
        if kept is not None and not (args.retry and "reason" in kept):
            found[point] = kept
            continue
        if args.minutes is not None and monotonic() - began > 60 * args.minutes:
            print(f"[{at}/{len(wanted)}] {point.name}: left for another time", flush=True)
            continue
        print(f"[{at}/{len(wanted)}] {point.name}: compiling", flush=True)
        found[point] = each = compile_point(point, args.workdir)
        told = each.get("reason") or f"MFU {each['mfu'][0]:.0%} to {each['mfu'][1]:.0%}"
        print(f"    {each['cpu_seconds']} CPU seconds; {told}", flush=True)
    results = list(found.values())
    if not results:
        print("nothing was compiled")
        return 1
    text = table(results)
    (args.workdir / "scale.md").write_text(text)
    plot(results, args.workdir / "scale.png")
    print(text)
    return int(any("reason" in each for each in results))


if __name__ == "__main__":
    raise SystemExit(main())
