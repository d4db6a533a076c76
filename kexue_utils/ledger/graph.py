"""A small layered drawing of a graph without circles, as inline SVG whose nodes are links."""

from graphlib import TopologicalSorter
from statistics import mean

from markupsafe import Markup as HTML


def draw(uses, nodes):
    """An SVG of the graph `uses`, {node: nodes}; nodes: {node: (text, link, CSS class, title)}."""
    boxes, lines, width, height = layout(uses, {node: 7.5 * len(nodes[node][0]) + 14 for node in uses})
    parts = []
    for points in lines:
        d = "M{} {}".format(*points[0])
        for (x, y), (to_x, to_y) in zip(points, points[1:], strict=False):
            half = (y + to_y) // 2
            d += f"V{to_y}" if x == to_x else f"C{x} {half} {to_x} {half} {to_x} {to_y}"
        parts.append(HTML('<path d="{}"/>').format(d))
    for node, (x, y, wide) in boxes.items():
        text, href, tone, title = nodes[node]
        parts.append(
            HTML(
                '<a href="{}" class="{}"><title>{}</title><rect x="{:g}" y="{}" width="{:g}" height="28" rx="5"/>'
                '<text x="{}" y="{}">{}</text></a>'
            ).format(href, tone, title, x - wide / 2, y - 14, wide, x, y + 4, text)
        )
    svg = HTML('<svg width="{0}" height="{1}" viewBox="0 0 {0} {1}">{2}</svg>')
    return svg.format(width, height, HTML("").join(parts))


def layout(uses, width, gap=16, pitch=66):
    """Draws a graph without circles in rows, each node below all that it uses.

    uses: {node: nodes}; width: {node: pixels}. Returns ({node: (middle, middle, width)}, polylines, width, height).
    An edge that crosses a row passes through a waypoint of its own there, so that it runs behind no box.
    """
    depth, order = {}, list(TopologicalSorter(uses).static_order())
    for node in order:
        depth[node] = 1 + max((depth[other] for other in uses[node]), default=-1)
    for node in reversed(order):  # as far down as its users allow: short edges
        depth[node] = min((depth[user] - 1 for user in uses if node in uses[user]), default=depth[node])
    rows = [[n for n in uses if depth[n] == i] for i in range(max(depth.values()) + 1)]
    chains, near = [], {}
    for node in uses:
        for other in uses[node]:  # edges from one node share their waypoints
            chain = [other, *((other, i) for i in range(depth[other] + 1, depth[node])), node]
            chains.append(chain)
            for point in chain[1:-1]:
                if point not in rows[point[1]]:
                    rows[point[1]].append(point)
            for upper, lower in zip(chain, chain[1:], strict=False):
                near.setdefault(upper, []).append(lower)
                near.setdefault(lower, []).append(upper)
    half = {n: width.get(n, 0) / 2 for row in rows for n in row}
    x = {n: 100 * i for row in rows for i, n in enumerate(row)}
    for turn in range(24):  # barycentres, alternately upwards and downwards
        for row in rows if turn % 2 else reversed(rows):
            want = {n: mean(x[m] for m in near.get(n, [n])) for n in row}
            row.sort(key=want.get)
            for left, n in zip([None, *row], row, strict=False):
                x[n] = want[n] if left is None else max(want[n], x[left] + half[left] + gap + half[n])
            shift = mean(want[n] - x[n] for n in row)
            for n in row:
                x[n] += shift
    start = min(x[n] - half[n] for n in x) - 4
    at = {n: (round(x[n] - start), 20 + pitch * i) for i, row in enumerate(rows) for n in row}
    # From the lower edge of one box to the upper edge of the other, upright past the boxes between.
    lines = [[(at[n][0], at[n][1] + side) for n in chain for side in (-14, 14)][1:-1] for chain in chains]
    right = max(x[n] + half[n] for n in x) - start + 4
    return {n: (*at[n], width[n]) for n in uses}, lines, round(right), pitch * len(rows) - pitch + 40
