"""The figures of a check as text: a table a part."""

from collections.abc import Callable

from dinotwins_jax.evals.table import markdown
from experiments.gpu.report import FAILED, MEASURED, NOT_MEASURED

UNKNOWN = "unknown"


def text(report: dict) -> str:
    """All parts, each with its table and what is missing in it, and a line for the whole."""
    parts = [part_text(name, part) for name, part in report["parts"].items()]
    items = [item for part in report["parts"].values() for item in part["items"]]
    counts = dict.fromkeys((MEASURED, FAILED, NOT_MEASURED), 0)
    for item in items:
        counts[item["status"]] += 1
    ended = "not ended" if report["ended"] is None else f"{report['ended']:.0f} s"
    told = ", ".join(f"{count} {status}" for status, count in counts.items())
    return "\n\n".join(
        [*parts, f"{ended} of {60 * report['minutes']:.0f} s, {report['size']}: {told}"]
    )


def part_text(name: str, part: dict) -> str:
    """One part."""
    found = [item for item in part["items"] if item["status"] == MEASURED]
    seconds = "not ended" if part["seconds"] is None else f"{part['seconds']:.0f} s"
    lines = [f"{part['title']} ({seconds} of {part['budget_s']:.0f} s)"]
    rows = ROWS[name](found) if found else []
    lines += [markdown(rows)] if rows else []
    for item in part["items"]:
        if item["status"] == FAILED:
            lines.append(f"  {item['name']}: failed, {item['reason']}")
        elif item["status"] == NOT_MEASURED:
            needed = f"needs about {item['needs_s']:.0f} s"
            lines.append(f"  {item['name']}: not measured, {item['reason']}; {needed}")
    return "\n".join(lines)


def _device(items: list[dict]) -> list[list[str]]:
    found = {key: value for item in items for key, value in item.items()}
    known = {
        "device": lambda f: f"{f['devices']} x {f['kind']} ({f['platform']})",
        "memory": lambda f: _scaled(f["memory_bytes"], 2**30, "GiB"),
        "peak, bfloat16": lambda f: _scaled(f["peak_flop_per_s"], 1e12, "TFLOP/s"),
        "peak, memory": lambda f: _scaled(f["peak_bytes_per_s"], 1e9, "GB/s"),
        "cards by nvidia-smi": lambda f: "; ".join(f["nvidia_smi"]) or "none",
        "packages": lambda f: ", ".join(f"{k} {v}" for k, v in f["packages"].items()),
        "host": lambda f: f"{f['cpu']}, Python {f['python']}",
        "matrix product, bfloat16": lambda f: _scaled(f["bfloat16_flop_per_s"], 1e12, "TFLOP/s"),
        "matrix product, float32": lambda f: _scaled(f["float32_flop_per_s"], 1e12, "TFLOP/s"),
        "memory, read and written": lambda f: _scaled(f["memory_bytes_per_s"], 1e9, "GB/s"),
        "host to device": lambda f: _scaled(f["host_to_device_bytes_per_s"], 1e9, "GB/s"),
    }
    return [["", "found"], *_cells(found, known)]


def _cells(found: dict, known: dict[str, Callable[[dict], str]]) -> list[list[str]]:
    """Rows of those entries whose figures are there."""
    rows = []
    for title, cell in known.items():
        try:
            rows.append([title, cell(found)])
        except KeyError:
            continue
    return rows


def _gradients(items: list[dict]) -> list[list[str]]:
    parts = dict.fromkeys(part for item in items for part in item.get("parts", ()))
    head = ["", "loss", "its error", "cosine of the gradient", *parts, "lowest of an array"]
    rows = [head]
    for item in items:
        row = [item["name"], f"{item['loss']:.5f}"]
        if "cosine" not in item:
            rows.append([*row, "reference", *[""] * (len(head) - 3)])
            continue
        row += [f"{item['loss_error']:.1e}", f"{item['cosine']:.5f}"]
        row += [f"{item['parts'][part]:.5f}" for part in parts]
        rows.append([*row, f"{item['worst']['cosine']:.4f} {item['worst']['name']}"])
    return rows


def _steps(items: list[dict]) -> list[list[str]]:
    head = ["", "ms (min, max)", "images/s", "utilisation", "peak GiB", "compile s"]
    return [
        head,
        *(
            [
                *_times(item),
                UNKNOWN if item["utilisation"] is None else f"{item['utilisation']:.1%}",
                _gib(item["peak_bytes"]),
                f"{item['compile_s']:.0f}",
            ]
            for item in items
        ),
    ]


def _pytorch(items: list[dict]) -> list[list[str]]:
    head = ["", "ms (min, max)", "images/s", "peak GiB", "compile s", "ours is faster by"]
    return [
        head,
        *(
            [
                *_times(item),
                _gib(item["peak_bytes"]),
                f"{item['compile_s']:.0f}" if "compile_s" in item else "",
                f"{item['ratio']:.2f}x ({item['ours']})" if "ratio" in item else "",
            ]
            for item in items
        ),
    ]


def _gib(size: int | None) -> str:
    return UNKNOWN if size is None else f"{size / 2**30:.2f}"


def _times(item: dict) -> list[str]:
    ms = f"{item['ms']:.1f} ({item['ms_min']:.1f}, {item['ms_max']:.1f})"
    return [item["name"], ms, f"{item['images_per_s']:.0f}"]


def _input(items: list[dict]) -> list[list[str]]:
    rows = [["", "images/s", "of the step's alone", "waiting for data"]]
    for item in items:
        shares = [item.get("share_of_step"), item.get("share_waiting")]
        cells = ["" if share is None else f"{share:.0%}" for share in shares]
        rows.append(
            [f"{item['name']}, {item['cores']} cores", f"{item['images_per_s']:.0f}", *cells]
        )
    return rows


def _training(items: list[dict]) -> list[list[str]]:
    found = {key: value for item in items for key, value in item.items()}
    known = {
        "data": lambda f: f["data"],
        "steps": lambda f: f"{f['steps_done']:,} of {f['steps']:,}, {f['step_ms']:.1f} ms each",
        "compile s": lambda f: f"{f['compile_s']:.0f}",
        "loss": lambda f: f"{f['last']['loss']:.3f}",
        "monitor, k-NN top-1 in % by step": lambda f: ", ".join(
            f"{row['step']:,}: {row['monitor/knn_top1']:.1f}" for row in f["monitor"]
        ),
        "k-NN, top-1 in %": lambda f: "; ".join(
            f"{row} {', '.join(f'{k} {v:.1f}' for k, v in of.items())}"
            for row, of in f["scores"].items()
        ),
    }
    return [["", "found"], *_cells(found, known)]


def _scaled(value: float | None, unit: float, name: str) -> str:
    return UNKNOWN if value is None else f"{value / unit:,.2f} {name}"


ROWS = {
    "device": _device,
    "attention": _gradients,
    "precision": _gradients,
    "step": _steps,
    "pytorch": _pytorch,
    "input": _input,
    "training": _training,
}
