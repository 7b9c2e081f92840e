"""What the harness shows and writes."""

import csv
import json
import re
import shutil
import subprocess

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


def test_markdown_and_csv_hold_each_row_s_command(found):
    for index, row in enumerate(found.rows):
        row.command = f"nearpeak bench --case case-{index}"
    markdown = table.to_markdown([table.suite_table("norm", found.rows)])
    assert "```sh\nnearpeak bench --case case-0\nnearpeak bench --case case-1\n```" in markdown
    commands = {line["command"] for line in csv.DictReader(table.to_csv(found).splitlines())}
    assert commands == {row.command for row in found.rows}


def test_brackets_of_a_note_are_shown(found):
    found.rows[0].measurements[0].note = "shapes [7]x[8]"
    console = rich.console.Console(width=120, quiet=False)
    with console.capture() as capture:
        console.print(table.to_rich(table.suite_table("norm", found.rows), console))
    assert "shapes [7]x[8]" in capture.get()


def test_page_is_self_contained_and_escaped(found):
    for row in found.rows:
        row.command = "nearpeak bench --case 'a b'"
    page = report.to_html(found)
    assert page.count("<svg") == 3
    assert "a &lt;processor&gt;" in page
    assert page.count('class="copy" data-command="nearpeak bench --case &#39;a b&#39;"') == 2
    assert not re.findall(r"""(?:src|href)=["'](?!#)|@import|url\((?!#)""", page)


@pytest.mark.parametrize(
    ("cell", "value"),
    [
        ("1.25 ms (1.2-1.3)", "0.00125"), ("28.2x (22-32)", "28.2"), ("76%", "76.0"), ("9.1e-4 (9e-4)", "0.00091"),
        ("2.0 MiB", "2097152.0"), ("~0", "0.0"), ("2048x4096", "2048x4096"), ("", ""),
    ],
)  # fmt: skip
def test_cells_are_sorted_by_their_figures(cell, value):
    assert report.sort_value(cell) == value


PRESS = """<script>
document.querySelectorAll("table")[1].querySelectorAll("th button")[4].click();
document.getElementById("filter").value = "nothing like it";
document.getElementById("filter").dispatchEvent(new Event("input"));
</script></body>"""


@pytest.mark.skipif(shutil.which("chromium") is None, reason="chromium is not installed")
def test_page_sorts_and_filters_in_a_browser(found, tmp_path):
    (tmp_path / "page.html").write_text(report.to_html(found).replace("</body>", PRESS))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", str(tmp_path / "page.html")]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=300).stdout
    assert shown.count('aria-sort="ascending"') == 1
    rows = re.findall(r"<tr[^>]*>(?=<td)", shown)
    assert len(rows) == 3
    assert all("hidden" in row for row in rows)
