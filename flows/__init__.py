"""The Prefect flows: Prefect decides when and where a stage runs and how often it is retried; DVC decides whether it must run.

Importing this package sets defaults for Prefect: its database is in the checkout, no telemetry is sent, and a temporary server logs
nothing. Each default is an environment variable of Prefect's own, which takes precedence if it is already set.
"""

import os
from pathlib import Path

QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_SERVER_UI_V2_ENABLED": "false",  # the root address leads to this second UI, which contacts an analytics host
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",  # or a temporary server that ends logs pages of CancelledError
    "PREFECT_HOME": str(Path.cwd() / ".prefect"),
}

for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)
