"""Grafana's JSON for panels and dashboards, as far as `build.py` needs it. Knows no metric.

A panel is given with its width; `dashboard` lays panels out from left to right and numbers them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Json = dict[str, Any]

DATASOURCE = {"type": "prometheus", "uid": "trimkv-prometheus"}
COLUMNS = 24
HEIGHT = 8
NOTHING = "–"
_NEWEST = {"calcs": ["lastNotNull"], "fields": "", "values": False}

# A query and the name its series get, in Grafana's words: {{label}}.
Query = tuple[str, str]


def row(title: str) -> Json:
    """A heading over the panels that follow."""
    return {"type": "row", "title": title, "collapsed": False, "panels": [], "gridPos": {"w": COLUMNS, "h": 1}}


def timeseries(
    title: str,
    queries: Iterable[Query],
    text: str,
    *,
    unit: str = "short",
    width: int = 8,
    is_stacked: bool = False,
    largest: float | None = None,
) -> Json:
    """Lines over time; `unit` is one of Grafana's ids, `largest` the end of the axis where it is known."""
    defaults: Json = {
        "unit": unit,
        "min": 0,
        "custom": {
            "lineWidth": 1,
            "fillOpacity": 30 if is_stacked else 8,
            "showPoints": "never",
            "spanNulls": False,
            "stacking": {"mode": "normal" if is_stacked else "none", "group": "A"},
        },
    }
    if largest is not None:
        defaults["max"] = largest
    options = {
        "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
        "tooltip": {"mode": "multi", "sort": "desc"},
    }
    return _panel("timeseries", title, text, _targets(queries), defaults=defaults, options=options, width=width)


def stat(
    title: str, query: str, text: str, *, unit: str = "short", steps: Sequence[tuple[float, str]] = (), width: int = 3
) -> Json:
    """The number of this moment, coloured by the `steps` it has reached: pairs of a value and a colour.

    Asked for at one time: the last number of a span would be an old one where there is none now.
    """
    thresholds = [{"value": None, "color": "green"}, *({"value": value, "color": colour} for value, colour in steps)]
    # Of nothing, such as the errors of no requests.
    nothing = {"type": "special", "options": {"match": "null+nan", "result": {"text": NOTHING, "color": "green"}}}
    defaults = {
        "unit": unit,
        "thresholds": {"mode": "absolute", "steps": thresholds},
        "mappings": [nothing],
        "noValue": NOTHING,
    }
    options = {"reduceOptions": _NEWEST, "colorMode": "background", "graphMode": "none"}
    targets = _targets([(query, "")], is_instant=True)
    return _panel("stat", title, text, targets, defaults=defaults, options=options, width=width, height=4)


def heatmap(
    title: str, query: Query, text: str, *, unit: str = "short", is_histogram: bool, width: int = 12, y_label: str
) -> Json:
    """Series as rows, time as columns, values as colours.

    Args:
        is_histogram: whether the series are cumulative buckets (label `le`), whose differences are shown.
    """
    targets = _targets([query])
    targets[0]["format"] = "heatmap" if is_histogram else "time_series"
    options = {
        "calculate": False,
        "color": {"mode": "scheme", "scheme": "Viridis", "steps": 64, "fill": "dark-blue"},
        "cellGap": 0,
        "rowsFrame": {"layout": "le" if is_histogram else "unknown"},
        "yAxis": {"axisLabel": y_label, "axisPlacement": "left", "unit": "short"},
        "cellValues": {"unit": unit},
        "filterValues": {"le": 1e-9},
        "legend": {"show": True},
        "tooltip": {"mode": "single", "yHistogram": False},
    }
    return _panel("heatmap", title, text, targets, defaults={}, options=options, width=width, height=HEIGHT + 2)


def bars(title: str, query: Query, text: str, *, unit: str = "short", width: int = 12) -> Json:
    """The newest value of every series, as bars; over a span, since what is asked for at one time comes in no order."""
    options = {
        "orientation": "vertical",
        "displayMode": "gradient",
        "reduceOptions": _NEWEST,
        "showUnfilled": False,
    }
    targets = _targets([query])
    return _panel(
        "bargauge",
        title,
        text,
        targets,
        defaults={"unit": unit, "min": 0},
        options=options,
        width=width,
        height=HEIGHT + 2,
    )


def table(
    title: str,
    queries: Mapping[str, tuple[str, str | None]],
    text: str,
    *,
    key: str,
    name: str,
    labels: Sequence[str],
) -> Json:
    """One line for each value of the label `key`, which every answer has.

    Args:
        queries: by heading, the query and its unit; without a unit its labels are wanted, and its value is hidden.
        name: heading of the column of `key`.
        labels: columns after those of the values.
    """
    targets, overrides, names = [], [], {key: name}
    # Grafana tells the columns of one name apart by numbers.
    hidden = ["Time", *(f"Time {number}" for number in range(1, len(queries) + 1))]
    for index, (heading, (query, unit)) in enumerate(queries.items()):
        letter = chr(ord("A") + index)
        targets += _targets([(query, "")], first=letter, is_instant=True)
        targets[-1]["format"] = "table"
        if unit is None:
            hidden.append(f"Value #{letter}")
            continue
        names[f"Value #{letter}"] = heading
        overrides.append(
            {"matcher": {"id": "byName", "options": heading}, "properties": [{"id": "unit", "value": unit}]}
        )
    order = {column: place for place, column in enumerate((*names, *labels))}
    panel = _panel(
        "table",
        title,
        text,
        targets,
        defaults={"custom": {"align": "auto"}},
        options={"showHeader": True},
        width=COLUMNS,
        height=6,
    )
    panel["fieldConfig"]["overrides"] = overrides
    panel["transformations"] = [
        {"id": "joinByField", "options": {"byField": key, "mode": "outer"}},
        {
            "id": "organize",
            "options": {
                "excludeByName": dict.fromkeys(hidden, True),
                "renameByName": names,
                "indexByName": order,
            },
        },
    ]
    return panel


def dashboard(uid: str, title: str, text: str, panels: Sequence[Json]) -> Json:
    """A whole dashboard: `panels` side by side until a line of 24 columns is full."""
    x = y = line_height = 0
    for number, panel in enumerate(panels, start=1):
        place = panel["gridPos"]
        if x + place["w"] > COLUMNS:
            x, y, line_height = 0, y + line_height, 0
        panel["id"] = number
        panel["gridPos"] = {"x": x, "y": y, "w": place["w"], "h": place["h"]}
        x, line_height = x + place["w"], max(line_height, place["h"])
    return {
        "uid": uid,
        "title": title,
        "description": text,
        "tags": ["trimkv"],
        "schemaVersion": 39,
        "version": 1,
        "editable": False,
        "graphTooltip": 1,
        "refresh": "15s",
        "timezone": "browser",
        "time": {"from": "now-1h", "to": "now"},
        "templating": {
            "list": [_variable("job", "up", multi=False), _variable("instance", 'up{job="$job"}', multi=True)]
        },
        "links": [
            {"type": "dashboards", "tags": ["trimkv"], "asDropdown": False, "includeVars": True, "keepTime": True}
        ],
        "panels": list(panels),
    }


def _variable(name: str, series: str, *, multi: bool) -> Json:
    variable: Json = {
        "name": name,
        "type": "query",
        "datasource": DATASOURCE,
        "query": {"query": f"label_values({series}, {name})", "refId": "StandardVariableQuery"},
        "refresh": 2,
        "sort": 1,
        "multi": multi,
        "includeAll": multi,
    }
    if multi:
        return variable | {"allValue": ".*", "current": {"text": ["All"], "value": ["$__all"]}}
    return variable | {"regex": "/^trimkv/", "current": {"text": "trimkv", "value": "trimkv"}}


def _targets(queries: Iterable[Query], *, first: str = "A", is_instant: bool = False) -> list[Json]:
    return [
        {
            "refId": chr(ord(first) + index),
            "datasource": DATASOURCE,
            "expr": expression,
            "legendFormat": name or "__auto",
            "range": not is_instant,
            "instant": is_instant,
        }
        for index, (expression, name) in enumerate(queries)
    ]


def _panel(
    kind: str,
    title: str,
    text: str,
    targets: list[Json],
    *,
    defaults: Json,
    options: Json,
    width: int,
    height: int = HEIGHT,
) -> Json:
    return {
        "type": kind,
        "title": title,
        "description": text,
        "datasource": DATASOURCE,
        "targets": targets,
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": options,
        "gridPos": {"w": width, "h": height},
    }
