"""Settings that a run of the suite puts on every app, for features that must change nothing.

Without the variable BEGIN has a round trip of its own: "auto" would decide by the load of this machine.

CELERY_ALCHEMY_TEST_SETTINGS='{"alchemy_begin_with_first_statement": true}' python -m pytest tests/test_contract_*.py

By default that one is off: "auto" would decide by how busy this machine is, and round trips are counted.
"""

import json
import os
from typing import Any

VARIABLE = "CELERY_ALCHEMY_TEST_SETTINGS"
SETTINGS: dict[str, Any] = json.loads(os.environ.get(VARIABLE, '{"alchemy_begin_with_first_statement": false}'))
ENVIRONMENT = {VARIABLE: json.dumps(SETTINGS)}
"""For programs of the tests that make an app of their own."""
