"""A model whose mapper takes its time to be configured, as one with many relationships does."""

import time
from typing import Any

from sqlalchemy import event

from support.project.models import Row

CONFIGURE_S = 1.0


@event.listens_for(Row, "mapper_configured")
def take_time(mapper: Any, class_: Any) -> None:
    time.sleep(CONFIGURE_S)
