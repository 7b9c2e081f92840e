"""The loop of a kernel that its time goes to, found in the machine code's flow of control.

A loop is natural: a way back to an instruction that every way there passes (its header), with all that leads from the
header to that way (Aho, Lam, Sethi, Ullman, "Compilers", 9.6). Of those without a loop inside, the hottest has the most
matrix work, or where no loop has any the most traffic; of loops with the same work, as those of masked and whole
blocks, the one with fewer instructions runs more often.
"""

import networkx

from .instructions import OTHER, Instruction


def hottest(instructions: list[Instruction]) -> list[int]:
    """Indices of the hottest loop's instructions, in the code's order; none where there is no loop."""
    loops = _innermost(_working(_natural(instructions), instructions))
    return sorted(max(loops, key=lambda loop: _heat(loop, instructions), default=()))


def _heat(loop: set[int], instructions: list[Instruction]) -> tuple:
    uses = [instructions[index].use for index in loop]
    flops = sum(use.flops for use in uses)
    # Where shapes are unknown, their number has to do.
    products = sum(use.group == "matrix" for use in uses)
    if flops or products:
        return flops, products, -len(loop)
    return 0, 0, sum(use.loaded + use.stored for use in uses), sum(use.moved for use in uses), -len(loop)


def flow(instructions: list[Instruction]) -> networkx.DiGraph:
    """An edge for each instruction that may run right after another."""
    places = {label: index for index, each in enumerate(instructions) for label in each.labels}
    graph = networkx.DiGraph()
    graph.add_nodes_from(range(len(instructions)))
    for index, each in enumerate(instructions):
        if each.target in places:
            graph.add_edge(index, places[each.target])
        if not each.ends and index + 1 < len(instructions):
            graph.add_edge(index, index + 1)
    return graph


def _natural(instructions: list[Instruction]) -> list[set[int]]:
    """The loops' instructions; those that share a header are one. The way back may also run on into the header."""
    graph = flow(instructions)
    dominators = networkx.immediate_dominators(graph, 0) if instructions else {}
    loops: dict[int, set[int]] = {}
    for index in dominators:
        for header in graph.successors(index):
            if instructions[header].labels and _dominates(header, index, dominators):
                loops.setdefault(header, {header}).update(_reaching(index, header, graph, dominators))
    return list(loops.values())


def _reaching(index: int, header: int, graph: networkx.DiGraph, within) -> set[int]:
    """All that leads to `index` without passing `header`, among what can run."""
    if index == header:
        return {index}
    others = graph.subgraph(set(within) - {header})
    return networkx.ancestors(others, index) | {index}


def _dominates(header: int, index: int, dominators: dict[int, int | None]) -> bool:
    """Whether every way from the start to `index` passes `header`."""
    while index != header:
        above = dominators.get(index)
        if above is None or above == index:
            return False
        index = above
    return True


def _working(loops: list[set[int]], instructions: list[Instruction]) -> list[set[int]]:
    """Without those that only wait, for a barrier or for ever."""
    return [loop for loop in loops if any(instructions[index].use.group != OTHER for index in loop)]


def _innermost(loops: list[set[int]]) -> list[set[int]]:
    return [loop for loop in loops if not any(other < loop for other in loops)]
