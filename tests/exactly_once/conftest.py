"""An app whose tasks have exactly_once, on each database, with and without BEGIN sent with the first statement.

What makes a copy dangerous, by the numbers of the research, and the tests that fail without the remedy; `kills` are
those of real workers: test_killed_with_outbox, test_killed_awaited (`async def`), test_killed_chords.

 1  links have no ids               test_hazards::test_1_*; kills before and after publishing
 2  kombu loses messages on Redis   test_what_comes_next::test_what_the_broker_loses_is_sent_again; kills around "noted"
 3  SUCCESS that is seen too early  test_killed_chords::test_celerys_main_process_*; test_hazards::test_3_and_4_*
 4  between result and count        the same
 5  the claim of a chord            the same; kills around "claimed", also of a chord that fails
 6  the copy that loses fails       test_isolation::test_pairs; test_hazards::test_6_*; test_copies_that_wait
 7  MariaDB counts found rows       test_copies, test_isolation on MariaDB
 8  members counted twice           test_redis_chords, on a real Redis; test_hazards::test_8_*, what is refused
 9  replace() without the outbox    test_hazards::test_9_*; with it: kills of "replace"
10  a connection is held            test_hazards::test_10_*; test_copies_that_wait
11  longer than the timeout         test_hazards::test_6_a_timeout_*; test_what_comes_next::test_a_receiver_that_runs_*,
                                    test_a_message_whose_receiver_never_completes_*
12  an id that is used again, etc.  test_keeping; test_pruning; test_hazards::test_12_*; test_several_databases_once
"""

from collections.abc import Iterator

import pytest
from support.exactly_once import PLACES, Once, Place, fixture_of
from support.once_flows import Flows

place = fixture_of(PLACES)


@pytest.fixture
def once(place: Place) -> Iterator[Once]:
    once = Once(place[0], **place[1])
    yield once
    once.close()


@pytest.fixture
def flows(place: Place) -> Iterator[Flows]:
    flows = Flows(place[0], **place[1])
    yield flows
    flows.close()
