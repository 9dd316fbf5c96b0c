"""The few kinds of panels and variables that the dashboards are made of, over grafana-foundation-sdk's builders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, TypeVar

from grafana_foundation_sdk.builders import common, heatmap, prometheus, stat, table, timeseries
from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.models import common as c
from grafana_foundation_sdk.models import dashboard as d
from grafana_foundation_sdk.models import heatmap as h
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

DATASOURCE = d.DataSourceRef(type_val="prometheus", uid="${datasource}")
WIDTH = 24
"""Columns of Grafana's grid."""
HEIGHT = 9
"""Rows of it that a chart takes: room for a few dozen layers."""
LOWEST = -1e300
"""A heat map leaves out cells up to its filter's bound, which is just above 0 unless one is given."""

Panel = TypeVar("Panel", timeseries.Panel, stat.Panel, heatmap.Panel, table.Panel)


@dataclass(frozen=True)
class Query:
    """One PromQL expression; ``legend`` may hold ``{{label}}``."""

    expr: str
    legend: str = "__auto"

    def build(self, ref: str, format: PromQueryFormat, instant: bool) -> prometheus.Dataquery:
        query = prometheus.Dataquery().ref_id(ref).expr(self.expr).legend_format(self.legend).format(format)
        query = query.datasource(DATASOURCE)
        return query.instant() if instant else query.range()


@dataclass(frozen=True)
class Column:
    """One column of a table: an expression of the table's rows, and the unit of its values."""

    title: str
    expr: str
    unit: str = "short"


def lines(
    title: str,
    about: str,
    *queries: Query,
    unit: str = "short",
    width: int = 8,
    stacked: bool = False,
    zero: bool = True,
    log: bool = False,
) -> timeseries.Panel:
    """Curves over time. ``zero``: the axis starts at 0. ``log``: the axis is logarithmic."""
    panel = timeseries.Panel().unit(unit).fill_opacity(30 if stacked else 8).show_points(c.VisibilityMode.NEVER)
    panel = panel.tooltip(common.VizTooltipOptions().mode(c.TooltipDisplayMode.MULTI).sort(c.SortOrder.DESCENDING))
    panel = panel.legend(
        common.VizLegendOptions()
        .display_mode(c.LegendDisplayMode.LIST)
        .placement(c.LegendPlacement.BOTTOM)
        .show_legend(True)
        .calcs([])
    )
    if stacked:
        panel = panel.stacking(common.StackingConfig().mode(c.StackingMode.NORMAL).group("A"))
    if log:
        panel = panel.scale_distribution(common.ScaleDistributionConfig().type(c.ScaleDistribution.LOG).log(10))
    elif zero:
        panel = panel.axis_soft_min(0)
    return _finish(panel, title, about, queries, width)


def number(title: str, about: str, query: Query, unit: str = "short", alarm: float | None = None) -> stat.Panel:
    """The latest value, large; red from ``alarm`` on."""
    steps = [d.Threshold(value=None, color="green")]
    if alarm is not None:
        steps.append(d.Threshold(value=alarm, color="red"))
    panel = (
        stat.Panel()
        .unit(unit)
        .no_value("none")
        .color_mode(c.BigValueColorMode.VALUE)
        .graph_mode(c.BigValueGraphMode.AREA)
        .reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]).fields("").values(False))
        .thresholds(build.ThresholdsConfig().mode(d.ThresholdsMode.ABSOLUTE).steps(steps))
    )
    return _finish(panel, title, about, [query], width=4, height=4)


def rows_over_time(
    title: str, about: str, query: Query, value: str, unit: str = "short", width: int = 12
) -> heatmap.Panel:
    """A heat map with one row for each series (a layer), coloured by its value; ``value`` names it."""
    panel = _heat("Turbo", h.HeatmapColorScale.LINEAR, above=LOWEST).cell_values(heatmap.CellValues().unit(unit))
    panel = panel.rows_frame(heatmap.RowsHeatmapOptions().layout(c.HeatmapCellLayout.AUTO).value(value))
    panel = panel.y_axis(heatmap.YAxisConfig().axis_placement(c.AxisPlacement.LEFT).axis_label("layer"))
    return _finish(panel, title, about, [query], width)


def distribution(title: str, about: str, query: Query, unit: str = "short", width: int = 12) -> heatmap.Panel:
    """A heat map of a histogram's buckets: how many observations a second were how large."""
    panel = _heat("Blues", h.HeatmapColorScale.EXPONENTIAL, above=1e-9)
    panel = panel.y_axis(heatmap.YAxisConfig().axis_placement(c.AxisPlacement.LEFT).unit(unit))
    return _finish(panel, title, about, [query], width, format=PromQueryFormat.HEATMAP)


def listing(title: str, about: str, label: str, *columns: Column, width: int = WIDTH) -> table.Panel:
    """A table of the latest values with one row for each value of ``label``."""
    refs = [chr(ord("A") + i) for i in range(len(columns))]
    names = {f"Value #{ref}": column.title for ref, column in zip(refs, columns, strict=True)}
    order = {label: 0, **{f"Value #{ref}": i + 1 for i, ref in enumerate(refs)}}
    panel = (
        table.Panel()
        .show_header(True)
        .align(c.FieldTextAlignment.AUTO)
        .cell_options(c.TableAutoCellOptions())
        .inspect(False)
        .with_transformation(d.DataTransformerConfig(id_val="merge", options={}))
        .with_transformation(
            d.DataTransformerConfig(
                id_val="organize",
                options={"excludeByName": {"Time": True}, "indexByName": order, "renameByName": names},
            )
        )
    )
    for column in columns:
        panel = panel.override_by_name(column.title, [d.DynamicConfigValue(id_val="unit", value=column.unit)])
    queries = [Query(column.expr, column.title) for column in columns]
    return _finish(panel, title, about, queries, width, format=PromQueryFormat.TABLE, instant=True)


def choice(name: str, label: str, query: str, sort: d.VariableSort = d.VariableSort.ALPHABETICAL_ASC) -> Any:
    """A variable whose values Prometheus knows: several at once, or all of them."""
    return (
        build.QueryVariable(name)
        .label(label)
        .datasource(DATASOURCE)
        .query(query)
        .refresh(d.VariableRefresh.ON_TIME_RANGE_CHANGED)
        .sort(sort)
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(d.VariableOption(selected=True, text=["All"], value=["$__all"]))
    )


def fixed(name: str, label: str, *values: str) -> Any:
    """A variable with the given values, several at once, or all of them."""
    return (
        build.CustomVariable(name)
        .label(label)
        .values(", ".join(values))
        .multi(True)
        .include_all(True)
        .all_value(".*")
        .current(d.VariableOption(selected=True, text=["All"], value=["$__all"]))
    )


def dashboard(
    uid: str, title: str, about: str, variables: Sequence[Any], rows: Sequence[tuple[str, Sequence[Any]]]
) -> d.Dashboard:
    """``rows``: a heading and its panels each, whose widths fill lines of ``WIDTH`` columns."""
    board = (
        build.Dashboard(title)
        .uid(uid)
        .description(about)
        .tags(["steersman"])
        .timezone("browser")
        .time("now-30m", "now")
        .refresh("10s")
        .readonly()
        .tooltip(d.DashboardCursorSync.CROSSHAIR)
        .with_variable(
            build.DatasourceVariable("datasource")
            .label("Prometheus")
            .type("prometheus")
            .current(d.VariableOption(selected=True, text="Prometheus", value="prometheus"))
        )
        .with_variable(choice("instance", "Server", "label_values(steersman_plans_resident, instance)"))
        .link(
            build.DashboardLink("Steersman")
            .type(d.DashboardLinkType.DASHBOARDS)
            .tags(["steersman"])
            .as_dropdown(True)
            .include_vars(True)
            .keep_time(True)
        )
    )
    for variable in variables:
        board = board.with_variable(variable)
    ids = count(1)
    for heading, panels in rows:
        board = board.with_row(build.Row(heading).id(next(ids)))
        for panel in panels:
            board = board.with_panel(panel.id(next(ids)))
    return board.build()


def _heat(scheme: str, scale: h.HeatmapColorScale, above: float) -> heatmap.Panel:
    """Cells as Prometheus gives them; those with values up to ``above`` stay empty."""
    return (
        heatmap.Panel()
        .calculate(False)
        .cell_gap(0)
        .filter_values(heatmap.FilterValueRange().le(above))
        .color(
            heatmap.HeatmapColorOptions()
            .mode(h.HeatmapColorMode.SCHEME)
            .scheme(scheme)
            .fill("dark-blue")
            .scale(scale)
            .exponent(0.5)
            .steps(64)
        )
        .show_legend()
        .mode(c.TooltipDisplayMode.SINGLE)
        .show_color_scale(True)
    )


def _finish(
    panel: Panel,
    title: str,
    about: str,
    queries: Sequence[Query],
    width: int,
    height: int = HEIGHT,
    format: PromQueryFormat = PromQueryFormat.TIME_SERIES,
    instant: bool = False,
) -> Panel:
    panel = panel.title(title).description(about).datasource(DATASOURCE).span(width).height(height)
    for i, query in enumerate(queries):
        panel = panel.with_target(query.build(chr(ord("A") + i), format, instant))
    return panel
