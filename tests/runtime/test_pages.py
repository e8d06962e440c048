"""Pages of errors that show a session: the commands, run as they stand, say what the page says, and the cure works."""

from __future__ import annotations

import pytest

from tests.dsl.checking import Page, pages

SESSIONS = [p for p in pages() if p.is_session]


@pytest.mark.parametrize("page", SESSIONS, ids=lambda p: p.code)
def test_a_session_says_what_its_page_says(page: Page) -> None:
    assert page.actual() == page.rendering


@pytest.mark.parametrize("page", SESSIONS, ids=lambda p: p.code)
def test_the_cure_of_a_session_works(page: Page) -> None:
    assert page.cure_session.startswith("$ ")
    assert page.cured() == page.cure_session
