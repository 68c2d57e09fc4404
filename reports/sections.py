"""The plots of the page, in the order in which a reader decides: what to promote, whether to go on, where to look."""

from __future__ import annotations

from dataclasses import dataclass

import plotly.graph_objects as go

from reports.compare import results_at, telling_rung, top_rung, usable
from reports.figures.curves import curves
from reports.figures.front import front, hidden
from reports.figures.genes import genes
from reports.figures.mix import MAX_BARS, mix_genes, mixes, parts_of, triangle
from reports.figures.progress import over_flops, over_results
from reports.figures.style import MAX_POINTS, words_of
from reports.frame import RunData
from reports.table import short
from reports.wording import counted
from search_spaces.errors import Path, dotted


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One figure of the page."""

    name: str
    figure: go.Figure

    @property
    def height(self) -> int:
        """Its height on the page, in pixels."""
        return int(self.figure.layout.height)


@dataclass(frozen=True, kw_only=True)
class Section:
    """Plots that answer one question. `empty` says in words why there are none; `note` is what to mind in reading."""

    anchor: str
    title: str
    question: str
    note: str = ""
    plots: tuple[Plot, ...] = ()
    empty: str = ""


def sections(data: RunData) -> list[Section]:
    """All sections that this run has."""
    return [
        _front(data),
        _section(
            "progress",
            "Progress",
            f"Is the {'front still growing' if len(data.objectives) > 1 else 'best still improving'}, or has the "
            "search said what it has to say?",
            _progress_note(data),
            {"hypervolume": over_results(data), "hypervolume_flops": over_flops(data)},
        ),
        _section(
            "curves",
            "Learning curves",
            "Did the trials train calmly, and would a longer budget change their order?",
            _curves_note(data),
            {"curves": curves(data)},
        ),
        *(_mix(data, path, number) for number, path in enumerate(mix_genes(data))),
        _section(
            "genes",
            "Genes",
            f"Where in its range does each gene do well, by {data.objectives[0].metric}?",
            _rung_note(data)
            + "A list is shown by its mean. Genes act together: what one panel shows may be the work of another gene.",
            {"genes": genes(data)},
        ),
    ]


def _section(anchor: str, title: str, question: str, note: str, drawn: dict[str, go.Figure]) -> Section:
    """A section with those of the figures that have something to show."""
    plots = tuple(Plot(name=name, figure=figure) for name, figure in drawn.items() if words_of(figure) is None)
    first = next(iter(drawn.values()))
    return Section(
        anchor=anchor,
        title=title,
        question=question,
        note=note if plots else "",
        plots=plots,
        empty="" if plots else words_of(first) or "",
    )


def _front(data: RunData) -> Section:
    if len(data.objectives) == 1:
        goal = data.objectives[0].metric
        question = f"How far ahead is the best {goal}, and which trial is worth promoting?"
        note = "Only trials of the highest rung have a rank." if len(data.rungs) > 1 else ""
        return _section("front", "Ranking", question, note, {"front": front(data)})
    notes = []
    if any(trial.rung < top_rung(data) for trial in data.trials if usable(trial)):
        notes.append(
            "Hollow trials are at a lower rung: they have seen fewer tokens, so their metrics do not compare with "
            "those of the front."
        )
    if len(data.objectives) > 2:
        notes.append(
            f"The front is that of all {len(data.objectives)} objectives; the line bounds the two that are shown, so "
            "trials of the front may lie behind it."
        )
    away = hidden(data)
    if away:
        notes.append(f"{counted(away, 'trial')} far off can be seen only after a double click, which shows all.")
    if len(data.trials) > MAX_POINTS:
        notes.append(f"Of the trials that are not on the front, an even sample of {MAX_POINTS:,} is drawn.")
    question = "Which trade-offs are there, and which trial is worth promoting?"
    return _section("front", "Pareto front", question, " ".join(notes), {"front": front(data)})


def _progress_note(data: RunData) -> str:
    if len(data.objectives) == 1:
        return "Only results of the highest rung count."
    return (
        "Only results of the highest rung count. Objectives are mapped to [0, 1] by the range of the first results "
        "(costs on a logarithmic scale); the reference point is 1.1 in each."
    )


def _curves_note(data: RunData) -> str:
    words = "A curve goes back where a trial was promoted: it went on from before its last decay. "
    if any("tokenizer" in path for path in data.genes):
        words += "The loss is that of a token: curves compare only between trials with the same tokenizer."
    return words.strip()


def _mix(data: RunData, path: Path, number: int) -> Section:
    name = dotted(path)
    drawn = {f"mix{number}": mixes(data, path)}
    if len(parts_of(data, path)) == 3:
        drawn[f"triangle{number}"] = triangle(data, path)
    many = len(results_at(data, telling_rung(data))) > MAX_BARS
    note = _rung_note(data) + (f"The best {MAX_BARS} are drawn as bars." if many else "")
    return _section(
        f"mix{number}",
        "Data mix" if path[0] == "data" else f"Mix {name}",
        f"Which weights of {name} win?",
        note,
        drawn,
    )


def _rung_note(data: RunData) -> str:
    """Which rung a figure compares, when there is more than one."""
    rung = telling_rung(data)
    if len(data.rungs) < 2 or rung < 0:
        return ""
    tokens = f" ({short(data.rungs[rung])} tokens)" if rung < len(data.rungs) else ""
    return f"All trials that reached rung {rung + 1}{tokens}, as they were there. "
