"""What a person does in the Prefect UI, for tests of `make up`."""

from playwright.sync_api import Locator, Page

from support.up import Up


def press(page: Page, button: str, then: str) -> None:
    """Press a button of a run's page, and another in the dialog that it opens."""
    page.get_by_role("button", name=button, exact=True).click()
    page.get_by_role("dialog").get_by_role("button", name=then, exact=True).click()


def field_of(dialog: Locator, label: str) -> Locator:
    """Find a field of a form by its label, which Prefect does not link with it."""
    return dialog.locator(".schema-form-property").filter(has_text=label)


def answer(page: Page, choice: str, who: str, why: str) -> None:
    """Fill in the form that asks for approval, and send it."""
    dialog = page.get_by_role("dialog")
    field_of(dialog, "Approve the challenger?").locator(".p-select-button__icon").click(force=True)  # opens the list
    page.locator(".p-select-option").get_by_text(choice, exact=True).click()
    field_of(dialog, "Who are you?").locator("textarea").fill(who)
    field_of(dialog, "Why?").locator("textarea").fill(why)
    dialog.get_by_role("button", name="Submit").click()
    dialog.wait_for(state="hidden")


def see_artifact(up: Up, page: Page, key: str, title: str) -> str:
    """Open the newest artifact of a key, and return the text of its page."""
    (artifact,) = up.api.post("/artifacts/latest/filter", {"artifacts": {"key": {"any_": [key]}}})
    page.goto(f"{up.prefect}/artifacts/artifact/{artifact['latest_id']}")
    page.get_by_role("heading", name=title, exact=True).wait_for()
    return page.locator("body").inner_text()
