"""Forward connections to a database from the far side of a network: ADDRESS URL."""

import signal
import sys

from sqlalchemy import make_url

from celery_alchemy.loadtests.services.proxy import Proxy

proxy = Proxy(make_url(sys.argv[2]), host=sys.argv[1])
print(proxy.port, flush=True)
signal.sigwait({signal.SIGTERM})
