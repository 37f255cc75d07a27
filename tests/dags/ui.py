"""Airflow's pages in a real browser, by what a person sees: labels, buttons, dialogs."""

from __future__ import annotations

import contextlib
import shutil
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest

# Debian's Chromium, as any user and without a word to the outside.
CHROMIUM_OPTIONS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
ANSWER_MS = 60_000


@contextlib.contextmanager
def browser(url: str) -> Iterator[Airflow]:
    """Open Airflow in headless Chromium; skip the test where there is none."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs Chromium (Debian: apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_OPTIONS)
        # What moves on a page is drawn by the processor, all the time that a run is waited for.
        page = opened.new_page(
            viewport={"width": 1400, "height": 1000}, timezone_id="UTC", locale="en-GB", reduced_motion="reduce"
        )
        page.set_default_timeout(ANSWER_MS)
        try:
            yield Airflow(page, url)
        finally:
            opened.close()


class Airflow:
    """What a person does with the DAG's pages.

    Args:
        page: a Playwright page.
        url: address of the api-server, without a final slash.
    """

    def __init__(self, page, url: str) -> None:
        self.page, self.url = page, url
        self.sent: list[dict] = []  # bodies of what the pages have asked Airflow to do
        page.on(
            "request",
            lambda request: (
                self.sent.append(request.post_data_json) if request.method == "POST" and request.post_data else None
            ),
        )

    def open(self, path: str) -> None:
        self.page.goto(self.url + path)
        self.page.wait_for_load_state("networkidle")

    def leave(self) -> None:
        """Close the page after what was pressed: open, it would ask Airflow and draw for as long as a run takes."""
        self.page.goto("about:blank")

    def screenshot(self, file: Path) -> None:
        self.page.screenshot(path=str(file))

    def _trigger_dialog(self, dag_id: str):
        self.open(f"/dags/{dag_id}")
        self.page.get_by_label("Trigger Dag").first.click()
        dialog = self.page.get_by_role("dialog")
        dialog.get_by_text("Run Parameters").wait_for()
        return dialog

    @contextlib.contextmanager
    def trigger_form(self, dag_id: str) -> Iterator[None]:
        """Show the form as prefilled, and leave it."""
        self._trigger_dialog(dag_id)
        yield
        self.leave()

    def _fill(self, dialog, fields: dict[str, str]) -> None:
        for name, value in fields.items():
            field = dialog.locator(f"[name=element_{name}]")
            chosen = field.locator("xpath=..").locator("input[role='combobox']")
            if chosen.count():  # a list to choose from
                chosen.click()
                self.page.get_by_role("option", name=value, exact=True).click()
            else:
                field.fill(value)
                field.press("Tab")

    def trigger(self, dag_id: str, **fields: str) -> str:
        """Press Trigger in the form, as prefilled but for `fields`; return the run's id."""
        dialog = self._trigger_dialog(dag_id)
        self._fill(dialog, fields)
        dialog.get_by_role("button", name="Trigger").click()
        self.page.wait_for_url("**/runs/**")
        run_id = urllib.parse.unquote(self.page.url.rpartition("/runs/")[2].split("/")[0].split("?")[0])
        self.leave()
        return run_id

    def backfill(
        self,
        dag_id: str,
        first: str,
        last: str,
        *,
        reprocess: str = "Missing Runs",
        backwards: bool = False,
        override: bool = False,
        **fields: str,
    ) -> None:
        """Fill in the backfill dialog and run it; days are YYYY-MM-DD."""
        dialog = self._trigger_dialog(dag_id)
        dialog.get_by_text("Backfill", exact=True).click()
        for day in (first, last):
            dialog.get_by_text("Select date and time").first.click()
            date = self.page.get_by_placeholder("YYYY/MM/DD")
            date.fill(day.replace("-", "/"))
            date.press("Enter")
            self.page.keyboard.press("Escape")
            date.wait_for(state="hidden")
        dialog.get_by_text(reprocess, exact=True).click()
        if backwards:
            dialog.get_by_text("Run Backwards", exact=True).click()
        if override:
            dialog.get_by_text("Override parameters on existing runs", exact=True).click()
        self._fill(dialog, fields)
        dialog.get_by_role("button", name="Run Backfill").click()
        dialog.wait_for(state="hidden")
        self.leave()

    def clear_run(self, dag_id: str, run_id: str, *, only_failed: bool = False) -> None:
        """Press Clear on the run's page, whole or its failed tasks only."""
        self.open(f"/dags/{dag_id}/runs/{urllib.parse.quote(run_id)}")
        self._clear("Clear only failed tasks" if only_failed else "Clear existing tasks")

    def clear_task(self, dag_id: str, run_id: str, task_id: str, *, downstream: bool = True) -> None:
        """Press Clear on the task's page; the dialog comes with Downstream chosen."""
        self.open(f"/dags/{dag_id}/runs/{urllib.parse.quote(run_id)}/tasks/{task_id}")
        self._clear(*([] if downstream else ["Downstream"]))

    def _clear(self, *choices: str) -> None:
        self.page.get_by_label("Press shift+c to clear").click()
        dialog = self.page.get_by_role("dialog")
        for choice in choices:
            dialog.get_by_role("button", name=choice, exact=True).click()
        dialog.get_by_text("Affected Tasks").wait_for()
        dialog.get_by_role("button", name="Confirm").click()
        dialog.wait_for(state="hidden")
        self.leave()

    def answer(self, dag_id: str, run_id: str, task_id: str, option: str) -> str:
        """Press Approve or Reject on the page of a task that waits; return the question as it stood there."""
        self.open(f"/dags/{dag_id}/runs/{urllib.parse.quote(run_id)}/tasks/{task_id}/required_actions")
        button = self.page.get_by_role("button", name=option, exact=True)
        button.wait_for()
        question = self.page.inner_text("body")
        with self.page.expect_response(lambda answer: answer.request.method == "PATCH" and "hitlDetails" in answer.url):
            button.click()
        self.leave()
        return question
