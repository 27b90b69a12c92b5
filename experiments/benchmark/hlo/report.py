"""All that is read from a compiled module, as plain values for JSON."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

from experiments.benchmark.hlo.attention import materialised_weights
from experiments.benchmark.hlo.collectives import collectives
from experiments.benchmark.hlo.kernels import Kernel, kernels
from experiments.benchmark.hlo.parts import Parts, short
from experiments.benchmark.hlo.products import Product, products
from experiments.benchmark.hlo.reductions import low_precision
from experiments.benchmark.hlo.text import Module
from experiments.benchmark.targets.cards import Card

_LARGEST = 25  # kernels and groups that are listed


class Work:
    """A kernel with its part, its products and the seconds that the card needs for it at least."""

    def __init__(self, module: Module, parts: Parts, kernel: Kernel, card: Card):
        self.kernel, self.part = kernel, parts.of(kernel)
        self.products = products(module, kernel)
        self.memory_s = kernel.bytes / card.memory_rate
        self.product_s = kernel.runs * sum(
            card.product_seconds(one.flops, one.dtypes, one.precision) for one in self.products
        )
        self.flops = kernel.runs * sum(one.flops for one in self.products)
        cycles = kernel.instruction.attribute(r'"estimated_cycles":"(\d+)"')
        self.cycles = kernel.runs * int(cycles) if cycles else 0


def report(module: Module, card: Card, chips: int, tokens: list[int]) -> dict[str, Any]:
    """The facts of a step's module.

    Args:
      chips: that the module is compiled for; every figure is of one of them.
      tokens: lengths of the sequences, see materialised_weights.
    Returns:
      kernels, traffic, products, reductions, attention_weights, collectives, roofline, and estimate if the
      compiler gives cycles: bytes, FLOPs and seconds.
    """
    parts = Parts(module)
    work = [Work(module, parts, kernel, card) for kernel in kernels(module)]
    weights = materialised_weights(parts, [one.kernel for one in work], tokens)
    facts = {
        "kernels": {
            "count": _launches(work),
            "by_kind": _counts((_kind(one.kernel), one.kernel.runs) for one in work),
        },
        "traffic": {
            "bytes": sum(one.kernel.bytes for one in work),
            "by_part": _by_part(work),
            "largest": _largest(work),
        },
        "products": _products(work),
        "reductions_below_float32": _reductions(module, parts),
        "attention_weights": {
            "count": sum(kernel.runs for kernel, _ in weights),
            "bytes": sum(kernel.runs * array.bytes for kernel, array in weights),
            "arrays": _counts((str(array), kernel.runs) for kernel, array in weights),
        },
        "collectives": _collectives(module, card, chips),
        "roofline": {
            "memory_s": sum(one.memory_s for one in work),
            "products_s": sum(one.product_s for one in work),
            "seconds": roofline(work),
        },
    }
    if any(one.cycles for one in work):
        facts["estimate"] = _estimate(work, card)
    return facts


def roofline(work: list[Work]) -> float:
    """Seconds at least: of every kernel memory or products, whichever takes longer; transfers run beside
    the kernels, but not faster than the memory."""
    kernels = sum(max(x.memory_s, x.product_s) for x in work if not x.kernel.is_transfer)
    return max(kernels, sum(x.memory_s for x in work))


def _launches(work: list[Work]) -> int:
    """Kernels launched in a step, without transfers."""
    return sum(one.kernel.runs for one in work if not one.kernel.is_transfer)


def _kind(kernel: Kernel) -> str:
    instruction = kernel.instruction
    if instruction.opcode == "custom-call":
        return instruction.attribute(r'custom_call_target="([^"]*)"') or "custom-call"
    if instruction.opcode == "fusion":
        backend = instruction.attribute(r'"kind":"(__\w+)"')
        return f"fusion {backend or instruction.attribute('kind=(k[A-Z][a-z]+)')}"
    return instruction.opcode


def _grouped(pairs: Iterable[tuple[Any, Any]]) -> dict[Any, list]:
    groups = defaultdict(list)
    for key, value in pairs:
        groups[key].append(value)
    return groups


def _counts(pairs: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Sums by name, the largest first."""
    sums = {name: sum(of) for name, of in _grouped(pairs).items()}
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def _by_part(work: list[Work]) -> dict[str, dict]:
    groups = _grouped((one.part, one) for one in work)
    rows = {
        name: {
            "bytes": sum(one.kernel.bytes for one in group),
            "kernels": _launches(group),
            "flops": sum(one.flops for one in group),
            "seconds": roofline(group),
        }
        for name, group in groups.items()
    }
    return dict(sorted(rows.items(), key=lambda item: -item[1]["bytes"]))


def _largest(work: list[Work]) -> list[dict]:
    """The groups of kernels that move most, by part and name."""
    groups = _grouped(((one.part, short(one.kernel.instruction.op_name)), one) for one in work)
    rows = [
        {
            "part": key[0],
            "op_name": key[1],
            "kernels": _launches(group),
            "bytes": sum(one.kernel.bytes for one in group),
            "result": _results(max((one.kernel for one in group), key=lambda one: one.bytes)),
        }
        for key, group in groups.items()
    ]
    return sorted(rows, key=lambda row: -row["bytes"])[:_LARGEST]


def _results(kernel: Kernel) -> str:
    """The first two arrays that a kernel makes."""
    arrays = kernel.instruction.arrays
    return ", ".join(map(str, arrays[:2])) + (", …" if len(arrays) > 2 else "")


def _products(work: list[Work]) -> dict[str, Any]:
    found = [(one.kernel.runs, product) for one in work for product in one.products]
    total = sum(runs * product.flops for runs, product in found)

    def rows(key: Callable[[Product], tuple], chosen: list[tuple[int, Product]]) -> dict:
        groups = _grouped((key(product), (runs, product)) for runs, product in chosen)
        return {
            name: {
                "count": sum(runs for runs, _ in group),
                "flops": sum(runs * product.flops for runs, product in group),
                "share": sum(runs * product.flops for runs, product in group) / max(total, 1.0),
            }
            for name, group in groups.items()
        }

    wide = [one for one in found if "f32" in one[1].dtypes or "f64" in one[1].dtypes]
    named = rows(lambda one: (short(one.op_name), _shapes(one), one.precision), wide)
    return {
        "flops": total,
        "by_dtype": rows(lambda one: f"{' x '.join(one.dtypes)} -> {one.result.dtype}", found),
        "float32": sorted(
            (
                {"op_name": name, "shapes": shapes, "precision": precision} | row
                for (name, shapes, precision), row in named.items()
            ),
            key=lambda row: -row["flops"],
        ),
    }


def _shapes(product: Product) -> str:
    return " x ".join(map(str, product.factors))


def _reductions(module: Module, parts: Parts) -> dict[str, Any]:
    found = low_precision(module, parts)
    groups = _grouped(((one.part, one.op_name, one.result), one.terms) for one in found)
    rows = [
        {"part": key[0], "op_name": key[1], "result": key[2], "count": len(of), "terms": max(of)}
        for key, of in groups.items()
    ]
    return {
        "count": len(found),
        "by_part": _counts((one.part, 1) for one in found),
        "longest": sorted(rows, key=lambda row: -row["terms"])[:_LARGEST],
    }


def _collectives(module: Module, card: Card, chips: int) -> dict[str, Any]:
    found = collectives(module, chips)
    return {
        "count": len(found),
        "bytes": sum(one.bytes for one in found),
        "seconds": sum(one.sent for one in found) / card.link_rate,
        "by_kind": _counts((one.kind, one.bytes) for one in found),
        "all": [one._asdict() for one in found],
    }


def _estimate(work: list[Work], card: Card) -> dict[str, Any]:
    cycles = sum(one.cycles for one in work)
    found = {
        "cycles": cycles,
        "by_part": _counts((one.part, one.cycles) for one in work),
    }
    return found | ({"seconds": cycles / card.clock} if card.clock else {})
