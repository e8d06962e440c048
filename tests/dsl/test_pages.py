"""Every code has a page, and every page tells the truth. Pages that show commands are run in tests/runtime."""

from __future__ import annotations

import pytest

from heddle.dsl.pages import codes, explain
from tests.dsl.checking import Page, codes_in_sources, pages

PAGES = pages()
CHECKED = [p for p in PAGES if p.is_executed and not p.is_session]


def test_the_codes_of_the_source_are_those_of_pages_that_are_run() -> None:
    used = codes_in_sources()
    assert {c: where for c, where in used.items() if c not in codes()} == {}, "codes without a page"
    assert [c for c in codes() if c not in used] == [], "pages of codes that nothing raises"
    assert [p.code for p in PAGES if not p.is_executed] == [], "pages that show nothing that is run"
    assert sorted(used) == codes() == [p.code for p in PAGES if p.is_executed]


def test_explain_gives_the_text() -> None:
    assert explain("no-such-code") is None
    assert explain("../README") is None
    for page in PAGES:
        assert explain(page.code) == page.text


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.code)
def test_page_has_its_parts(page: Page) -> None:
    assert page.title.startswith(f"# {page.code}: ")
    assert not page.title.endswith(".")
    assert "\n## Cure\n" in page.text
    assert page.text.endswith("```\n")
    assert f"[{page.code}]: " in page.rendering
    assert max(map(len, page.text.partition("```")[0].split("\n"))) <= 125


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.code)
def test_message_is_one_line_in_lower_case_without_a_full_stop(page: Page) -> None:
    lines = page.rendering.split("\n")
    for line, below in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith(("error[", "warning[")):
            assert below.startswith(("  -->", "  = help: ")) or not below
            message = line.partition("]: ")[2]
            assert message[:1] == message[:1].lower()
            assert not message.endswith((".", "!", "?"))


@pytest.mark.parametrize("page", CHECKED, ids=lambda p: p.code)
def test_broken_spec_gives_the_rendering(page: Page) -> None:
    assert page.actual() == page.rendering


@pytest.mark.parametrize("page", CHECKED, ids=lambda p: p.code)
def test_fixed_spec_has_no_errors(page: Page) -> None:
    assert page.cure
    assert page.cured() == ""
