"""A service with tokens shows nothing to anyone else."""

import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, expect

from launch.service.auth import add_token
from tests.e2e.browsing import Visitor, serving, settled, shoot


@pytest.fixture(scope="module")
def guarded(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """The address of a service with one token, and the token."""
    place = tmp_path_factory.mktemp("guarded")
    token = add_token(place / "tokens.json", "reader", "read")
    with serving(place / "log", str(runs / "texts"), "--tokens", str(place / "tokens.json")) as url:
        yield url, token


def test_the_token_opens_the_page_that_was_asked_for(browser: Browser, guarded: tuple[str, str]) -> None:
    url, token = guarded
    visitor = Visitor(browser, url)
    page = visitor.go("query?id=3")
    assert "/page/login" in page.url
    assert page.locator(".hit").count() == 0
    shoot(page, "login")
    page.get_by_label("Token").fill("reader.wrong")
    page.get_by_role("button", name="Log in").click()
    expect(page.locator(".notice.bad")).to_be_visible()
    page.get_by_label("Token").fill(token)
    page.get_by_label("Token").press("Enter")
    page.wait_for_url("**/page/query?**")
    settled(page)
    assert "id=3" in page.url
    expect(page.locator(".hit").first).to_be_visible()
    cookie = next(c for c in page.context.cookies() if c["value"] == token)
    assert cookie["httpOnly"]
    assert cookie["sameSite"] == "Strict"
    assert cookie["expires"] == -1
    visitor.leave()


@pytest.mark.parametrize("cookie", ["", "influence_token=reader.wrong", "influence_token="])
@pytest.mark.parametrize("address", ["image?run=texts&scores=scores&set=train&id=1", "export?run=texts&scores=scores"])
def test_nothing_is_given_out_without_it(guarded: tuple[str, str], address: str, cookie: str) -> None:
    request = urllib.request.Request(f"{guarded[0]}/page/{address}", headers={"Cookie": cookie})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == 401


def test_a_login_leads_to_this_page_only(guarded: tuple[str, str]) -> None:
    url, token = guarded
    form = urllib.parse.urlencode({"token": token, "next": "//evil.example/query?id=1"}).encode()
    request = urllib.request.Request(f"{url}/page/login", form)
    with urllib.request.urlopen(request) as answer:
        assert answer.url.startswith(f"{url}/page/")
