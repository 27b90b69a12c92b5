"""Machines of many chips, with what their links carry."""

from typing import NamedTuple

from experiments.benchmark.targets.cards import CARDS

_LINKS = 4  # of a TPU chip: two on each axis of the torus


class Machine(NamedTuple):
    """card: of CARDS; row: chips of one axis of the slice, or all behind one switch; wraps: whether the
    last chip of a row is linked to the first, which only the axes of 16 of a whole pod are."""

    card: str
    chips: int
    row: int
    wraps: bool

    def rate(self, group: int) -> float:
        """Bytes/s that a collective among `group` chips passes through each of them in one direction.

        Behind a switch all links serve any group. In a torus a group of a row uses the links of one axis, a
        larger one those of both; without wrapping the chips at the ends have half of them, and all wait.
        """
        card = CARDS[self.card]
        if card.platform == "gpu":
            return card.link_rate
        axes = 1 if group <= self.row else 2
        return axes * (2 if self.wraps else 1) * card.link_rate / _LINKS


MACHINES = {
    "8 x H100": Machine("h100", chips=8, row=8, wraps=True),
    "v5e-64": Machine("v5e", chips=64, row=8, wraps=False),
    "v6e-256": Machine("v6e", chips=256, row=16, wraps=True),
}
