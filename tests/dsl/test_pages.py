"""Every code has a page, and every page tells the truth."""

from __future__ import annotations

import pytest

from heddle.dsl.pages import codes, explain
from tests.dsl.checking import Page, codes_in_sources, diagnostics_of, pages

PAGES = pages()
EXECUTED = [p for p in PAGES if p.is_executed]


def test_every_code_has_a_page_and_every_page_a_code() -> None:
    used = codes_in_sources()
    assert {c: where for c, where in used.items() if c not in codes()} == {}, "codes without a page"
    assert [c for c in codes() if c not in used] == [], "pages of codes that nothing raises"


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
    assert page.rendering
    assert page.text.endswith("```\n")
    assert f"[{page.code}]: " in page.rendering
    assert max(map(len, page.text.partition("```")[0].split("\n"))) <= 125


@pytest.mark.parametrize("page", EXECUTED, ids=lambda p: p.code)
def test_broken_spec_gives_the_rendering(page: Page) -> None:
    assert page.actual() == page.rendering


@pytest.mark.parametrize("page", EXECUTED, ids=lambda p: p.code)
def test_fixed_spec_has_no_errors(page: Page) -> None:
    assert [d.message for d in diagnostics_of(page.fixed)] == []
