"""What `lcm analyse` found of runs, as sections of a page and as text."""

from collections.abc import Sequence

from lcm.report.attention import attention, attention_tables
from lcm.report.runs import Run
from lcm.report.sections import Section
from lcm.report.states import state_tables, states
from lcm.report.tables import to_text


def analyses(runs: Sequence[Run]) -> list[Section]:
    """A section on attention and one on recurrent states, if there is something of either."""
    return [*attention(runs), *states(runs)]


def analysis_summary(runs: Sequence[Run]) -> str:
    """The tables for a terminal, of all that `lcm analyse` wrote for the newest steps."""
    return "\n\n".join(map(to_text, [*attention_tables(runs), *state_tables(runs)]))
