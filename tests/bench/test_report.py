"""What the harness shows and writes."""

import json
import re

import pytest
import rich.console
from nearpeak_bench import report, results, table


def test_json_round_trip(found):
    assert results.Results.from_json(found.to_json()) == found


def test_json_of_another_format_is_refused(found):
    text = json.dumps({**json.loads(found.to_json()), "format": 0})
    with pytest.raises(ValueError, match="format"):
        results.Results.from_json(text)


def test_worst_row_is_marked(found):
    shown = table.suite_table("norm", found.rows)
    assert [line.mark for line in shown.lines] == ["fine", "worst"]
    console = rich.console.Console(width=80, record=True, quiet=True)
    console.quiet = False
    with console.capture() as capture:
        console.print(table.to_rich(shown, console))
    assert capture.get().count("worst") == 1
    assert max(map(len, capture.get().splitlines())) <= 80


def test_markdown_table_has_one_cell_per_header(found):
    lines = table.to_markdown([table.suite_table("norm", found.rows)]).splitlines()
    assert len({line.count("|") for line in lines if line.startswith("|")}) == 1


def test_page_is_self_contained_and_escaped(found):
    page = report.to_html(found)
    assert page.count("<svg") == 2
    assert "a &lt;processor&gt;" in page
    assert not re.findall(r"""(?:src|href)=["'](?!#)|@import|url\((?!#)""", page)
