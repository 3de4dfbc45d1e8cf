"""What each token is by itself, ahead of the loop: what a step computes that no state is behind.

A step that projects its token and turns it by its position, ``q_t = turned(linear(x[:, t]), t)``, needs nothing that
another step leaves. So the state may as well read ``stack([q_t for each t])[t]``, and all that ``q_t`` is computed from
runs before the first step. No number changes. What was joined there is then moved behind its join, as a loop's results
are (``fission.py``), and is a function of all tokens at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import fx

from ..capture.modes import switches_autocast
from ..examples import AHEAD
from ..graph.schedule import Schedule
from .layers import Cut, Row, above, copy_nodes, depths, families, may_be_cut, read_of_whole, readers, result


def computed_ahead(schedule: Schedule) -> fx.GraphModule | None:
    """A copy of the graph in which states read what each token is as a part of all of them; None if none do."""
    cuts = [] if switches_autocast(schedule.gm.graph) else list(_cuts(schedule))
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    instead: dict[fx.Node, fx.Node] = {}
    copy_nodes(schedule, graph, mapping, instead, schedule.inputs)
    for cut in cuts:
        copy_nodes(schedule, graph, mapping, instead, cut.before)
        if (read := read_of_whole(graph, cut, mapping, AHEAD)) is None:
            return None
        instead |= read
    copy_nodes(schedule, graph, mapping, instead, schedule.nodes)
    return result(schedule, graph) if cuts else None


def _cuts(schedule: Schedule) -> Iterator[Cut]:
    """The first ones first: the calls with weights of their own, and what is read by what has a state behind it."""
    depth = depths(schedule.nodes)
    calls = dict.fromkeys(f.calls for f in families(schedule) if _is_level(f.calls, depth))
    found = [row for row, is_last in _below(schedule, calls, depth) if is_last or row in calls]
    for row in sorted(found, key=lambda row: depth[row[0]]):
        cut = Cut(row, above(row))
        if may_be_cut(schedule, cut):
            yield cut


def _below(schedule: Schedule, rows: Iterable[Row], depth: dict[fx.Node, int]) -> Iterator[tuple[Row, bool]]:
    """These, and what is computed from them that no state is behind; whether something that one is reads each."""
    work = list(dict.fromkeys(rows))
    seen = set(work)
    while work:
        row = work.pop()
        is_last = False
        for column in readers(row, schedule.unread):
            if not _is_level(column, depth):
                is_last = True
            elif column not in seen:
                seen.add(column)
                work.append(column)
        yield row, is_last


def _is_level(row: Row, depth: dict[fx.Node, int]) -> bool:
    """Whether each is computed from as much, and so from no state: what is behind one grows from step to step."""
    return len({depth[n] for n in row}) == 1
