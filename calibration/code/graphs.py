"""Graph algorithms on adjacency dictionaries: shortest paths, components, ordering, flows."""

from __future__ import annotations

import heapq
from collections import defaultdict, deque
from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import TypeVar

Node = TypeVar("Node", bound=Hashable)
Weighted = Mapping[Node, Mapping[Node, float]]


class CycleError(ValueError):
    """The graph has a cycle where none is allowed."""

    def __init__(self, nodes: list) -> None:
        super().__init__("cycle: " + " -> ".join(map(str, nodes)))
        self.nodes = nodes


def dijkstra(graph: Weighted, source: Node) -> tuple[dict[Node, float], dict[Node, Node]]:
    """Distances from the source and each node's predecessor on a shortest path."""
    distance = {source: 0.0}
    previous: dict[Node, Node] = {}
    queue = [(0.0, 0, source)]
    counter = 1
    done: set[Node] = set()
    while queue:
        d, _, node = heapq.heappop(queue)
        if node in done:
            continue
        done.add(node)
        for neighbour, weight in graph.get(node, {}).items():
            if weight < 0:
                raise ValueError(f"negative weight {weight} on {node} -> {neighbour}")
            candidate = d + weight
            if candidate < distance.get(neighbour, float("inf")):
                distance[neighbour] = candidate
                previous[neighbour] = node
                heapq.heappush(queue, (candidate, counter, neighbour))
                counter += 1
    return distance, previous


def path_to(previous: Mapping[Node, Node], target: Node) -> list[Node]:
    path = [target]
    while path[-1] in previous:
        path.append(previous[path[-1]])
    return path[::-1]


def bellman_ford(graph: Weighted, source: Node) -> dict[Node, float]:
    """Like dijkstra, but edges may be negative; raises CycleError on a negative cycle."""
    nodes = set(graph) | {n for targets in graph.values() for n in targets}
    distance = {node: float("inf") for node in nodes}
    distance[source] = 0.0
    for round_number in range(len(nodes)):
        changed = False
        for node, targets in graph.items():
            for neighbour, weight in targets.items():
                if distance[node] + weight < distance[neighbour]:
                    distance[neighbour] = distance[node] + weight
                    changed = True
        if not changed:
            return distance
    raise CycleError([source])


def topological_order(dependencies: Mapping[Node, Iterable[Node]]) -> list[Node]:
    """Every node after everything it depends on."""
    waiting = {node: set(needs) for node, needs in dependencies.items()}
    for needs in list(waiting.values()):
        for need in needs:
            waiting.setdefault(need, set())
    users: dict[Node, list[Node]] = defaultdict(list)
    for node, needs in waiting.items():
        for need in needs:
            users[need].append(node)
    ready = deque(sorted((n for n, needs in waiting.items() if not needs), key=str))
    order = []
    while ready:
        node = ready.popleft()
        order.append(node)
        for user in users[node]:
            waiting[user].discard(node)
            if not waiting[user]:
                ready.append(user)
    if len(order) < len(waiting):
        stuck = [n for n, needs in waiting.items() if needs]
        raise CycleError(stuck)
    return order


class UnionFind:
    """Disjoint sets with path compression and union by size."""

    def __init__(self, items: Iterable[Node] = ()) -> None:
        self._parent = {item: item for item in items}
        self._size = {item: 1 for item in self._parent}

    def find(self, item: Node) -> Node:
        root = item
        while self._parent[root] != root:
            root = self._parent[root]
        while self._parent[item] != root:
            self._parent[item], item = root, self._parent[item]
        return root

    def union(self, a: Node, b: Node) -> bool:
        a, b = self.find(a), self.find(b)
        if a == b:
            return False
        if self._size[a] < self._size[b]:
            a, b = b, a
        self._parent[b] = a
        self._size[a] += self._size.pop(b)
        return True

    def groups(self) -> list[set[Node]]:
        found: dict[Node, set[Node]] = defaultdict(set)
        for item in self._parent:
            found[self.find(item)].add(item)
        return list(found.values())


def minimum_spanning_tree(edges: Iterable[tuple[float, Node, Node]]) -> list[tuple[float, Node, Node]]:
    ordered = sorted(edges, key=lambda edge: edge[0])
    sets = UnionFind({n for _, a, b in ordered for n in (a, b)})
    return [(w, a, b) for w, a, b in ordered if sets.union(a, b)]


def strongly_connected(graph: Mapping[Node, Iterable[Node]]) -> Iterator[list[Node]]:
    """Tarjan's components, written without recursion so that long chains do not overflow the stack."""
    index: dict[Node, int] = {}
    low: dict[Node, int] = {}
    on_stack: set[Node] = set()
    stack: list[Node] = []
    for root in graph:
        if root in index:
            continue
        work = [(root, iter(graph.get(root, ())))]
        index[root] = low[root] = len(index)
        stack.append(root)
        on_stack.add(root)
        while work:
            node, children = work[-1]
            for child in children:
                if child not in index:
                    index[child] = low[child] = len(index)
                    stack.append(child)
                    on_stack.add(child)
                    work.append((child, iter(graph.get(child, ()))))
                    break
                if child in on_stack:
                    low[node] = min(low[node], index[child])
            else:
                work.pop()
                if work:
                    parent = work[-1][0]
                    low[parent] = min(low[parent], low[node])
                if low[node] == index[node]:
                    component = []
                    while True:
                        member = stack.pop()
                        on_stack.discard(member)
                        component.append(member)
                        if member == node:
                            break
                    yield component


def maximum_flow(capacity: dict[Node, dict[Node, int]], source: Node, sink: Node) -> int:
    """Edmonds-Karp: augment along shortest paths until none is left."""
    residual: dict[Node, dict[Node, int]] = defaultdict(lambda: defaultdict(int))
    for a, targets in capacity.items():
        for b, c in targets.items():
            residual[a][b] += c
    total = 0
    while True:
        parent: dict[Node, Node | None] = {source: None}
        queue = deque([source])
        while queue and sink not in parent:
            node = queue.popleft()
            for neighbour, left in residual[node].items():
                if left > 0 and neighbour not in parent:
                    parent[neighbour] = node
                    queue.append(neighbour)
        if sink not in parent:
            return total
        bottleneck, node = float("inf"), sink
        while parent[node] is not None:
            bottleneck = min(bottleneck, residual[parent[node]][node])
            node = parent[node]
        node = sink
        while parent[node] is not None:
            residual[parent[node]][node] -= bottleneck
            residual[node][parent[node]] += bottleneck
            node = parent[node]
        total += bottleneck


if __name__ == "__main__":
    roads = {"A": {"B": 7, "C": 3}, "C": {"B": 2, "D": 8}, "B": {"D": 1}, "D": {}}
    distances, before = dijkstra(roads, "A")
    assert distances["D"] == 6 and path_to(before, "D") == ["A", "C", "B", "D"]
    print(topological_order({"shirt": [], "tie": ["shirt"], "jacket": ["tie", "trousers"], "trousers": []}))
