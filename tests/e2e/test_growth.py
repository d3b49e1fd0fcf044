"""A run that is not finished: waiting, running, standing still, and growing while someone looks."""

import shutil
import threading
from pathlib import Path

from playwright.sync_api import Browser, expect

from tests.e2e.browsing import Visitor, serving, settled, shoot
from tests.e2e.conftest import half_done
from tests.end_to_end.conftest import run_job, tiny_job
from tests.end_to_end.drivers import gated_task, hold, holder, let_go


def test_a_run_without_a_job_waits(visitor: Visitor) -> None:
    page = visitor.go("progress?run=unborn")
    expect(page.locator(".state")).to_contain_text("waiting")
    page = visitor.go("queries?run=unborn")
    expect(page.locator("main")).to_contain_text("no scores to show yet")


def test_a_running_job_is_followed_to_its_end(browser: Browser, inputs: Path, tmp_path: Path) -> None:
    run, gate = tmp_path / "live", tmp_path / "gate"
    run.mkdir()
    job = tiny_job(inputs, run, task=gated_task(inputs, gate))
    with serving(tmp_path / "log", str(run)) as url:
        visitor = Visitor(browser, url)
        page = visitor.go("progress")
        expect(page.locator(".state")).to_contain_text("waiting")
        hold(gate, 20, 0)
        worker = threading.Thread(target=run_job, args=(job,), daemon=True)
        worker.start()
        try:
            holder(gate)
            expect(page.locator(".state .tag")).to_have_text("running")
            stage = page.locator(".stage").filter(has_text="collect-train")
            expect(stage).to_contain_text("1 of 9 units")
            shoot(page, "running")
        finally:
            let_go(gate)
        worker.join(90)
        expect(page.locator(".state .tag")).to_have_text("finished")
        expect(stage).to_contain_text("9 of 9 units")
        page.get_by_role("link", name="scores").click()
        settled(page)
        expect(page.locator(".entry")).to_have_count(5)
        visitor.leave()


def test_scores_in_the_making_are_shown_and_their_growth_offered(browser: Browser, runs: Path, tmp_path: Path) -> None:
    half = tmp_path / "half"
    half_done(runs / "texts", half)
    with serving(tmp_path / "log", str(half)) as url:
        visitor = Visitor(browser, url)
        page = visitor.go("query?run=half&scores=scores&id=1&k=50")
        expect(page.locator(".growth")).to_contain_text("20% of the training examples")
        expect(page.locator(".hit").first).to_be_visible()
        before = page.locator(".hit").count()
        expect(page.get_by_role("link", name="Show the newer answer")).to_be_hidden()
        shoot(page, "half")
        shutil.copytree(runs / "texts" / "journal", half / "journal", dirs_exist_ok=True)
        page.get_by_role("link", name="Show the newer answer").click()
        settled(page)
        expect(page.locator(".growth")).to_contain_text("100%")
        assert 0 < before < page.locator(".hit").count()
        visitor.leave()
