"""Messages about runs, which Prefect automations send: `python -m flows.messages` declares those of infra/prefect.yaml in a server.

OMMATID_MESSAGES names the receiver: an address that gets a JSON object by POST (https://...), any other service that Apprise knows by its
address (mailtos://..., slack://...), or a block that was made in the Prefect UI, by its type and name (slack-webhook/team). Without it, the
automations are there and send nothing.
"""

import logging
import os
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import get_client
from prefect.blocks.core import Block
from prefect.blocks.notifications import AppriseNotificationBlock
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient
from prefect.events.actions import CallWebhook, DoNothing, SendNotification
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectNotFound
from prefect.types import SecretDict
from pydantic import SecretStr, ValidationError

from flows.project import PROJECT, Automation, read_project
from ommatid.cli.error_boundary import at_edge
from ommatid.errors import ConfigError

VARIABLE = "OMMATID_MESSAGES"
"""Environment variable that names the receiver."""
BLOCK = "messages"
"""Name of the block that is made of an address."""
TAG = "ommatid"
"""Tag of the automations that are ours, to be removed once infra/prefect.yaml does not list them."""

# A proactive trigger fires because there was no event; the last one that there was may be known, but is not what the message is about.
_RUN = "{% if event and automation.trigger.posture != 'Proactive' %}"
TEXT = (
    f"{_RUN}{{{{ flow.name }}}} {{{{ flow_run.name }}}}: {{{{ flow_run.state.name }}}}. {{{{ flow_run.state.message or '' }}}}\n"
    "{{ flow_run|ui_url }}{% else %}see the runs in the Prefect UI{% endif %}"
)
"""Template of the text of a message, without its subject."""
FIELDS = {
    "subject": "automation.name",
    "flow": "flow.name",
    "run": "flow_run.name",
    "state": "flow_run.state.name",
    "message": "flow_run.state.message",
    "link": "flow_run|ui_url",
}
"""Fields of the JSON object beside `text`, as expressions of Jinja."""


class Apprise(AppriseNotificationBlock):
    """Any service that Apprise knows by an address."""

    _block_type_name = "Ommatid Messages"
    _block_type_slug = "ommatid-messages"


def declare(client: SyncPrefectClient, automations: list[Automation], receiver: str | None) -> None:
    """Make the automations of a server those of infra/prefect.yaml, leaving those unchanged that are as declared.

    Args:
        client: Client of the server.
        automations: The automations.
        receiver: Address or block that gets the messages; None: nobody.

    Raises:
        ConfigError: A trigger is not valid, or the receiver is not usable or does not exist.
    """
    action = _action(client, receiver)
    known = {found.name: found for found in client.read_automations() if TAG in found.tags}
    for automation in automations:
        values = {"name": automation.name, "tags": [TAG], "enabled": receiver is not None, "trigger": automation.trigger}
        try:
            wanted = AutomationCore.model_validate(values | {"actions": [action.model_dump()]})
        except ValidationError as error:
            raise ConfigError(f"{PROJECT}: automation {automation.name!r}: {error.errors()[0]['msg']} (trigger)") from None
        found = known.pop(automation.name, None)
        if found is None:
            client.create_automation(wanted)
        elif _same(found) != _same(wanted):
            client.update_automation(found.id, wanted)
    for found in known.values():
        client.delete_automation(found.id)


def _same(automation: AutomationCore) -> dict[str, Any]:
    """What two declarations have in common if they are the same; people may switch an automation off in the UI."""
    return AutomationCore.model_validate(automation.model_dump()).model_dump(exclude={"enabled", "owner_resource"})  # sets in any order


def _action(client: SyncPrefectClient, receiver: str | None) -> CallWebhook | SendNotification | DoNothing:
    if receiver is None:
        return DoNothing()
    if receiver.startswith(("http://", "https://")):
        block = Webhook(url=SecretStr(receiver), headers=SecretDict({"Content-Type": "application/json"}))
        return CallWebhook(block_document_id=_save(block), payload=_payload())
    if "://" in receiver:
        return _notification(_save(_apprise(receiver)))
    kind, is_block, name = receiver.partition("/")
    if not is_block:
        raise ConfigError(f"{VARIABLE}: is neither an address nor a block; write https://..., mailtos://... or slack-webhook/NAME")
    try:
        block = client.read_block_document_by_name(name, kind)
    except ObjectNotFound:
        raise ConfigError(f"{VARIABLE}: the Prefect server has no block of this type and name; make it under Blocks in its UI") from None
    if kind == Webhook.get_block_type_slug():
        return CallWebhook(block_document_id=block.id, payload=_payload())
    return _notification(block.id)


def _save(block: Block) -> UUID:
    saved = block.save(BLOCK, overwrite=True)
    assert isinstance(saved, UUID), "save is asynchronous here"
    return saved


def _notification(block: UUID) -> SendNotification:
    return SendNotification(block_document_id=block, subject="{{ automation.name }}", body=TEXT)


def _payload() -> str:
    fields = [f'"{name}": {{{{ ({expression})|tojson }}}}' for name, expression in FIELDS.items() if name != "subject"]
    about_run = f"{_RUN}, {', '.join(fields)}{{% endif %}}"
    text = f"{{% set text %}}{{{{ automation.name }}}}: {TEXT}{{% endset %}}"
    return f'{text}{{"subject": {{{{ automation.name|tojson }}}}{about_run}, "text": {{{{ text|tojson }}}}}}'


def _apprise(address: str) -> Apprise:
    from apprise import Apprise as Service

    logging.getLogger("apprise").disabled = True  # it writes the address, in which there are passwords
    if not Service().add(address):
        raise ConfigError(
            f"{VARIABLE}: Apprise cannot use this address, which begins with {address.partition('://')[0]}://; see Messages in "
            "docs/users/operations.md"
        )
    return Apprise(url=SecretStr(address))


def main() -> None:
    """Declare the automations in the server at PREFECT_API_URL."""
    with at_edge(), get_client(sync_client=True) as client:
        declare(client, read_project(Path.cwd()).automations, os.environ.get(VARIABLE) or None)


if __name__ == "__main__":
    main()
