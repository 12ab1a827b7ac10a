"""Proves that an automation is the same whatever the order in which it names the events that it waits for."""

from prefect.events import AutomationCore
from prefect.events.actions import DoNothing

from flows.messages import _same


def waiting_for(*events: str) -> AutomationCore:
    trigger = {"posture": "Reactive", "expect": [*events], "match": {"prefect.resource.id": "prefect.flow-run.*"}}
    return AutomationCore.model_validate({"name": "any", "enabled": True, "trigger": trigger, "actions": [DoNothing().model_dump()]})


def test_the_order_of_events_is_no_difference() -> None:
    for i in range(100):  # the order in which Python keeps two strings depends on their hashes, and for one pair in eight on their order
        one, other = f"prefect.flow-run.{i}", f"prefect.flow-run.other-{i}"
        assert _same(waiting_for(one, other)) == _same(waiting_for(other, one))
        assert _same(waiting_for(one, other)) != _same(waiting_for(one))
