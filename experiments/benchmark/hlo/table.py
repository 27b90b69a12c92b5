"""The facts of a compiled step as text for a terminal."""

from dinotwins_jax.evals.table import markdown
from experiments.benchmark.targets.cards import Card

_ROWS = 12  # of a list


def text_of(facts: dict, card: Card) -> str:
    """Tables of the facts that benchmark.ahead_of_time measures."""
    sections = [
        f"{facts['title']}\nlowered in {facts['lower_s']} s, compiled in {facts['compile_s']} s",
        _overview(facts),
        _parts(facts, card),
        _largest(facts["traffic"]["largest"]),
        _products(facts["products"]),
        _reductions(facts["reductions_below_float32"]),
    ]
    if facts["collectives"]["count"]:
        sections.append(_collectives(facts["collectives"]))
    return "\n\n".join(sections) + "\n"


def _overview(facts: dict) -> str:
    memory, roofline = facts["memory"], facts["roofline"]
    rows = [["", ""]]
    rows += [[f"{name}, GiB", f"{size / 2**30:.2f}"] for name, size in memory.items()]
    weights = facts["attention_weights"]
    rows += [
        ["kernels", f"{facts['kernels']['count']:,}"],
        ["read and written, GB", _gb(facts["traffic"]["bytes"])],
        ["attention weights in memory, GB", f"{_gb(weights['bytes'])} in {weights['count']}"],
        ["sums below float32", f"{facts['reductions_below_float32']['count']}"],
        ["memory alone, ms", _ms(roofline["memory_s"])],
        ["products alone, ms", _ms(roofline["products_s"])],
        ["kernel by kernel, the longer of both, ms", _ms(roofline["seconds"])],
        ["utilisation that it allows", f"{roofline['utilisation']:.1%}"],
    ]
    if "estimate" in facts:
        cycles, seconds = facts["estimate"]["cycles"], facts["estimate"].get("seconds")
        rows.append(
            ["compiler's estimate", f"{_ms(seconds)} ms" if seconds else f"{cycles:,} cycles"]
        )
    return markdown(rows)


def _parts(facts: dict, card: Card) -> str:
    estimate = facts.get("estimate", {}).get("by_part", {})
    rows = [["part", "GB", "kernels", "TFLOP", "roofline, ms"]]
    rows[0] += [f"estimate, {'ms' if card.clock else 'cycles'}"] if estimate else []
    for name, of in facts["traffic"]["by_part"].items():
        row = [name, _gb(of["bytes"]), f"{of['kernels']}", f"{of['flops'] / 1e12:.3f}"]
        row.append(_ms(of["seconds"]))
        if estimate:
            cycles = estimate.get(name, 0)
            row.append(_ms(cycles / card.clock) if card.clock else f"{cycles:,}")
        rows.append(row)
    return markdown(rows)


def _largest(groups: list[dict]) -> str:
    rows = [["what moves most", "GB", "kernels", "result"]]
    rows += [
        [f"{of['part']}: {of['op_name'][-70:]}", _gb(of["bytes"]), f"{of['kernels']}", of["result"]]
        for of in groups[:_ROWS]
    ]
    return markdown(rows)


def _products(products: dict) -> str:
    rows = [["products", "count", "TFLOP", "share"]]
    rows += [
        [name, f"{of['count']}", f"{of['flops'] / 1e12:.3f}", f"{of['share']:.2%}"]
        for name, of in products["by_dtype"].items()
    ]
    rows += [
        [
            f"  {of['op_name']}, {of['shapes']}, {of['precision']}",
            *(f"{of['count']}", f"{of['flops'] / 1e12:.3f}", f"{of['share']:.2%}"),
        ]
        for of in products["float32"][:_ROWS]
    ]
    return markdown(rows)


def _reductions(reductions: dict) -> str:
    rows = [["sums below float32", "count"]]
    rows += [[name, f"{count}"] for name, count in reductions["by_part"].items()]
    return markdown(rows)


def _collectives(collectives: dict) -> str:
    rows = [["collectives", "MB", "arrays", "part"]]
    rows += [
        [of["kind"], f"{of['bytes'] / 1e6:.2f}", of["arrays"], of["part"]]
        for of in collectives["all"][:_ROWS]
    ]
    total = f"{collectives['bytes'] / 1e6:.1f}"
    rows.append([f"all {collectives['count']}", total, f"{_ms(collectives['seconds'])} ms", ""])
    return markdown(rows)


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f}"
