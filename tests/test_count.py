"""Counting a chapter: what is story, what is a picture of which kind, what is a verdict."""

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from dsv3.book.__main__ import main
from dsv3.book.count import Counts, count


def cell(kind, id, source, *outputs):
    made = kind(source)
    made.id = id
    if outputs:
        made.outputs = list(outputs)
    return made


def picture():
    return new_output("display_data", {"image/png": "", "text/plain": "[Figure: a thing]"})


def written(tmp_path, *cells):
    path = tmp_path / "00_small.ipynb"
    nbformat.write(new_notebook(cells=list(cells)), path)
    return path


def chapter(tmp_path):
    def said(text):
        return new_output("stream", name="stdout", text=text)

    return written(
        tmp_path,
        cell(new_markdown_cell, "title", "# 0 · Small\nfour more words here"),
        cell(new_code_cell, "map", "viz.show(viz.model_map(small))", picture()),
        cell(new_code_cell, "drawn", "viz.draw(fp8_schematics.bits())", picture()),
        cell(new_code_cell, "equal", "print(a == b)", said("equal: True and not False\n")),
        cell(new_markdown_cell, "ex-gap-text", "### Exercise 1"),
        cell(new_code_cell, "play", "NumberLine()", picture()),
        cell(new_markdown_cell, "going-further", "## Going further"),
        cell(new_code_cell, "figure", "viz.show(viz.some_figure(x))", picture()),
        cell(new_code_cell, "oracle", "print(c)", said("max|diff| < 1e-5: True\n")),
    )


def test_what_is_counted_where(tmp_path):
    assert count(chapter(tmp_path)) == Counts(
        words=17, all_words=17 + 5, schematics=2, figures=1, widgets=1, verdicts=2, exercises=1
    )


def test_without_that_section_the_story_ends_at_the_summary(tmp_path):
    path = written(
        tmp_path,
        cell(new_markdown_cell, "title", "one two"),
        cell(new_markdown_cell, "summary", "## Summary"),
    )
    assert (count(path).words, count(path).all_words) == (2, 4)


def test_the_table_has_a_line_for_each_chapter(tmp_path, capsys):
    path = chapter(tmp_path)
    assert main(["--count", str(path), str(path)]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["chapter", "words"] and len(lines) == 2
    assert lines[0].split() == ["00_small", "17", "22", "2", "1", "1", "2", "1"]
