"""The presentation of how much of a new encoder's search an adapter keeps."""

from embedcache.evaluate.adapter import NeighborsReport
from embedcache.reports.render import Presentation, Section, to_plain

_NOTE = (
    "Each query searches the old encoder's vectors. Re-encoding: the fraction of its 10 nearest neighbors by the new "
    "encoder's own vectors that it finds. Old encoder: the same for the neighbors by the old encoder's own query. Own "
    "item first: how often the query's own old vector is nearest."
)


def present_adapter(report: NeighborsReport) -> Presentation:
    """Return the presentation of an adapter: one row per kind of query, and the chance level."""
    columns = ["queries", "R@10 of re-encoding", "R@10 of the old encoder", "own item first"]
    rows = [[name, str(report.reencoded[name]), str(report.old[name]), str(report.own[name])] for name in report.own]
    return Presentation(
        title="Adapter",
        lines=[report.line()],
        sections=[Section(title="Neighbors found in the old vectors", notes=[_NOTE], table=(columns, rows))],
        record=lambda: to_plain(report),
    )
