"""The flows: Prefect decides when, where and how often again; DVC decides what must run.

Importing this package chooses what Prefect does when nobody said otherwise: its database lives in the checkout, nothing is
sent anywhere, and a temporary server stays silent. Each is an environment variable of Prefect's own, which wins when set.
"""

import os
from pathlib import Path

QUIET = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    "PREFECT_SERVER_UI_V2_ENABLED": "false",  # the second UI, to which the bare address would lead, asks a host of analytics
    "PREFECT_SERVER_LOGGING_LEVEL": "CRITICAL",  # or pages of CancelledError in the log when a temporary server ends
    "PREFECT_HOME": str(Path.cwd() / ".prefect"),
}

for _name, _value in QUIET.items():
    os.environ.setdefault(_name, _value)
