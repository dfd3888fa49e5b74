"""A proxy before a broker, in a process of its own that can be stopped like a server; its one argument is JSON: host,
port, and socket for a Unix socket. Each line of its input is {"do": "port" | "cut" | "refuse" | "recover"}."""

import json
import sys

from sqlalchemy import URL

from celery_alchemy.loadtests.services.proxy import Proxy


def main() -> None:
    place = json.loads(sys.argv[1])
    query = {"unix_socket": place["socket"]} if place.get("socket") else {}
    proxy = Proxy(URL.create("broker", host=place.get("host"), port=place.get("port") or 1, query=query))
    actions = {"port": lambda: proxy.port, "cut": proxy.cut, "refuse": proxy.refuse, "recover": proxy.recover}
    for line in sys.stdin:
        print(json.dumps(actions[json.loads(line)["do"]]()), flush=True)


if __name__ == "__main__":
    main()
