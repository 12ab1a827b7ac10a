"""What a person does in the Prefect UI, for tests of `make up`."""

from playwright.sync_api import Page


def press(page: Page, button: str, then: str) -> None:
    """Press a button of a run's page, and another in the dialog that it opens."""
    page.get_by_role("button", name=button, exact=True).click()
    page.get_by_role("dialog").get_by_role("button", name=then, exact=True).click()
