"""A tree that halves points along the directions in which answers change most, and says which leaves answer for a row.

A split looks at one number of a row, its projection on a direction, and has half the points of its node on either
side. Rows near a split are answered by both sides: sigmoid((projection - threshold) / (temperature * spread)) is the
weight of the right one, and a leaf's weight is the product along its path.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from fastagop.kernels.checks import largest

FAINT = 1e-3  # a leaf is not asked where its weight is less, unless its side was the heavier one in every split
_EVEN = 0.25  # share of the points on the smaller side from which on a split is taken without looking further
_ROUNDING = 64.0  # eps of the largest projection by which two must differ to lie on different sides
_ROWS = 2**16  # of a block of projections
_SHOWN = 3  # features of a direction in the text of a tree


@dataclass(frozen=True)
class Leaf:
    """A node that answers.

    Attributes:
        number: of the leaf, from the left.
        size: distinct training points.
    """

    number: int
    size: int


@dataclass(frozen=True)
class Split:
    """A node that asks on which side of a threshold a row's projection lies.

    Attributes:
        size: distinct training points.
        direction: unit vector (d,) of the features as the kernel sees them, float64.
        threshold: between the two projections in the middle; rows up to it go left.
        spread: distance between the quartiles of the projections.
        left, right: numbers of the nodes below.
    """

    size: int
    direction: torch.Tensor
    threshold: float
    spread: float
    left: int
    right: int


@dataclass(frozen=True, repr=False)
class Tree:
    """Nodes, of which the first is the root; ``str`` draws them."""

    nodes: list[Split | Leaf]

    @property
    def leaves(self) -> list[Leaf]:
        """The leaves in the order of their numbers, from the left."""
        return sorted((node for node in self.nodes if isinstance(node, Leaf)), key=lambda leaf: leaf.number)

    @property
    def depth(self) -> int:
        """The number of splits on the longest path from the root to a leaf."""
        return max(level for level, _ in self._walk())

    def route(self, points: torch.Tensor, temperature: float) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """(leaf, rows that it answers for, their weights, float64) of points (m, d), from the left.

        The weights of a row sum to 1, but for those of leaves that are too light to be asked. At temperature 0 every
        row has one leaf, and the weight 1. Points so large that their projections would leave float64, or infinite
        since they left their own dtype, are moved to where they do not.
        """
        wide = torch.finfo(torch.float64).max / (4.0 * max(1, points.shape[1]))
        most = min(torch.finfo(points.dtype).max, wide)
        if not largest(points) <= most:
            points = points.clamp(-most, most)
        every = torch.arange(len(points), device=points.device)
        stack = [(0, every, points.new_ones(len(points), dtype=torch.float64), every >= 0)]
        while stack:
            number, rows, weights, main = stack.pop()  # main: whether all sides so far were the heavier ones
            node = self.nodes[number]
            if isinstance(node, Leaf):
                yield node.number, rows, weights
                continue
            apart = projections(points, rows, node.direction) - node.threshold
            left = apart <= 0
            for child, side, toward in (
                (node.right, ~left, apart),
                (node.left, left, -apart),
            ):  # the left one is on top
                share = torch.sigmoid(toward / (temperature * node.spread)) if temperature > 0 else side.double()
                part, chief = share * weights, main & side
                asked = chief | (part >= FAINT)
                if bool(asked.any()):
                    stack.append((child, rows[asked], part[asked], chief[asked]))

    def packed(self) -> tuple[torch.Tensor, list[list[Any]]]:
        """(directions of the splits, a list of numbers for each node), for a file."""
        splits = [node for node in self.nodes if isinstance(node, Split)]
        numbers = [
            [node.size, node.number]
            if isinstance(node, Leaf)
            else [node.size, node.threshold, node.spread, node.left, node.right]
            for node in self.nodes
        ]
        return torch.stack([node.direction for node in splits]) if splits else torch.empty(0, 0, device="cpu"), numbers

    @classmethod
    def unpacked(cls, directions: torch.Tensor, numbers: list[list[Any]], features: int) -> Tree:
        """The tree that ``packed`` described.

        Raises:
            ValueError: the nodes are no tree.
        """
        rest, nodes = iter(directions), []
        for items in numbers:
            nodes.append(Leaf(items[1], items[0]) if len(items) == 2 else Split(items[0], next(rest), *items[1:]))
        tree, splits = cls(nodes), [node for node in nodes if isinstance(node, Split)]
        below = sorted(child for node in splits for child in (node.left, node.right))
        later = all(min(node.left, node.right) > place for place, node in enumerate(nodes) if isinstance(node, Split))
        numbered = [leaf.number for leaf in tree.leaves] == list(range(len(nodes) - len(splits)))
        fits = len(splits) == len(directions) and (not splits or directions.shape[1] == features)
        if not nodes or below != list(range(1, len(nodes))) or not (later and numbered and fits):
            raise ValueError("its nodes are no tree")
        return tree

    def _walk(self) -> Iterator[tuple[int, Split | Leaf]]:
        """(depth, node), each before those below it, from the left."""
        stack = [(0, 0)]
        while stack:
            level, number = stack.pop()
            node = self.nodes[number]
            yield level, node
            if isinstance(node, Split):
                stack += [(level + 1, node.right), (level + 1, node.left)]

    def __repr__(self) -> str:
        count = len(self.leaves)
        return f"Tree of {count} {'leaf' if count == 1 else 'leaves'} for {self.nodes[0].size} points"

    def __str__(self) -> str:
        lines = [repr(self)]
        for level, node in self._walk():
            text = (
                f"leaf {node.number}" if isinstance(node, Leaf) else f"{_named(node.direction)} <= {node.threshold:.3g}"
            )
            lines.append(f"{'  ' * (level + 1)}{node.size} points: {text}")
        return "\n".join(lines)


def _named(direction: torch.Tensor) -> str:
    """The largest terms of a projection on a direction in words, such as +0.80 x3 -0.60 x7."""
    largest = direction.abs().topk(min(_SHOWN, len(direction))).indices.tolist()
    terms = " ".join(f"{float(direction[i]):+.2f} x{i}" for i in largest if direction[i] != 0)
    return terms + (" ..." if int((direction != 0).sum()) > _SHOWN else "")


def projections(points: torch.Tensor, rows: torch.Tensor, direction: torch.Tensor) -> torch.Tensor:
    """Some rows of points (m, d) along a direction (d,), float64."""
    return torch.cat([points[part].double() @ direction for part in rows.split(_ROWS)])


def cut(values: torch.Tensor) -> tuple[float, float] | None:
    """(threshold, share of the values on its smaller side) nearest to the median of values (r,); None where all agree.

    Equal values stay together, and values that differ by no more than rounding count as equal.
    """
    ordered = values.sort().values
    gaps = ordered[1:] - ordered[:-1]
    places = (gaps > _ROUNDING * torch.finfo(values.dtype).eps * ordered.abs().max()).nonzero()[:, 0]
    if len(places) == 0:
        return None
    below = places + 1
    best = int((2 * below - len(values)).abs().argmin())
    place, left = int(places[best]), int(below[best])
    return float(ordered[place] + 0.5 * gaps[place]), min(left, len(values) - left) / len(values)


def _spread(values: torch.Tensor) -> float:
    """Distance between the quartiles; the standard deviation where half of the values agree."""
    ordered = values.sort().values
    apart = float(ordered[(3 * len(values)) // 4] - ordered[len(values) // 4])
    return apart if apart > 0 else float(values.std(correction=0))


@dataclass(frozen=True)
class Growth:
    """How a tree grows.

    Attributes:
        X: rows (n, d), as the kernel sees them.
        kept: rows that stand for the distinct points (r,). group: the point of each row (n,).
        leaf_size: distinct points that a leaf has at most, unless nothing divides them.
        directions: (rows of a node) -> directions (k, d), float64, to try in turn; all of the rows may have one answer.
        settled: (rows of a node) -> whether all have one answer, so that nothing is left to divide.
    """

    X: torch.Tensor
    kept: torch.Tensor
    group: torch.Tensor
    leaf_size: int
    directions: Callable[[torch.Tensor], Iterator[torch.Tensor]]
    settled: Callable[[torch.Tensor], bool]

    def run(self) -> tuple[Tree, list[torch.Tensor]]:
        """(the tree, the rows of each of its leaves)."""
        device = self.X.device
        nodes: list = [None]
        members, right = [], torch.zeros(len(self.kept), dtype=torch.bool, device=device)
        stack = [(0, torch.arange(len(self.kept), device=device), torch.arange(len(self.X), device=device))]
        while stack:
            number, points, rows = stack.pop()
            found = None
            if len(points) > self.leaf_size and not self.settled(rows):
                found = self._split(points, rows)
            if found is None:
                nodes[number] = Leaf(len(members), len(points))
                members.append(rows)
                continue
            direction, threshold, values = found
            below = len(nodes)
            nodes[number] = Split(len(points), direction, threshold, _spread(values), below, below + 1)
            nodes += [None, None]
            beyond = values > threshold
            right[points] = beyond
            side = right[self.group[rows]]
            stack += [(below + 1, points[beyond], rows[side]), (below, points[~beyond], rows[~side])]
        return Tree(nodes), members

    def _split(self, points: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, float, torch.Tensor] | None:
        """(direction, threshold, projections of the points): the first even split, else the most even one."""
        best, share = None, 0.0
        for direction in self.directions(rows):
            values = projections(self.X, self.kept[points], direction)
            found = cut(values)
            if found is not None and found[1] > share:
                best, share = (direction, found[0], values), found[1]
            if share >= _EVEN:
                break
        return best
