"""The page of highlighted entities."""

from __future__ import annotations

from html.parser import HTMLParser

import pytest

from bench import gliner_picture
from fastenc.models.gliner import to_html

TEXT = "Marie <b>Curie</b> of the University of Paris & 東京"


def entity(piece, label, score=0.9):
    start = TEXT.index(piece)
    return {"start": start, "end": start + len(piece), "label": label, "score": score}


class Reader(HTMLParser):
    """The text of a page's paragraphs, and what stands in each mark."""

    def __init__(self, page):
        super().__init__()
        self.text, self.open, self.marks, self.skip = "", [], [], 0
        self.feed(page[page.index("<p>") :])
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag == "mark":
            self.open.append("")
        self.skip += tag == "small"

    def handle_endtag(self, tag):
        self.skip -= tag == "small"
        if tag == "mark":
            self.marks.append(self.open.pop())

    def handle_data(self, data):
        if self.skip:
            return
        self.text += data
        self.open = [x + data for x in self.open]


def test_text_and_marks_survive(tmp_path):
    found = [entity("University of Paris", "organisation"), entity("Paris", "city"),
             entity("Marie <b>Curie</b>", "person <script>"), entity("東京", "city")]  # fmt: skip
    page = to_html(TEXT, found, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]
    seen = Reader(page)
    assert seen.text.strip() == TEXT
    assert seen.marks == ["Marie <b>Curie</b>", "Paris", "University of Paris", "東京"]
    assert "<script>" not in page and page.count("hsl(") == 4


def test_several_texts_and_none():
    page = to_html([TEXT, "x", ""], [[entity("Paris", "city")], [], []])
    assert page.count("<p>") == 3 and Reader(page).marks == ["Paris"]


def test_misuse():
    with pytest.raises(ValueError, match="2 texts"):
        to_html(["a", "b"], [[]])
    with pytest.raises(ValueError, match="not in a text"):
        to_html("abc", [{"start": 0, "end": 9, "label": "x"}])
    with pytest.raises(ValueError, match="crosses"):
        to_html(
            "abcdef", [{"start": 0, "end": 3, "label": "x"}, {"start": 2, "end": 5, "label": "y"}]
        )


def test_the_picture_is_what_a_browser_draws(tmp_path, monkeypatch):
    browser, picture = tmp_path / "chromium", tmp_path / "page.png"
    browser.write_text(
        "#!/bin/sh\nfor word; do case $word in --screenshot=*) out=${word#*=};; esac; done\n"
        'echo "$word" > "$out"\n'  # the last argument is the page
    )
    browser.chmod(0o755)
    page = tmp_path / "a page.html"
    page.write_text(to_html(TEXT, [entity("東京", "city")]), encoding="utf-8")
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    gliner_picture.main(page, picture)
    assert picture.read_text().strip() == page.as_uri()
    browser.write_text("#!/bin/sh\necho no display >&2\n")
    with pytest.raises(SystemExit, match="drew nothing: no display"):
        gliner_picture.main(page, picture)
    monkeypatch.setenv("PATH", str(tmp_path / "none"))
    with pytest.raises(SystemExit, match="no browser: expected one of chromium"):
        gliner_picture.main(page, picture)
